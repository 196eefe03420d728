"""The filter funnel: how many conversations each rule dropped, and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from csc_train.synthesis.filters.rules import FilterVerdict
from csc_train.terminal_tables import result_table


def filter_funnel(conversations: Iterable[Sequence[FilterVerdict]], rules: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Counts by rule, in the order of application.

    A conversation counts for every rule up to the first that dropped it.

    Args:
        conversations: the verdicts about each conversation, in order.
        rules: all rules in order, so that rules which no conversation reached are listed as well.

    Returns:
        A row per rule: `rule`, the counts `entered`, `dropped` and `kept`, and `reasons` with their counts.
    """
    entered: Counter[str] = Counter(dict.fromkeys(rules, 0))
    reasons: dict[str, Counter[str]] = {}
    for verdicts in conversations:
        for verdict in verdicts:
            entered[verdict.rule] += 1
            if not verdict.keep:
                reasons.setdefault(verdict.rule, Counter())[verdict.reason] += 1
                break
    rows = []
    for rule, count in entered.items():
        why = reasons.get(rule, Counter())
        row = {"rule": rule, "entered": count, "dropped": why.total(), "kept": count - why.total()}
        rows.append(row | {"reasons": dict(why.most_common())})
    return rows


def funnel_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows of `filter_funnel` as a table for the terminal."""
    header = ("rule", "entered", "dropped", "kept", "reasons")
    why = ["; ".join(f"{count} {reason}" for reason, count in row["reasons"].items()) for row in rows]
    cells = [[*(row[name] for name in header[:4]), text] for row, text in zip(rows, why, strict=True)]
    return result_table(title, header, cells, numbers=range(1, 4))
