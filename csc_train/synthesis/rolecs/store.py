"""All that a synthesis has paid for, in one SQLite file: calls, answers, turns, verdicts, each committed as it comes.

In WAL mode with synchronous=NORMAL a committed row survives the end of the process, however it ends; a loss of power
may take the last moments, never the file. No key is ever written: requests are kept as checksums of their prompts.
"""

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.llm.client import RequestAttempt
from csc_train.synthesis.filters.rules import FilterVerdict
from csc_train.synthesis.rolecs.backends import RoleCall
from csc_train.synthesis.rolecs.personas import DialogueSlot

OPEN, FINISHED, ACCEPTED, REJECTED, FAILED = "open", "finished", "accepted", "rejected", "failed"
"""States of a dialogue. finished: every rule that looks at it alone keeps it; whether it repeats another is decided in
the order of the quotas. failed: an answer could not be had."""
SETTLED = (ACCEPTED, REJECTED, FAILED)

_TABLES = """
CREATE TABLE recipes (id TEXT PRIMARY KEY, content TEXT NOT NULL, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE units (
    id TEXT PRIMARY KEY, recipe TEXT NOT NULL, persona TEXT NOT NULL, topic TEXT NOT NULL, mood TEXT NOT NULL,
    replicate INTEGER NOT NULL, status TEXT NOT NULL, extra TEXT
) WITHOUT ROWID;
CREATE TABLE calls (
    owner TEXT NOT NULL, key TEXT NOT NULL, number INTEGER NOT NULL, recipe TEXT NOT NULL, role TEXT NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, failure TEXT, PRIMARY KEY (owner, key, number)
) WITHOUT ROWID;
CREATE TABLE answers (
    owner TEXT NOT NULL, key TEXT NOT NULL, role TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE turns (
    unit TEXT NOT NULL, number INTEGER NOT NULL, speaker TEXT NOT NULL, strategy INTEGER, text TEXT NOT NULL,
    PRIMARY KEY (unit, number)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    unit TEXT NOT NULL, number INTEGER NOT NULL, rule TEXT NOT NULL, keep INTEGER NOT NULL, reason TEXT NOT NULL,
    detail TEXT NOT NULL, PRIMARY KEY (unit, number)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class TokenUsage:
    """What calls took; failed attempts are among them."""

    calls: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    latency_s: float

    @property
    def tokens(self) -> int:
        """Of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens


class SynthesisStore:
    """The file of a synthesis, opened for one recipe.

    Attributes:
        recipe: the hash of the recipe, which is part of every unit's id.
    """

    def __init__(self, path: str | os.PathLike, recipe: dict[str, Any], new_run: bool = False):
        """Open the file, or begin it.

        Args:
            path: the file, or `:memory:`.
            recipe: all that decides which dialogues come about, as plain values.
            new_run: begin anew under a recipe that is not the file's; what was made under others stays in the file.

        Raises:
            InputError: the file holds another recipe and `new_run` is false, another process writes to it, or it is
                not such a file.
        """
        self.recipe = digest(recipe)
        with contextlib.suppress(OSError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                self._db = stack.enter_context(
                    contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0.2))
                )
                # One process at a time: two would ask, and pay for, the same questions.
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA wal_autocheckpoint=10000")
                self._begin(recipe, new_run)
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    raise InputError(f"{path}: another process is at work on it") from error
                raise InputError(f"cannot open {path}: {error}") from error
            except sqlite3.DatabaseError as error:
                raise InputError(f"{path} is not a synthesis store: {error}") from error
            stack.pop_all()

    def _begin(self, recipe: dict[str, Any], new_run: bool) -> None:
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'recipes'").fetchone():
            self._write(*((statement, ()) for statement in _TABLES.split(";") if statement.strip()))
        rows = self._db.execute("SELECT id, content FROM recipes ORDER BY number").fetchall()
        if rows and rows[-1][0] == self.recipe:
            return
        if rows and not new_run:
            raise InputError(
                f"the recipe is not the one that this run began with ({_changed(json.loads(rows[-1][1]), recipe)}): "
                "choose another run.directory, or new_run=true to begin anew in this one"
            )
        content = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
        # A recipe that comes back is the last one again.
        insert = "INSERT OR REPLACE INTO recipes SELECT ?, ?, coalesce(max(number), 0) + 1 FROM recipes"
        self._write((insert, (self.recipe, content)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _write(self, *statements: tuple[str, tuple]) -> None:
        """Execute statements, all of them or none; they are committed when this returns."""
        if len(statements) == 1:
            self._db.execute(*statements[0])
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                self._db.execute(*statement)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def attempted(self, call: RoleCall, model: str, attempt: RequestAttempt) -> None:
        """Record one request, answered or not."""
        # Numbered by what is there: a call that was interrupted and is made again has earlier attempts.
        statement = (
            "INSERT INTO calls SELECT ?1, ?2, (SELECT count(*) FROM calls WHERE owner = ?1 AND key = ?2), "
            "?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11"
        )
        values = (
            call.owner, call.key, self.recipe, call.role, model, call.prompt, call.seed,
            attempt.prompt_tokens, attempt.completion_tokens, attempt.latency_s, attempt.kind,
        )  # fmt: skip
        self._write((statement, values))

    def answered(self, call: RoleCall, answer: dict[str, Any], turn: Turn | None = None, number: int = 0) -> None:
        """Record the answer to a call, and the turn (from 0) that it made."""
        values = (call.owner, call.key, call.role, json.dumps(answer, ensure_ascii=False))
        statements = [("INSERT INTO answers VALUES (?, ?, ?, ?)", values)]
        if turn is not None:
            strategy = turn.strategy.number if turn.strategy else None
            values = (call.owner, number, turn.speaker.value, strategy, turn.text)
            statements.append(("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", values))
        self._write(*statements)

    def answer(self, owner: str, key: str) -> dict[str, Any] | None:
        """A recorded answer."""
        row = self._db.execute("SELECT answer FROM answers WHERE owner = ? AND key = ?", (owner, key)).fetchone()
        return json.loads(row[0]) if row else None

    def count_answers(self, owner: str) -> int:
        """How many answers are recorded for a dialogue or persona."""
        return self._db.execute("SELECT count(*) FROM answers WHERE owner = ?", (owner,)).fetchone()[0]

    def turns(self, unit: str) -> tuple[Turn, ...]:
        """The recorded turns of a dialogue."""
        rows = self._db.execute("SELECT speaker, strategy, text FROM turns WHERE unit = ? ORDER BY number", (unit,))
        return tuple(
            Turn(Speaker(speaker), text, STRATEGIES[strategy - 1] if strategy else None)
            for speaker, strategy, text in rows
        )

    def status(self, unit: str) -> str | None:
        """The state of a dialogue; None where it was never begun."""
        row = self._db.execute("SELECT status FROM units WHERE id = ?", (unit,)).fetchone()
        return row[0] if row else None

    def begin_unit(self, unit: DialogueSlot) -> None:
        """Record that a dialogue is begun."""
        values = (unit.id, self.recipe, unit.persona, unit.topic, unit.mood, unit.replicate, OPEN)
        self._write(("INSERT INTO units VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", values))

    def judged(
        self, unit: str, status: str, verdicts: Sequence[FilterVerdict], extra: dict[str, Any] | None = None
    ) -> None:
        """Record what rules said about a dialogue, the state that it is in now, and what is known of it besides."""
        (before,) = self._db.execute("SELECT count(*) FROM verdicts WHERE unit = ?", (unit,)).fetchone()
        statements = [
            ("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", (unit, number, *vars(verdict).values()))
            for number, verdict in enumerate(verdicts, start=before)
        ]
        known = None if extra is None else json.dumps(extra, ensure_ascii=False)
        values = (status, known, unit)
        self._write(*statements, ("UPDATE units SET status = ?, extra = coalesce(?, extra) WHERE id = ?", values))

    def dialogue(self, unit: str, source: str) -> Dialogue:
        """A dialogue that rules have looked at."""
        row = self._db.execute("SELECT persona, topic, mood, extra FROM units WHERE id = ?", (unit,)).fetchone()
        known = dict(zip(("persona", "topic", "mood"), row[:3], strict=True))
        return Dialogue(unit, self.turns(unit), source, known | json.loads(row[3]))

    def verdicts(self) -> list[list[FilterVerdict]]:
        """What rules said about each dialogue of the recipe that is not under way."""
        rows = self._db.execute(
            "SELECT unit, rule, keep, reason, detail FROM verdicts JOIN units ON units.id = unit "
            "WHERE recipe = ? ORDER BY unit, number", (self.recipe,)
        )  # fmt: skip
        grouped = itertools.groupby(rows, key=lambda row: row[0])
        return [[FilterVerdict(rule, bool(keep), *why) for _, rule, keep, *why in verdicts] for _, verdicts in grouped]

    def spent(self) -> dict[str, TokenUsage]:
        """What the calls of the recipe took, by role."""
        rows = self._db.execute(
            "SELECT role, count(*), sum(failure IS NOT NULL), sum(prompt_tokens), sum(completion_tokens), "
            "sum(latency_s) FROM calls WHERE recipe = ? GROUP BY role ORDER BY role", (self.recipe,)
        )  # fmt: skip
        return {role: TokenUsage(*sums) for role, *sums in rows}

    def counts(self) -> dict[str, int]:
        """How many dialogues of the recipe are in which state."""
        rows = self._db.execute("SELECT status, count(*) FROM units WHERE recipe = ? GROUP BY status", (self.recipe,))
        return dict(rows.fetchall())

    def rejected(self) -> list[dict[str, Any]]:
        """The dialogues of the recipe that did not pass, with the rule that says so, in the order of their ids."""
        rows = self._db.execute(
            "SELECT id, persona, topic, mood, status, rule, reason, detail FROM units JOIN verdicts ON id = unit "
            "WHERE recipe = ? AND NOT keep ORDER BY id, number", (self.recipe,)
        )  # fmt: skip
        names = [column[0] for column in rows.description]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def panels(self) -> list[list[dict[str, Any]]]:
        """What judges answered about each dialogue of the recipe."""
        rows = self._db.execute(
            "SELECT owner, answer FROM answers JOIN units ON id = owner "
            "WHERE recipe = ? AND role LIKE 'rolecs_check%' ORDER BY owner, role", (self.recipe,)
        )  # fmt: skip
        return [[json.loads(answer) for _, answer in panel] for _, panel in itertools.groupby(rows, key=lambda r: r[0])]


def _changed(before: Any, now: Any, name: str = "") -> str:
    """The first value in which two recipes differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
        return _changed(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {before!r} then, {now!r} now"
