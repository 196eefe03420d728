"""A seeded grammar that generates sample dialogues in the form of RoleCS, for the demo and the tests.

Its tables are in `sample_grammar.yaml`. All wordings are our own; nothing is taken from the published data. Two
tables alternate:

- `NEXT_ACTS` draws the customer's next act, given the supporter's last strategy.
- The strategy rule (`FIXED_STRATEGIES`, `STRATEGY_CHANCES`) draws the supporter's strategy, given that act and facts of
  the earlier turns: whether the problem was stated, the identity verified, the problem restated.

A model that reads the acts and remembers these facts reaches `accuracy_ceiling`. The previous strategy alone is a poor
predictor, because the acts vary.
"""

import contextlib
import functools
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from csc_train.data.config import DataConfig
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.strategies import CLOSURE, GREETING, STRATEGIES
from csc_train.errors import InputError
from csc_train.overrides import hint
from csc_train.templates import read_yaml

SAMPLE_FOLDER = Path("runs/sample")
SAMPLE_SOURCE = "synthetic-sample"
ID_PREFIX = "sample-"
"""Prefix of the ids of sample dialogues."""


class ServiceProblem(NamedTuple):
    """A problem that a customer calls about."""

    topic: str
    name: str
    items: tuple[str, ...]
    cases: tuple[str, str]
    """The problem in two wordings; `{who}` is 我 or 您, so that the supporter can restate it."""
    details: tuple[tuple[str, str], ...]
    """Pairs of the supporter's question and the customer's answer."""
    facts: tuple[str, str]
    advice: tuple[str, str]
    actions: tuple[str, str]


_TABLES = read_yaml("csc_train.data", "sample_grammar.yaml")
SERVICE_PROBLEMS = tuple(ServiceProblem(**problem) for problem in _TABLES["problems"])
FEELINGS, CUSTOMER_WORDINGS, SLOT_VALUES = _TABLES["feelings"], _TABLES["customer_wordings"], _TABLES["slot_values"]
SUPPORTER_WORDINGS = _TABLES["supporter_wordings"]
FIXED_STRATEGIES, STRATEGY_CHANCES = _TABLES["fixed_strategies"], _TABLES["strategy_chances"]
PRECONDITIONS, NEXT_ACTS, OUTCOMES = _TABLES["preconditions"], _TABLES["next_acts"], _TABLES["outcomes"]

# Supporter turns after which a dialogue may end, and after which the customer hurries to the end: long enough for every
# stage, short enough for a demo.
MIN_TURNS, HURRY_AFTER = 6, 8


def generate_sample(count: int, seed: int) -> list[Dialogue]:
    """Generate `count` dialogues of about 11 supporter turns.

    Dialogue `i` depends only on `seed` and `i`, so a smaller sample is a prefix of a larger one. Ids read
    `sample-{seed}-{index:05d}`; `extra` holds the texts `topic`, `problem`, `mood` and `outcome`.

    Raises:
        InputError: `count` is less than 1.
    """
    if count < 1:
        raise InputError(f"sample of {count} dialogues: must be at least 1")
    return [_write_dialogue(seed, index) for index in range(count)]


def check_sample_place(data: DataConfig) -> None:
    """Raise an InputError if sample dialogues are asked for in a file that the user named."""
    if data.sample_dialogues and Path(data.train.path).parent != SAMPLE_FOLDER:
        own = hint({"data": "files", "data.train.path": data.train.path, "data.sample_dialogues": None})
        raise InputError(
            f"data.train.path={data.train.path}: sample dialogues are written only to {SAMPLE_FOLDER}: for your own "
            f"dialogues give {own}, else leave it out"
        )


def provide_sample(data: DataConfig) -> None:
    """Write the sample dialogues that a configuration asks for, if any.

    Raises:
        InputError: as `check_sample_place` and `ensure_sample`.
    """
    check_sample_place(data)
    if data.sample_dialogues:
        ensure_sample(data.train.path, data.sample_dialogues, data.sample_seed)


def ensure_sample(path: str | os.PathLike, count: int, seed: int) -> bool:
    """Write the sample to `path` (`.jsonl` or `.parquet`) unless the file already holds exactly that sample.

    Returns:
        True if the file was written (replacing another sample), False if it was kept.

    Raises:
        InputError: `count` is less than 1, the suffix is another, the file holds anything but a sample (it is kept), or
            it cannot be written.
    """
    dialogues = generate_sample(count, seed)
    # The suffix comes first, because other paths could be read as data sets of the hub.
    if Path(path).suffix in (".jsonl", ".parquet") and Path(path).is_file():
        kept = []
        with contextlib.suppress(InputError):
            kept = read_dialogues(path, strict=True)
        # Checked by id as well: the mock backend uses the same grammar, and its dialogues must not be overwritten.
        if not kept or not all(
            dialogue.id.startswith(ID_PREFIX) and dialogue.source == SAMPLE_SOURCE for dialogue in kept
        ):
            raise InputError(
                f"{path}: exists and is no sample: for your own dialogues give "
                f"{hint({'data': 'files', 'data.train.path': path, 'data.sample_dialogues': None})}"
            )
        if [dialogue.row() for dialogue in kept] == [dialogue.row() for dialogue in dialogues]:
            return False
    write_dialogues(path, dialogues)
    return True


def accuracy_ceiling(dialogues: Iterable[Dialogue]) -> float:
    """The strategy accuracy of an oracle on these dialogues, in percent of all supporter turns.

    The oracle knows the strategy rule and the earlier turns, and always predicts the most probable strategy. On many
    dialogues no model can reach more. Works on dialogues from a file as well.

    Raises:
        InputError: a dialogue is not from this grammar, or there are none.
    """
    hits = [
        actual == max(chances, key=lambda number: chances[number]) for d in dialogues for actual, chances in _replay(d)
    ]
    if not hits:
        raise InputError("accuracy ceiling: there are no dialogues")
    return 100.0 * sum(hits) / len(hits)


def _facts(acts: list[str], strategies: list[int]) -> set[str]:
    """The facts that `PRECONDITIONS` and `STRATEGY_CHANCES` name, from the acts and strategies so far."""
    question = max((index for index, strategy in enumerate(strategies) if strategy == 4), default=0)
    facts = {
        "stated": "problem" in acts,
        "verified": "identity" in acts,
        "restated": 3 in strategies,
        "asked": 2 in strategies,
        "questioned": 4 in strategies and {"detail", "problem"}.isdisjoint(acts[question:]),
        "solved": 8 in strategies,
        "settled": bool(OUTCOMES.keys() & {*acts}),
        "ready": len(strategies) >= MIN_TURNS,
        "late": len(strategies) >= HURRY_AFTER,
    }
    return {fact for fact, holds in facts.items() if holds}


def _chances(act: str, facts: set[str]) -> dict[int, float]:
    """The chance of each strategy as the answer to `act`."""
    if act in FIXED_STRATEGIES:
        return {FIXED_STRATEGIES[act]: 1.0}
    return next(chances for fact, chances in STRATEGY_CHANCES[act] if not fact or fact in facts)


def _write_dialogue(seed: int, index: int) -> Dialogue:
    # A string seed is the same on every platform and does not correlate neighbouring dialogues.
    rng = random.Random(f"{seed}:{index}")
    problem, mood = rng.choice(SERVICE_PROBLEMS), rng.choice(list(FEELINGS))
    acts, turns = generate_turns(rng, problem, mood)
    outcome = next(OUTCOMES[act] for act in acts if act in OUTCOMES)
    extra = {"topic": problem.topic, "problem": problem.name, "mood": mood, "outcome": outcome}
    return Dialogue(f"{ID_PREFIX}{seed}-{index:05d}", tuple(turns), SAMPLE_SOURCE, extra)


def generate_turns(rng: random.Random, problem: ServiceProblem, mood: str) -> tuple[list[str], list[Turn]]:
    """Draw a conversation about `problem` with a customer in `mood` (a key of `FEELINGS`).

    Returns:
        The customer's acts (see `CUSTOMER_WORDINGS`) in order, and the turns of both speakers.
    """
    writer = _Writer(rng, problem, mood)
    acts, strategies, turns = [], [GREETING.number], []
    while True:
        text = writer.reply(strategies[-1], acts[-1] if acts else "")
        turns.append(Turn(Speaker.SUPPORTER, text, STRATEGIES[strategies[-1] - 1]))
        if strategies[-1] == CLOSURE.number:
            return acts, turns
        acts.append(_next_act(rng, acts, strategies, mood))
        facts = _facts(acts, strategies)
        turns.append(Turn(Speaker.CUSTOMER, writer.utterance(acts[-1], facts)))
        strategies.append(_draw(rng, _chances(acts[-1], facts)))


def _next_act(rng: random.Random, acts: list[str], strategies: list[int], mood: str) -> str:
    facts = _facts(acts, strategies)
    # A request for the identity stays open until it is answered.
    weights = {"identity": 6} | NEXT_ACTS[strategies[-1]] | (_TABLES["hurry_weights"] if "late" in facts else {})
    if "upset" in weights and mood == "平静":
        weights["upset"] /= 2

    def possible(act: str) -> bool:
        needs_met = all((need.lstrip("!") in facts) != need.startswith("!") for need in PRECONDITIONS[act].split())
        twice = strategies[-1] if strategies[-2:-1] == strategies[-1:] else None
        return needs_met and twice not in _chances(act, facts)

    return _draw(rng, {act: weight for act, weight in weights.items() if possible(act)})


def _draw(rng: random.Random, weights: Mapping[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


class _Writer:
    """Renders the acts and strategies of one dialogue as text; wordings repeat only after all were used."""

    def __init__(self, rng: random.Random, problem: ServiceProblem, mood: str):
        self.rng, self.problem, self.mood = rng, problem, mood
        self.unused: dict[tuple, list] = {}
        self.slots = {slot: rng.choice(values) for slot, values in SLOT_VALUES.items()}
        self.slots |= {"item": rng.choice(problem.items), "badge": f"{rng.randrange(100, 1000)}"}
        self.slots["tail"] = f"{rng.randrange(10_000):04d}"
        self._ask()

    def reply(self, strategy: int, act: str) -> str:
        if strategy == 4:
            self._ask()
        if act == "upset":
            return self._fill(FEELINGS[self.mood][1], who="您")
        return self._fill(SUPPORTER_WORDINGS.get(f"{strategy} {act}") or SUPPORTER_WORDINGS[str(strategy)], who="您")

    def utterance(self, act: str, facts: set[str]) -> str:
        if act == "upset":
            feeling = self._pick(FEELINGS[self.mood][0])
            # Before the problem is stated, the product is named with the feeling, so that the topic is clear.
            other = "vague" if "stated" not in facts else self.rng.choice(("why", "how", "doit", ""))
            if not other:
                return f"{feeling}。"
            text = self._fill(CUSTOMER_WORDINGS[other], who="我")
            return f"{feeling}，{text}" if self.rng.random() < 0.5 else f"{text}{feeling}。"
        opener = self.rng.choice(_TABLES["openers"]) if act in _TABLES["opened"] and self.rng.random() < 0.4 else ""
        return opener + self._fill(CUSTOMER_WORDINGS[act], who="我")

    def _ask(self) -> None:
        self.slots["question"], self.slots["answer"] = self._pick(self.problem.details + _TABLES["general_details"])

    def _fill(self, wordings: tuple[str, ...], who: str) -> str:
        template = self._pick(wordings)
        clauses = {"case": "cases", "fact": "facts", "advice": "advice", "action": "actions"}
        used = [slot for slot in clauses if f"{{{slot}}}" in template]
        inner = {slot: self._pick(getattr(self.problem, clauses[slot])) for slot in used}
        slots = self.slots | {"who": who} | inner
        # Twice, because a clause has slots itself.
        return template.format_map(slots).format_map(slots)

    def _pick(self, choices: tuple):
        unused = self.unused.setdefault(choices, [])
        if not unused:
            unused += self.rng.sample(choices, len(choices))
        return unused.pop()


def _replay(dialogue: Dialogue) -> Iterator[tuple[int, dict[int, float]]]:
    """For each supporter turn: its strategy's number, and the chance of each strategy by the strategy rule."""
    acts, strategies = [], []
    for number, turn in enumerate(dialogue.turns, start=1):
        place = f"dialogue {dialogue.id}, turn {number}"
        if turn.speaker is Speaker.CUSTOMER:
            matches = _matching_acts(turn.text)
            if len(matches) != 1:
                raise InputError(f"{place}: not an utterance of the sample grammar")
            acts += matches
        else:
            chances = _chances(acts[-1], _facts(acts, strategies)) if acts else {GREETING.number: 1.0}
            if turn.strategy.number not in chances:
                raise InputError(f"{place}: not a strategy that the sample grammar allows here")
            yield turn.strategy.number, chances
            strategies.append(turn.strategy.number)


def _matching_acts(text: str) -> list[str]:
    """The acts that `text` may express: exactly one for a customer's utterance of this grammar."""
    if any(feeling in text for said, _ in FEELINGS.values() for feeling in said):
        return ["upset"]
    return [act for act, pattern in _patterns().items() if pattern.fullmatch(text)]


@functools.cache
def _patterns() -> dict[str, re.Pattern]:
    """For each act except `upset`, a pattern of its wordings with every filling of their slots."""
    values = {slot: _any(map(re.escape, choices)) for slot, choices in SLOT_VALUES.items()}
    values |= {"who": "[我您]", "tail": "[0-9]{4}", "item": _any(i for p in SERVICE_PROBLEMS for i in p.items)}

    def expand(template: str) -> str:
        parts = re.split(r"\{(\w+)\}", template)
        return "".join(values[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))

    details = [pair for p in SERVICE_PROBLEMS for pair in p.details] + list(_TABLES["general_details"])
    values["case"] = _any(expand(case) for p in SERVICE_PROBLEMS for case in p.cases)
    values["answer"] = _any(expand(answer) for _, answer in details)
    openers = {act: _any(_TABLES["openers"]) + "?" for act in _TABLES["opened"]}
    return {
        act: re.compile(openers.get(act, "") + _any(map(expand, texts))) for act, texts in CUSTOMER_WORDINGS.items()
    }


def _any(expressions: Iterable[str]) -> str:
    return f"(?:{'|'.join(expressions)})"
