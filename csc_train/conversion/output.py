"""What a conversion writes: the dialogues, and beside them the records left out, the counts and the model's answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csc_train.conversion.config import ConvertConfig
from csc_train.conversion.convert import ConversionReport
from csc_train.data.dialogue import Dialogue
from csc_train.data.readers import write_dialogues
from csc_train.errors import InputError
from csc_train.files import os_errors, write_json
from csc_train.jsonl import write_jsonl


@dataclass(frozen=True)
class Output:
    """The files of a conversion. Names of those beside the dialogues begin with `_`, so no folder is read with them."""

    dialogues: Path
    rejected: Path
    """The records that fit nothing, as JSONL of file, row and reason."""
    report: Path
    """The counts, as JSON."""
    answers: Path
    """The answers of the model that labels; a repeated conversion does not ask again."""

    def write(self, dialogues: Sequence[Dialogue], report: ConversionReport) -> None:
        """Write all but the answers, each file atomically and the dialogues last.

        Raises:
            InputError: a file cannot be written.
        """
        write_json(self.report, report.as_json())
        if report.rejected:
            write_jsonl(self.rejected, report.rejected, ascii_only=True)
        else:
            with os_errors(self.rejected, "cannot remove"):
                self.rejected.unlink(missing_ok=True)
        write_dialogues(self.dialogues, dialogues)


def open_output(config: ConvertConfig) -> Output:
    """The files to write, before anything is read.

    Raises:
        InputError: the output exists and is not to be replaced, is a folder, or is the input.
    """
    path = Path(config.output)
    if path.resolve() in [Path(each).resolve() for each in config.input]:
        raise InputError(f"output={path}: is the input: choose another file")
    if path.is_dir():
        raise InputError(f"output={path}: is a folder: name a file in it")
    if path.exists() and config.if_exists == "error":
        raise InputError(f"output={path}: exists: choose another file, or say if_exists=replace")
    return Output(
        path, *(path.with_name(f"_{path.stem}.{name}") for name in ("rejected.jsonl", "report.json", "answers.jsonl"))
    )
