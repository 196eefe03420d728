"""Predictions and failed turns of an evaluation, the JSONL files that hold them, and a store to resume from."""

import contextlib
import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pydantic

from csc_train.data.dialogue import SURROGATE, Dialogue, has_surrogate
from csc_train.errors import InputError
from csc_train.files import digest, file_digest
from csc_train.inference.config import CONTEXTS
from csc_train.jsonl import JsonlLog, read_jsonl, write_jsonl
from csc_train.overrides import resume_hint
from csc_train.template.reply import Reply, parse_reply

BASELINE_NAMES = ("most frequent strategy", "strategy bigram")
BASE_MODEL = "untrained base"
TRAINED_MODEL = "trained"
PLAIN_MODEL = "plain model"
"""Names of systems; another program wrote a plain model. Tables show the baselines first, then the base model, then the
evaluated model."""


@dataclass(frozen=True)
class SupporterTurn:
    """A supporter turn of a dialogue, in a context."""

    dialogue_id: str
    turn: int
    """Index into `Dialogue.turns`."""
    context: str
    """One of `CONTEXTS`."""

    @property
    def key(self) -> tuple[str, int]:
        """Dialogue id and turn."""
        return self.dialogue_id, self.turn


@dataclass(frozen=True)
class Prediction(SupporterTurn):
    """A reply predicted at a supporter turn, with the reference of that turn. A value that is not known is None."""

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
    cut_off: bool = False
    """Whether the reply ended at the limit of tokens."""


@dataclass(frozen=True)
class FailedTurn(SupporterTurn):
    """A supporter turn that could not be predicted."""

    kind: str
    """Class of the error, such as `timeout`."""
    message: str
    config_hash: str = ""


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


def missing_turns(dialogues: Sequence[Dialogue], found: Collection[tuple[str, int]]) -> str:
    """The supporter turns that are not among `found`, in words; empty if there are none."""
    expected = expected_turns(dialogues)
    missing = [key for key in expected if key not in found]
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(expected)} turns are missing, first turn {missing[0][1]} of dialogue {missing[0][0]}"
    )


_OUTCOMES = {failed: pydantic.TypeAdapter(FailedTurn if failed else Prediction) for failed in (False, True)}


def read_outcomes(path: str | os.PathLike, advice: str | None = None) -> list[TurnOutcome]:
    """Read the predictions and failed turns of a file; an incomplete last line is ignored.

    Args:
        advice: the way to go on from a line that is not a prediction; None leaves such a line out (see `read_jsonl`).

    Raises:
        InputError: the file cannot be read, or a line is not a prediction.
    """

    def parse(row: dict[str, Any]) -> TurnOutcome:
        return _OUTCOMES["kind" in row].validate_python(row)

    return [outcome for _, outcome in read_jsonl(path, parse, advice=advice, allow_torn=True)]


class PredictionStore(contextlib.AbstractContextManager):
    """The outcomes of one system in one context: the file `path`, and part files beside it.

    Each process appends outcomes to its own part, one line each; the last line of a turn counts. `merge` joins the
    parts into `path` in the order of the dialogues. The result does not depend on interruptions or process numbers. A
    bad line is said, and its turn predicted again.

    Attributes:
        path: file of all outcomes.
        earlier: predictions of earlier runs, by (dialogue id, turn). Failed turns are left out, to be tried again.

    Args:
        config_hash: see `Generator.config_hash`.
        rank: number of this process.
        read: reads the rows of a file: outcomes, or other dataclasses with a `key` and a `config_hash`.

    Raises:
        InputError: a file cannot be read or written, or the outcomes come from other settings.
    """

    def __init__(self, path: str | os.PathLike, config_hash: str, rank: int = 0, read: Callable = read_outcomes):
        self.path = Path(path)
        self._config_hash, self._read_rows = config_hash, read
        self.earlier = {key: row for key, row in self._read().items() if not isinstance(row, FailedTurn)}
        self._log = JsonlLog(self.path.with_name(f"{self.path.name}.part-{rank:05}"))
        self._log.open()

    def __exit__(self, *_) -> None:
        self._log.close()

    def add(self, outcome: Any) -> None:
        """Append an outcome. It survives the end of this process, but not a loss of power.

        Raises:
            InputError: the part cannot be written.
        """
        self._log.append(asdict(outcome))

    def merge(self, dialogues: Sequence[Dialogue]) -> list[FailedTurn]:
        """Join all parts into `path`. One process calls this after every process closed its part.

        Args:
            dialogues: the dialogues of all processes.

        Returns:
            The failed turns.
        """
        return self.merge_rows(expected_turns(dialogues))

    def merge_rows(self, expected: Sequence[Any]) -> list[FailedTurn]:
        """As `merge`, for the keys of all rows."""
        outcomes = self._read()
        missing = [key for key in expected if key not in outcomes]
        assert not missing, f"{len(missing)} of {len(expected)} turns are neither predicted nor failed: {missing[0]}"
        merged = [outcomes[key] for key in expected]
        write_predictions(self.path, merged)
        for part in _parts(self.path):
            part.unlink()
        return [outcome for outcome in merged if isinstance(outcome, FailedTurn)]

    def _read(self) -> dict[Any, Any]:
        """The latest row of each key; a failure never replaces a prediction."""
        outcomes: dict[Any, Any] = {}
        for file in [self.path, *_parts(self.path)] if self.path.exists() else _parts(self.path):
            for outcome in self._read_rows(file):
                if outcome.config_hash != self._config_hash:
                    raise InputError(
                        f"{self.path}: holds predictions of other settings ({outcome.config_hash[:12]}, now "
                        f"{self._config_hash[:12]}): choose another run.directory, or run.if_exists=replace"
                    )
                if not isinstance(outcome, FailedTurn) or not isinstance(outcomes.get(outcome.key), Prediction):
                    outcomes[outcome.key] = outcome
        return outcomes


def is_complete(path: Path, dialogues: Sequence[Dialogue]) -> bool:
    """Whether a file has a prediction for every supporter turn of these dialogues, and no parts are left."""
    if not is_merged(path):
        return False
    return not missing_turns(dialogues, {each.key for each in read_outcomes(path) if isinstance(each, Prediction)})


def is_merged(path: Path) -> bool:
    """Whether the file of a `PredictionStore` is there, and no parts are left."""
    return path.exists() and not _parts(path)


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*"))


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

    @property
    def failed_kinds(self) -> list[str]:
        """The class of error of each failed turn."""
        return [each.kind for contexts in self.failures.values() for turns in contexts.values() for each in turns]


def describe_kinds(kinds: Iterable[str]) -> str:
    """How many there are of each, such as "2 cut_off, 1 empty"; the most frequent first. It also takes counts."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


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
                outcomes = read_outcomes(path, f"delete the line; {resume_hint(directory)} predicts its turn again")
                run.predictions[name][context] = [each for each in outcomes if isinstance(each, Prediction)]
                run.failures[name][context] = [each for each in outcomes if isinstance(each, FailedTurn)]
    return run


class _ExternalReply(pydantic.BaseModel, strict=True):
    dialogue_id: str | int  # ids of dialogue files are read as text too
    turn: int
    text: str


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
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    details = {"prompt_hash": digest(None), "config_hash": file_digest(path)}

    def parse(row: dict[str, Any]) -> Prediction:
        reply = _ExternalReply.model_validate(row)
        name, turn, text = str(reply.dialogue_id), reply.turn, reply.text
        if has_surrogate(text):
            raise ValueError(f"field text: {SURROGATE}")
        if name not in by_id or turn not in by_id[name].supporter_turns:
            raise ValueError(
                f"turn {turn} of dialogue {name} is not a supporter turn to predict: see dialogues.jsonl in the run "
                "directory"
            )
        return build_prediction(by_id[name], turn, context, text, parse_reply(text), **details)

    replies = {
        reply.key: reply
        for _, reply in read_jsonl(path, parse, key=lambda each: f"turn {each.turn} of dialogue {each.dialogue_id}")
    }
    if missing := missing_turns(dialogues, replies):
        raise InputError(f"{path}: {missing}")
    predicts_strategy = any(each.strategy for each in replies.values())
    return [replace(replies[key], predicts_strategy=predicts_strategy) for key in expected_turns(dialogues)]
