"""A seeded grammar that generates sample dialogues in the form of RoleCS, for the demo and the tests.

Its rules are in `sample_grammar.yaml`, the wordings of a language in `sample_grammar.{language}.yaml`. All wordings are
our own; nothing is taken from the published data. Two tables alternate:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from csc_train.data.config import SAMPLE_LANGUAGES, DataConfig
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

_RULES = read_yaml("csc_train.data", "sample_grammar.yaml")
FIXED_STRATEGIES, STRATEGY_CHANCES = _RULES["fixed_strategies"], _RULES["strategy_chances"]
PRECONDITIONS, NEXT_ACTS = _RULES["preconditions"], _RULES["next_acts"]

# Supporter turns after which a dialogue may end, and after which the customer hurries to the end: long enough for every
# stage, short enough for a demo.
MIN_TURNS, HURRY_AFTER = 6, 8


class ServiceProblem(NamedTuple):
    """A problem that a customer calls about."""

    topic: str
    name: str
    items: tuple[str, ...]
    cases: tuple[str, str]
    """The problem in two wordings; their slots of `persons` let the supporter restate it."""
    details: tuple[tuple[str, str], ...]
    """Pairs of the supporter's question and the customer's answer."""
    facts: tuple[str, str]
    advice: tuple[str, str]
    actions: tuple[str, str]


@dataclass(frozen=True, eq=False)
class SampleGrammar:
    """The wordings of a language, as `sample_grammar.{language}.yaml` explains them."""

    language: str
    problems: tuple[ServiceProblem, ...]
    feelings: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    """By mood, the calm one first: wordings of the customer, wordings of the supporter's answer."""
    feeling_joins: tuple[str, str, str]
    persons: Mapping[str, dict[str, str]]
    customer_wordings: Mapping[str, tuple[str, ...]]
    supporter_wordings: Mapping[str, tuple[str, ...]]
    openers: tuple[str, ...]
    general_details: tuple[tuple[str, str], ...]
    slot_values: Mapping[str, tuple[str, ...]]
    outcomes: Mapping[str, str]

    @functools.cached_property
    def feeling(self) -> re.Pattern:
        """A pattern of the customer's feelings."""
        return re.compile(_any(re.escape(feeling) for said, _ in self.feelings.values() for feeling in said), re.I)

    @functools.cached_property
    def patterns(self) -> dict[str, re.Pattern]:
        """For each act except `upset`, a pattern of its wordings with every filling of their slots."""
        values = {slot: _any(map(re.escape, choices)) for slot, choices in self.slot_values.items()}
        values |= {slot: _any(self.persons[by][slot] for by in self.persons) for slot in self.persons["customer"]}
        values |= {"tail": "[0-9]{4}", "item": _any(re.escape(item) for p in self.problems for item in p.items)}

        def expand(template: str) -> str:
            parts = re.split(r"\{(\w+)\}", template)
            return "".join(values[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))

        details = [pair for p in self.problems for pair in p.details] + list(self.general_details)
        values["case"] = _any(expand(case) for p in self.problems for case in p.cases)
        values["answer"] = _any(expand(answer) for _, answer in details)
        openers = dict.fromkeys(_RULES["opened"], _any(map(re.escape, self.openers)) + "?")
        return {
            act: re.compile(openers.get(act, "") + _any(map(expand, texts)), re.I)
            for act, texts in self.customer_wordings.items()
        }


@functools.cache
def sample_grammar(language: str) -> SampleGrammar:
    """The sample grammar of a language.

    Raises:
        InputError: there is none.
    """
    if language not in SAMPLE_LANGUAGES:
        raise InputError(f"data.sample_language={language}: must be one of {', '.join(SAMPLE_LANGUAGES)}")
    tables = read_yaml("csc_train.data", f"sample_grammar.{language}.yaml")
    problems = tuple(ServiceProblem(**problem) for problem in tables.pop("problems"))
    return SampleGrammar(language, problems, **tables)


def generate_sample(count: int, seed: int, language: str = "zh") -> list[Dialogue]:
    """Generate `count` dialogues of about 11 supporter turns.

    Dialogue `i` depends only on language, `seed` and `i`, so a smaller sample is a prefix of a larger one. Ids read
    `sample-{seed}-{index:05d}` in Chinese and `sample-{language}-{seed}-{index:05d}` otherwise; `extra` holds the texts
    `topic`, `problem`, `mood` and `outcome`.

    Raises:
        InputError: `count` is less than 1, or there is no grammar of the language.
    """
    if count < 1:
        raise InputError(f"sample of {count} dialogues: must be at least 1")
    return [_write_dialogue(sample_grammar(language), seed, index) for index in range(count)]


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
        ensure_sample(data.train.path, data.sample_dialogues, data.sample_seed, data.sample_language)


def ensure_sample(path: str | os.PathLike, count: int, seed: int, language: str = "zh") -> bool:
    """Write the sample to `path` (`.jsonl` or `.parquet`) unless the file already holds exactly that sample.

    Returns:
        True if the file was written (replacing another sample), False if it was kept.

    Raises:
        InputError: `count` is less than 1, the suffix is another, the file holds anything but a sample (it is kept), or
            it cannot be written.
    """
    dialogues = generate_sample(count, seed, language)
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


def accuracy_ceiling(dialogues: Iterable[Dialogue], language: str = "zh") -> float:
    """The strategy accuracy of an oracle on these dialogues, in percent of all supporter turns.

    The oracle knows the strategy rule and the earlier turns, and always predicts the most probable strategy. On many
    dialogues no model can reach more. Works on dialogues from a file as well.

    Raises:
        InputError: a dialogue is not from the language's grammar, or there are none.
    """
    grammar = sample_grammar(language)
    hits = [
        actual == max(chances, key=lambda number: chances[number])
        for dialogue in dialogues
        for actual, chances in _replay(grammar, dialogue)
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
        "settled": not {*_RULES["endings"]}.isdisjoint(acts),
        "ready": len(strategies) >= MIN_TURNS,
        "late": len(strategies) >= HURRY_AFTER,
    }
    return {fact for fact, holds in facts.items() if holds}


def _chances(act: str, facts: set[str]) -> dict[int, float]:
    """The chance of each strategy as the answer to `act`."""
    if act in FIXED_STRATEGIES:
        return {FIXED_STRATEGIES[act]: 1.0}
    return next(chances for fact, chances in STRATEGY_CHANCES[act] if not fact or fact in facts)


def _write_dialogue(grammar: SampleGrammar, seed: int, index: int) -> Dialogue:
    # A string seed is the same on every platform and does not correlate neighbouring dialogues.
    rng = random.Random(f"{seed}:{index}")
    problem, mood = rng.choice(grammar.problems), rng.choice(list(grammar.feelings))
    acts, turns = generate_turns(grammar, rng, problem, mood)
    outcome = next(grammar.outcomes[act] for act in acts if act in grammar.outcomes)
    extra = {"topic": problem.topic, "problem": problem.name, "mood": mood, "outcome": outcome}
    # Chinese samples were the first: their ids name no language.
    prefix = ID_PREFIX + ("" if grammar.language == "zh" else f"{grammar.language}-")
    return Dialogue(f"{prefix}{seed}-{index:05d}", tuple(turns), SAMPLE_SOURCE, extra)


def generate_turns(
    grammar: SampleGrammar, rng: random.Random, problem: ServiceProblem, mood: str
) -> tuple[list[str], list[Turn]]:
    """Draw a conversation about `problem` with a customer in `mood` (a key of `feelings`).

    Returns:
        The customer's acts (see `customer_wordings`) in order, and the turns of both speakers.
    """
    writer, calm = _Writer(grammar, rng, problem, mood), mood == next(iter(grammar.feelings))
    acts, strategies, turns = [], [GREETING.number], []
    while True:
        text = writer.reply(strategies[-1], acts[-1] if acts else "")
        turns.append(Turn(Speaker.SUPPORTER, text, STRATEGIES[strategies[-1] - 1]))
        if strategies[-1] == CLOSURE.number:
            return acts, turns
        acts.append(_next_act(rng, acts, strategies, calm))
        facts = _facts(acts, strategies)
        turns.append(Turn(Speaker.CUSTOMER, writer.utterance(acts[-1], facts)))
        strategies.append(_draw(rng, _chances(acts[-1], facts)))


def _next_act(rng: random.Random, acts: list[str], strategies: list[int], calm: bool) -> str:
    facts = _facts(acts, strategies)
    # A request for the identity stays open until it is answered.
    weights = {"identity": 6} | NEXT_ACTS[strategies[-1]] | (_RULES["hurry_weights"] if "late" in facts else {})
    if "upset" in weights and calm:
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

    def __init__(self, grammar: SampleGrammar, rng: random.Random, problem: ServiceProblem, mood: str):
        self.grammar, self.rng, self.problem, self.mood = grammar, rng, problem, mood
        self.unused: dict[tuple, list] = {}
        self.slots = {slot: rng.choice(values) for slot, values in grammar.slot_values.items()}
        self.slots |= {"item": rng.choice(problem.items), "badge": f"{rng.randrange(100, 1000)}"}
        self.slots["tail"] = f"{rng.randrange(10_000):04d}"
        self._ask()

    def reply(self, strategy: int, act: str) -> str:
        if strategy == 4:
            self._ask()
        wordings = self.grammar.supporter_wordings
        if act == "upset":
            return _capitalized(self._fill(self.grammar.feelings[self.mood][1], "supporter"))
        return _capitalized(self._fill(wordings.get(f"{strategy} {act}") or wordings[str(strategy)], "supporter"))

    def utterance(self, act: str, facts: set[str]) -> str:
        wordings = self.grammar.customer_wordings
        if act == "upset":
            feeling = self._pick(self.grammar.feelings[self.mood][0])
            alone, before, after = self.grammar.feeling_joins
            # Before the problem is stated, the product is named with the feeling, so that the topic is clear.
            other = "vague" if "stated" not in facts else self.rng.choice(("why", "how", "doit", ""))
            if not other:
                return _capitalized(alone.format(feeling=feeling))
            text = self._fill(wordings[other], "customer")
            return _capitalized((before if self.rng.random() < 0.5 else after).format(feeling=feeling, text=text))
        opened = act in _RULES["opened"] and self.rng.random() < 0.4
        opener = self.rng.choice(self.grammar.openers) if opened else ""
        return _capitalized(opener + self._fill(wordings[act], "customer"))

    def _ask(self) -> None:
        self.slots["question"], self.slots["answer"] = self._pick(self.problem.details + self.grammar.general_details)

    def _fill(self, wordings: tuple[str, ...], speaker: str) -> str:
        template = self._pick(wordings)
        clauses = {"case": "cases", "fact": "facts", "advice": "advice", "action": "actions"}
        used = [slot for slot in clauses if f"{{{slot}}}" in template]
        inner = {slot: self._pick(getattr(self.problem, clauses[slot])) for slot in used}
        slots = self.slots | self.grammar.persons[speaker] | inner
        # Twice, because a clause has slots itself.
        return template.format_map(slots).format_map(slots)

    def _pick(self, choices: tuple):
        unused = self.unused.setdefault(choices, [])
        if not unused:
            unused += self.rng.sample(choices, len(choices))
        return unused.pop()


def _capitalized(text: str) -> str:
    """The text with a capital letter at the start of each sentence."""
    return re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda match: match.group().upper(), text)


def _replay(grammar: SampleGrammar, dialogue: Dialogue) -> Iterator[tuple[int, dict[int, float]]]:
    """For each supporter turn: its strategy's number, and the chance of each strategy by the strategy rule."""
    acts, strategies = [], []
    for number, turn in enumerate(dialogue.turns, start=1):
        place = f"dialogue {dialogue.id}, turn {number}"
        if turn.speaker is Speaker.CUSTOMER:
            matches = _matching_acts(grammar, turn.text)
            if len(matches) != 1:
                raise InputError(f"{place}: not an utterance of the sample grammar")
            acts += matches
        else:
            chances = _chances(acts[-1], _facts(acts, strategies)) if acts else {GREETING.number: 1.0}
            if turn.strategy.number not in chances:
                raise InputError(f"{place}: not a strategy that the sample grammar allows here")
            yield turn.strategy.number, chances
            strategies.append(turn.strategy.number)


def _matching_acts(grammar: SampleGrammar, text: str) -> list[str]:
    """The acts that `text` may express: exactly one for a customer's utterance of this grammar."""
    if grammar.feeling.search(text):
        return ["upset"]
    return [act for act, pattern in grammar.patterns.items() if pattern.fullmatch(text)]


def _any(expressions: Iterable[str]) -> str:
    return f"(?:{'|'.join(expressions)})"
