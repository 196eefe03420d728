"""What a system said at each supporter turn, next to what the reference says there."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from csc_train.data.dialogue import SURROGATE, Dialogue, has_surrogate
from csc_train.errors import InputError
from csc_train.files import digest, file_digest
from csc_train.inference.config import CONTEXTS
from csc_train.jsonl import read_jsonl, write_jsonl
from csc_train.template.reply import parse_reply

BASELINE_NAMES = ("most frequent strategy", "strategy bigram")
BASE_MODEL = "untrained base"
TRAINED_MODEL = "trained"
"""Names of systems. In tables the baselines come first, then the base model, then what is evaluated."""


@dataclass(frozen=True)
class Prediction:
    """One supporter turn, predicted.

    `turn` indexes `Dialogue.turns`. Strategies are numbers 1..12; `strategy` is None where the text could not be
    parsed, or where the mode asks for none. `response` is the reply without its strategy label. `predicts_strategy` is
    False where the system does not choose the strategy itself: it is handed in, or left out.

    `config_hash` is the `Generator.config_hash` of the system. `ids` are the tokens of the turn, where the system works
    on tokens: those it generated, after those of a strategy that was handed in. `label_log_likelihoods` are those of
    the 12 labels at this turn, in their order, in nats (see `template.likelihood`). `reference_nll` is the sum of
    -log p in nats over the `reference_tokens` tokens of the reference turn in its own history (the strategy's where the
    system predicts one, the reply's, the end of the turn). `prompt_format` says what a server was sent, of which
    `prompt_hash` is the hash: token `ids` or chat `messages`; `served_model` is the model that it says answered, such
    as the version behind a name. Each is None where it is not known.
    """

    dialogue_id: str
    turn: int
    context: str
    prompt_hash: str
    raw_text: str
    strategy: int | None
    response: str
    reference_strategy: int
    reference_response: str
    predicts_strategy: bool = True
    config_hash: str = ""
    ids: tuple[int, ...] = ()
    label_log_likelihoods: tuple[float, ...] | None = None
    reference_nll: float | None = None
    reference_tokens: int | None = None
    prompt_format: str | None = None
    served_model: str | None = None


@dataclass(frozen=True)
class FailedTurn:
    """One supporter turn that could not be predicted: `kind` is the class of what went wrong, for counting."""

    dialogue_id: str
    turn: int
    context: str
    kind: str
    message: str
    config_hash: str = ""


TurnOutcome = Prediction | FailedTurn


def write_predictions(path: str | os.PathLike, outcomes: Iterable[TurnOutcome]) -> None:
    """Write one JSONL line per turn, atomically."""
    write_jsonl(path, map(asdict, outcomes))


def expected_turns(dialogues: Iterable[Dialogue]) -> list[tuple[str, int]]:
    """The (dialogue id, turn) of every turn that is to be predicted, in order."""
    return [(dialogue.id, turn) for dialogue in dialogues for turn in dialogue.supporter_turns]


def read_outcomes(path: str | os.PathLike) -> list[TurnOutcome]:
    """Read the lines of a predictions file, failed turns included; a last line that was not written to its end is not.

    Raises:
        InputError: the file cannot be read, or a line is not a prediction; names the file and line.
    """
    outcomes = []
    for number, row in read_jsonl(path, allow_torn=True):
        for name in ("ids", "label_log_likelihoods"):
            if isinstance(row.get(name), list):
                row[name] = tuple(row[name])
        try:
            outcomes.append(FailedTurn(**row) if "kind" in row else Prediction(**row))
        except TypeError as error:
            raise InputError(f"{path}, line {number}: not a prediction: {error}") from error
    return outcomes


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """The turns of a predictions file that were predicted (see `read_outcomes`)."""
    return [outcome for outcome in read_outcomes(path) if isinstance(outcome, Prediction)]


def read_run(directory: str | os.PathLike) -> dict[str, dict[str, list[Prediction]]]:
    """The predictions in a run directory of recipes/evaluate.py, by system and context, in the order of its tables.

    Raises:
        InputError: there are none, or a file of them cannot be read.
    """
    found = _read_run(directory, Prediction)
    if not found:
        raise InputError(f"{directory}: holds no predictions; give the run directory of an evaluation")
    return found


def read_failures(directory: str | os.PathLike) -> dict[str, dict[str, list[FailedTurn]]]:
    """As `read_run`, the turns that failed."""
    return _read_run(directory, FailedTurn)


def failed_turns(directory: str | os.PathLike) -> str:
    """How many turns of a run failed, by class, in words; empty where none did."""
    found = read_failures(directory).values()
    kinds = Counter(each.kind for contexts in found for failures in contexts.values() for each in failures)
    if not kinds:
        return ""
    return f"{kinds.total()} turns failed ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


def _read_run(directory: str | os.PathLike, kind: type[TurnOutcome]) -> dict[str, dict[str, list]]:
    folder = Path(directory) / "predictions"
    order = (*BASELINE_NAMES, BASE_MODEL)
    names = {path.stem.rpartition("-")[0] for path in folder.glob("*-*.jsonl")}
    names = sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {
        name: {
            context: [outcome for outcome in read_outcomes(path) if isinstance(outcome, kind)]
            for context in CONTEXTS
            if (path := folder / f"{name}-{context}.jsonl").exists()
        }
        for name in names
    }


def select_system(saved: Mapping[str, object], directory: str, name: str | None) -> str:
    """The system called `name` among those that a run saved; the one that was evaluated, the last, if not given.

    Raises:
        InputError: there is none of that name.
    """
    if name is not None and name not in saved:
        raise InputError(f"{directory}: has no system {name!r}. Known: {', '.join(saved)}")
    return name or list(saved)[-1]


def read_external_replies(path: str | os.PathLike, dialogues: Sequence[Dialogue], context: str) -> list[Prediction]:
    """Replies made elsewhere to the supporter turns of these dialogues, in dialogue order.

    Each line is an object with `dialogue_id` (of dialogues without one a part of their fingerprint, as in the run's
    dialogues.jsonl), `turn` (from 0, counting the customer's turns too) and `text`, such as `[情感管理]回复`; where no
    text of the file names a strategy, the system is taken not to predict any.

    Raises:
        InputError: a line is not of this form, the file does not hold every supporter turn exactly once, or it is named
            like a baseline, whose predictions it would replace.
    """
    if Path(path).stem in BASELINE_NAMES:
        raise InputError(f"{path}: the system is named after the file, and a baseline has that name: rename it")
    texts: dict[tuple[str, int], str] = {}
    known = set(expected_turns(dialogues))
    for number, row in read_jsonl(path):
        name, turn = row.get("dialogue_id"), row.get("turn")
        if type(name) not in (str, int) or type(turn) is not int or not isinstance(row.get("text"), str):
            raise InputError(f"{path}, line {number}: not an object with dialogue_id, turn (a number) and text")
        if has_surrogate(row["text"]):
            raise InputError(f"{path}, line {number}, text: {SURROGATE}")
        key = str(name), turn  # as dialogue files are read
        if key not in known:
            raise InputError(
                f"{path}, line {number}: turn {key[1]} of dialogue {key[0]} is no supporter turn to predict; those to "
                f"predict are in dialogues.jsonl of the run directory"
            )
        if key in texts:
            raise InputError(f"{path}, line {number}: turn {key[1]} of dialogue {key[0]} is there twice")
        texts[key] = row["text"]
    if missing := sorted(known - texts.keys()):
        raise InputError(
            f"{path}: lacks {len(missing)} of {len(known)} turns, the first is turn {missing[0][1]} of dialogue "
            f"{missing[0][0]}"
        )
    origin = file_digest(path)
    replies = {key: parse_reply(text) for key, text in texts.items()}
    predicts_strategy = any(reply.strategy for reply in replies.values())
    return [
        Prediction(
            dialogue_id=dialogue.id,
            turn=turn,
            context=context,
            prompt_hash=digest(None),
            raw_text=texts[dialogue.id, turn],
            strategy=reply.strategy.number if reply.strategy else None,
            response=reply.response,
            reference_strategy=dialogue.turns[turn].strategy.number,
            reference_response=dialogue.turns[turn].text,
            predicts_strategy=predicts_strategy,
            config_hash=origin,
        )
        for dialogue in dialogues
        for turn in dialogue.supporter_turns
        for reply in [replies[dialogue.id, turn]]
    ]
