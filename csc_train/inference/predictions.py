"""Predictions and failed turns of an evaluation, and the JSONL files that hold them."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import SURROGATE, Dialogue, has_surrogate
from csc_train.errors import InputError
from csc_train.files import digest, file_digest
from csc_train.inference.config import CONTEXTS
from csc_train.jsonl import read_jsonl, write_jsonl
from csc_train.template.reply import Reply, parse_reply

BASELINE_NAMES = ("most frequent strategy", "strategy bigram")
BASE_MODEL = "untrained base"
TRAINED_MODEL = "trained"
"""Names of systems. Tables show the baselines first, then the base model, then the evaluated model."""


@dataclass(frozen=True)
class Prediction:
    """A reply predicted at a supporter turn, with the reference of that turn. A value that is not known is None."""

    dialogue_id: str
    turn: int
    """Index into `Dialogue.turns`."""
    context: str
    """One of `CONTEXTS`."""
    prompt_hash: str
    """SHA-256 (hex) of the prompt."""
    raw_text: str
    """The reply as generated, strategy label included."""
    strategy: int | None
    """Number of the predicted strategy, 1 to 12; None if the text names none or the mode asks for none."""
    response: str
    """The reply without its strategy label."""
    reference_strategy: int
    reference_response: str
    predicts_strategy: bool = True
    """Whether the system chooses the strategy. False in the modes `given` and `reply_only`."""
    config_hash: str = ""
    """`Generator.config_hash` of the system."""
    token_ids: tuple[int, ...] = ()
    """Tokens of the turn, a given strategy included; empty if the system has no tokens."""
    label_log_likelihoods: tuple[float, ...] | None = None
    """Log-likelihoods of the 12 strategy labels at this turn, in nats (see `template.likelihood`)."""
    reference_nll: float | None = None
    """Negative log-likelihood of the reference turn in the reference context, in nats, summed over its tokens."""
    reference_tokens: int | None = None
    """Tokens of that sum: the reply, the end of the turn, and the strategy if the system predicts it."""
    prompt_format: str | None = None
    """Format of the prompt that a server got: `token_ids` or `messages`."""
    served_model: str | None = None
    """Name of the model that the server reports, such as a dated version."""

    @property
    def key(self) -> tuple[str, int]:
        """Dialogue id and turn."""
        return self.dialogue_id, self.turn


@dataclass(frozen=True)
class FailedTurn:
    """A supporter turn that could not be predicted."""

    dialogue_id: str
    turn: int
    context: str
    kind: str
    """Class of the error, such as `timeout`."""
    message: str
    config_hash: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Dialogue id and turn."""
        return self.dialogue_id, self.turn


TurnOutcome = Prediction | FailedTurn


def build_prediction(
    dialogue: Dialogue, turn: int, context: str, raw_text: str, reply: Reply, prompt_hash: str, **details: Any
) -> Prediction:
    """The prediction `reply` for a turn of a dialogue; `details` are further fields of `Prediction`."""
    reference = dialogue.turns[turn]
    return Prediction(
        dialogue_id=dialogue.id,
        turn=turn,
        context=context,
        prompt_hash=prompt_hash,
        raw_text=raw_text,
        strategy=reply.strategy.number if reply.strategy else None,
        response=reply.response,
        reference_strategy=reference.strategy.number,
        reference_response=reference.text,
        **details,
    )


def write_predictions(path: str | os.PathLike, outcomes: Iterable[TurnOutcome]) -> None:
    """Write a JSONL file with one line per turn, atomically."""
    write_jsonl(path, map(asdict, outcomes))


def expected_turns(dialogues: Iterable[Dialogue]) -> list[tuple[str, int]]:
    """(dialogue id, turn) of every supporter turn, in order."""
    return [(dialogue.id, turn) for dialogue in dialogues for turn in dialogue.supporter_turns]


def read_outcomes(path: str | os.PathLike) -> list[TurnOutcome]:
    """Read the predictions and failed turns of a file; an incomplete last line is ignored.

    Raises:
        InputError: the file cannot be read, or a line is not a prediction.
    """
    outcomes = []
    for number, row in read_jsonl(path, allow_torn=True):
        for name in ("token_ids", "label_log_likelihoods"):
            if isinstance(row.get(name), list):
                row[name] = tuple(row[name])
        try:
            outcomes.append(FailedTurn(**row) if "kind" in row else Prediction(**row))
        except TypeError as error:
            raise InputError(f"{path}, line {number}: not a prediction: {error}") from error
    return outcomes


@dataclass(frozen=True)
class RunPredictions:
    """Predictions and failed turns of an evaluation run, by system and context, in the order of its tables."""

    directory: str
    predictions: dict[str, dict[str, list[Prediction]]]
    failures: dict[str, dict[str, list[FailedTurn]]]

    def select_system(self, name: str | None) -> str:
        """Check a system's name; None selects the last system, which is the evaluated one.

        Raises:
            InputError: the run has no such system.
        """
        if name is not None and name not in self.predictions:
            raise InputError(f"{self.directory}: no system {name!r}; choose one of {', '.join(self.predictions)}")
        return name or list(self.predictions)[-1]

    def failure_summary(self) -> str:
        """Number of failed turns by class of error, in words; empty if none failed."""
        kinds = Counter(
            each.kind for contexts in self.failures.values() for turns in contexts.values() for each in turns
        )
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"{kinds.total()} turns failed ({counts})" if kinds else ""


def read_run_predictions(directory: str | os.PathLike) -> RunPredictions:
    """Read all predictions files in a run directory of recipes/evaluate.py.

    Raises:
        InputError: the directory has no predictions, or a file of them cannot be read.
    """
    folder = Path(directory) / "predictions"
    order = (*BASELINE_NAMES, BASE_MODEL)
    names = {path.stem.rpartition("-")[0] for path in folder.glob("*-*.jsonl")}
    if not names:
        raise InputError(f"{directory}: no predictions here: give the run directory of an evaluation")
    run = RunPredictions(str(directory), {}, {})
    for name in sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name)):
        run.predictions[name], run.failures[name] = {}, {}
        for context in CONTEXTS:
            if (path := folder / f"{name}-{context}.jsonl").exists():
                outcomes = read_outcomes(path)
                run.predictions[name][context] = [each for each in outcomes if isinstance(each, Prediction)]
                run.failures[name][context] = [each for each in outcomes if isinstance(each, FailedTurn)]
    return run


def read_external_replies(path: str | os.PathLike, dialogues: Sequence[Dialogue], context: str) -> list[Prediction]:
    """Read the replies that another program made to the supporter turns of these dialogues, in dialogue order.

    Each line is an object with `dialogue_id` (as in the run's dialogues.jsonl), `turn` (from 0, customer turns count)
    and `text`, such as `[情感管理]回复`. The system predicts strategies if any text names one.

    Raises:
        InputError: a line has another form, a supporter turn is missing or there twice, or the file has the name of a
            baseline.
    """
    if Path(path).stem in BASELINE_NAMES:
        raise InputError(f"{path}: the file's name becomes the system's name, and a baseline has it: rename the file")
    replies: dict[tuple[str, int], Prediction] = {}
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    expected = expected_turns(dialogues)
    details = {"prompt_hash": digest(None), "config_hash": file_digest(path)}
    for number, row in read_jsonl(path):
        place = f"{path}, line {number}"
        name, turn, text = row.get("dialogue_id"), row.get("turn"), row.get("text")
        if type(name) not in (str, int) or type(turn) is not int or not isinstance(text, str):
            raise InputError(f"{place}: not an object with dialogue_id, turn (a number) and text")
        if has_surrogate(text):
            raise InputError(f"{place}, text: {SURROGATE}")
        key = str(name), turn  # ids of dialogue files are read as text too
        if key[0] not in by_id or turn not in by_id[key[0]].supporter_turns:
            raise InputError(
                f"{place}: turn {turn} of dialogue {name} is not a supporter turn to predict: see dialogues.jsonl in "
                "the run directory"
            )
        if key in replies:
            raise InputError(f"{place}: turn {turn} of dialogue {name} is there twice")
        replies[key] = build_prediction(by_id[key[0]], turn, context, text, parse_reply(text), **details)
    if missing := [key for key in expected if key not in replies]:
        raise InputError(
            f"{path}: {len(missing)} of {len(expected)} turns are missing, first turn {missing[0][1]} of dialogue "
            f"{missing[0][0]}"
        )
    predicts_strategy = any(each.strategy for each in replies.values())
    return [replace(replies[key], predicts_strategy=predicts_strategy) for key in expected]
