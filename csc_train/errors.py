"""InputError, the error that users see without a traceback, and checks shared by the configuration schemas."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An input of the user (data, configuration, a path) cannot be used.

    The message is one line: `place: what is wrong: what to do`. Recipes print it without a traceback and exit with
    status 2.
    """


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
