"""InputError, the error that users see without a traceback, and checks shared by the configuration schemas."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

LONGEST_PATH = 4096
"""Characters of the longest path on Linux (PATH_MAX)."""


class InputError(ValueError):
    """An input of the user (data, configuration, a path) cannot be used.

    The message is one line: `place: what is wrong: what to do`. Recipes print it without a traceback and exit with
    status 2. A word in it that is longer than any path, such as a text in the place of a name, is cut.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(rf"(\S{{200}})\S{{{LONGEST_PATH - 200},}}", r"\1...", message))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the error that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class ResumableError(InputError):
    """An InputError that ends a run which can be resumed.

    Attributes:
        needs: the overrides that the resumed run needs.
    """

    def __init__(self, message: str, needs: str):
        super().__init__(message)
        self.needs = needs


def suggestion(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the known name nearest to `name`, or an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise an InputError unless the configuration value `value` of `key` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise InputError(f"{key}={value}: choose one of {', '.join(allowed)}.{suggestion(str(value), allowed)}")


def check_range(key: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Raise an InputError unless the configuration value `value` of `key` is None or lies in [low, high]."""
    if value is not None and not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise InputError(f"{key}={value}: must be {bounds}")


def check_fields(
    prefix: str,
    config: Any,
    *names: str,
    low: float = float("-inf"),
    high: float = float("inf"),
    choices: Iterable[str] | None = None,
) -> None:
    """Check fields of a configuration section; null passes, and of a list or mapping each value is checked.

    The `--help` of the recipes reads the limits from these calls (see `csc_train.config.explain`).

    Args:
        prefix: place of the section, such as `trainer.`; messages begin with it and the field's name.
        config: the section.
        names: the fields.
        low: the smallest value.
        high: the greatest value.
        choices: the allowed values, instead of a range.

    Raises:
        InputError: a value is not allowed.
    """
    for name in names:
        value, key = getattr(config, name), prefix + name
        entries = [(key, each) for each in (value if isinstance(value, list) else [value])]
        if isinstance(value, dict):
            entries = [(f"{key}.{inner}", each) for inner, each in value.items()]
        for place, each in entries:
            if choices is None:
                check_range(place, each, low, high)
            elif each is not None:
                check_choice(place, each, choices)


def check_order(prefix: str, config: Any, smaller: str, larger: str) -> None:
    """Raise an InputError if a field of a section is larger than another one, which names both."""
    low, high = getattr(config, smaller), getattr(config, larger)
    if low > high:
        raise InputError(f"{prefix}{smaller}={low}: must be at most {prefix}{larger}={high}")
