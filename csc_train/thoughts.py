"""The thoughts that a reasoning model leaves before its answer."""

from csc_train.invisible import strip_invisible


def without_thoughts(text: str) -> str:
    """A text after its thoughts, `<think>...</think>`; empty if they do not end."""
    _, ended, answer = text.rpartition("</think>")
    if ended:
        return answer.lstrip()
    return "" if strip_invisible(text).startswith("<think>") else text
