"""Tables that map the labels of other data sets to the 12 strategies."""

import os
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csc_train.data.strategies import Strategy, nearest_label, parse_strategy
from csc_train.errors import InputError
from csc_train.files import os_errors
from csc_train.invisible import strip_invisible

FIELDS = {"strategy", "reason"}


def normalize_label(label: str) -> str:
    """A label without outer brackets and white space, in lower case: as it is looked up."""
    return strip_invisible(strip_invisible(label).strip("[]【】")).casefold()


def read_table(path: str | os.PathLike) -> dict[str, Strategy | None]:
    """Read a YAML table: `label: {strategy, reason}`; `strategy` is null for a label that says nothing.

    Raises:
        InputError: the file cannot be read, a label stands twice, or an entry is incomplete or names an unknown
            strategy; names file and label.
    """
    with os_errors(path, "cannot read"):
        content = Path(path).read_bytes()
    try:
        rows = OmegaConf.to_container(OmegaConf.create(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}: write it in UTF-8") from error
    except yaml.MarkedYAMLError as error:  # one with a key twice, too
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {error.problem}: mend the YAML") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}: mend the YAML") from error
    if not isinstance(rows, dict) or not rows:
        raise InputError(f"{path}: no table: give rows such as `Question: {{strategy: PR, reason: ...}}`")
    table: dict[str, Strategy | None] = {}
    for label, row in rows.items():
        place = f"{path}, key {str(label)!r}"
        if not isinstance(row, dict) or row.keys() != FIELDS:
            found = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise InputError(f"{place}: found {found}: give strategy and reason")
        if not isinstance(row["reason"], str) or not row["reason"].strip():
            raise InputError(f"{place}: reason is missing: give a sentence")
        name = normalize_label(str(label))
        if name in table:
            raise InputError(f"{place}: stands twice, in another spelling: keep one")
        try:
            table[name] = None if row["strategy"] is None else parse_strategy(str(row["strategy"]))
        except ValueError as error:
            raise InputError(f"{place}: {error}: choose one of ours.{nearest_label(str(row['strategy']))}") from error
    return table


def find_strategy(table: dict[str, Strategy | None], label: str) -> Strategy | None:
    """The strategy of a label, by the table or else by its name or code among ours; None if it says nothing.

    Raises:
        ValueError: nobody knows the label.
    """
    name = normalize_label(label)
    return table[name] if name in table else parse_strategy(strip_invisible(label).strip("[]【】"))
