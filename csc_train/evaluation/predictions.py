"""What a system said at each supporter turn, next to what the reference says there."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from csc_train.errors import InputError
from csc_train.files import atomic_path

CONTEXTS = ("reference", "generated")
"""Histories a turn is predicted from: the gold one, or the system's own earlier turns between the gold customer's."""


@dataclass(frozen=True)
class Prediction:
    """One supporter turn, predicted.

    `turn` indexes `Dialogue.turns`. Strategies are numbers 1..12; `strategy` is None where the text could not be
    parsed, or where the mode asks for none. `response` is the reply without its strategy label.
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


def write_predictions(path: str | os.PathLike, predictions: Iterable[Prediction]) -> None:
    """Write one JSONL line per predicted turn, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """Read what `write_predictions` wrote.

    Raises:
        InputError: the file cannot be read, or a line is not a prediction; names the file and line.
    """
    predictions = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    predictions.append(Prediction(**json.loads(line)))
                except (json.JSONDecodeError, TypeError) as error:
                    raise InputError(f"{path}, line {number}: not a prediction: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return predictions
