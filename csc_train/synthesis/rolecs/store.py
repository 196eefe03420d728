"""The SQLite file of a synthesis: calls, answers, turns and verdicts, each committed as soon as it exists.

In WAL mode with synchronous=NORMAL, a committed row survives any end of the process. A loss of power may take the last
moments, but does not break the file. Keys are never stored, and prompts only as hashes.
"""

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.files import digest, os_errors
from csc_train.llm.client import RequestAttempt
from csc_train.synthesis.filters.rules import FilterVerdict
from csc_train.synthesis.rolecs.backends import RoleCall
from csc_train.synthesis.rolecs.personas import DialogueAttempt
from csc_train.templates import read_text

STORE_FILE = "synthesis.db"
"""The file, in a run directory."""
OPEN, FINISHED, ACCEPTED, REJECTED, FAILED = "open", "finished", "accepted", "rejected", "failed"
"""Statuses of a dialogue. finished: passed every rule except near-duplicates, which follows the order of the quotas.
failed: an answer is missing."""
SETTLED = (ACCEPTED, REJECTED, FAILED)


class SynthesisStore:
    """The file of a synthesis, opened for one group of settings.

    Attributes:
        settings_hash: the hash of the settings, which is part of every dialogue's id.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], new_run: bool = False):
        """Open or create the file.

        Args:
            path: the file, or `:memory:`.
            settings: everything that determines the dialogues, as plain values.
            new_run: accept settings other than the file's; its earlier dialogues stay in the file.

        Raises:
            InputError: the file has other settings and `new_run` is false, another process uses it, or it is no such
                file.
        """
        self.settings_hash = digest(settings)
        self._path = path
        with os_errors(path, "cannot write"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with self.errors():
                self._db = stack.enter_context(
                    contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0.2))
                )
                self._db.row_factory = sqlite3.Row
                # One process at a time: two would pay for the same answers.
                self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA wal_autocheckpoint=10000")
                if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(found)
                self._db.executescript(read_text("csc_train.synthesis.rolecs", "store.sql"))
            self._open_settings(settings, new_run)
            stack.pop_all()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of SQLite, and of content that this program did not write, into an InputError.

        Raises:
            InputError: another process uses the file, it cannot be written (disk full, no permission), or is damaged.
        """
        try:
            yield
        except (sqlite3.Error, ValueError, LookupError, TypeError) as error:
            kind = getattr(error, "sqlite_errorname", "")
            reason = " ".join(str(error).split())
            if kind.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                message = "another process uses it: wait for its end"
            elif kind.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
                message = f"cannot write: {reason}: make room or make it writable, then resume; all answers are kept"
            else:
                message = f"is damaged: {reason[:200]}: restore a copy of it, or choose another run.directory"
            raise InputError(f"{self._path}: {message}") from error

    def _open_settings(self, settings: dict[str, Any], new_run: bool) -> None:
        rows = self._rows("SELECT hash, content FROM settings ORDER BY number")
        if rows and rows[-1][0] == self.settings_hash:
            return
        if rows and not new_run:
            difference = _first_difference(self._value(rows[-1][1]), settings)
            raise InputError(
                f"the settings differ from those of this run ({difference}): "
                "choose another run.directory, or set new_run=true to start again in this one"
            )
        content = json.dumps(settings, ensure_ascii=False, sort_keys=True)
        # Settings that return become the last ones again.
        insert = "INSERT OR REPLACE INTO settings SELECT ?, ?, coalesce(max(number), 0) + 1 FROM settings"
        self._write((insert, (self.settings_hash, content)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _write(self, *statements: tuple[str, tuple]) -> None:
        """Execute all statements or none; they are committed on return."""
        with self.errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for statement in statements:
                self._db.execute(*statement)

    def record_call(
        self,
        call: RoleCall,
        model: str,
        attempts: Sequence[RequestAttempt],
        answer: dict[str, Any] | None = None,
        turn: Turn | None = None,
        number: int = 0,
    ) -> None:
        """Record a call with its requests, at once: a killed process leaves all of it or nothing.

        Args:
            attempts: the requests to the server, answered or not.
            answer: None if there is no usable one.
            turn: the turn that the answer gives, if any.
            number: its number, from 0.
        """
        # Numbered by the rows so far: a call that failed and is repeated has earlier attempts.
        insert = (
            "INSERT INTO calls SELECT ?1, ?2, (SELECT count(*) FROM calls WHERE owner = ?1 AND key = ?2), "
            "?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11"
        )
        known = call.owner, call.key, self.settings_hash, call.role, model, call.prompt_digest, call.seed
        statements: list[tuple[str, tuple]] = [
            (insert, (*known, each.prompt_tokens, each.completion_tokens, each.latency_s, each.kind))
            for each in attempts
        ]
        if answer is not None:
            values = (call.owner, call.key, call.role, json.dumps(answer, ensure_ascii=False))
            statements.append(("INSERT INTO answers VALUES (?, ?, ?, ?)", values))
        if turn is not None:
            strategy = turn.strategy.number if turn.strategy else None
            values = (call.owner, number, turn.speaker.value, strategy, turn.text)
            statements.append(("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", values))
        self._write(*statements)

    def _rows(self, query: str, *values: str) -> list[Any]:
        with self.errors():
            return self._db.execute(query, values).fetchall()

    def _first(self, query: str, *values: str) -> Any:
        return next(iter(self._rows(query, *values)), None)

    def _value(self, text: str) -> Any:
        with self.errors():
            return json.loads(text)

    def answer(self, owner: str, key: str) -> dict[str, Any] | None:
        """A recorded answer, or None."""
        row = self._first("SELECT answer FROM answers WHERE owner = ? AND key = ?", owner, key)
        return self._value(row[0]) if row else None

    def count_answers(self, owner: str) -> int:
        """The number of recorded answers of a dialogue or persona."""
        return self._first("SELECT count(*) FROM answers WHERE owner = ?", owner)[0]

    def turns(self, dialogue_id: str) -> tuple[Turn, ...]:
        """The recorded turns of a dialogue."""
        query = "SELECT speaker, strategy, text FROM turns WHERE dialogue = ? ORDER BY number"
        rows = self._rows(query, dialogue_id)
        with self.errors():
            return tuple(
                Turn(Speaker(speaker), text, STRATEGIES[strategy - 1] if strategy else None)
                for speaker, strategy, text in rows
            )

    def status(self, dialogue_id: str) -> str | None:
        """The status of a dialogue; None before its start."""
        row = self._first("SELECT status FROM dialogues WHERE id = ?", dialogue_id)
        return row[0] if row else None

    def add_dialogue(self, slot: DialogueAttempt) -> None:
        """Record the start of a dialogue."""
        values = (slot.id, self.settings_hash, slot.persona, slot.topic, slot.mood, slot.replicate, OPEN)
        self._write(("INSERT INTO dialogues VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", values))

    def record_verdicts(
        self, dialogue_id: str, status: str, verdicts: Sequence[FilterVerdict], extra: dict[str, Any] | None = None
    ) -> None:
        """Record verdicts about a dialogue, its status, and its extra columns."""
        before = self._first("SELECT count(*) FROM verdicts WHERE dialogue = ?", dialogue_id)[0]
        statements = [
            ("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", (dialogue_id, number, *vars(verdict).values()))
            for number, verdict in enumerate(verdicts, start=before)
        ]
        values = (status, None if extra is None else json.dumps(extra, ensure_ascii=False), dialogue_id)
        self._write(*statements, ("UPDATE dialogues SET status = ?, extra = coalesce(?, extra) WHERE id = ?", values))

    def dialogue(self, dialogue_id: str, source: str) -> Dialogue:
        """A dialogue that has verdicts."""
        row = dict(self._first("SELECT persona, topic, mood, extra FROM dialogues WHERE id = ?", dialogue_id))
        extra = self._value(row.pop("extra"))
        return Dialogue(dialogue_id, self.turns(dialogue_id), source, row | extra)

    def verdicts(self) -> list[list[FilterVerdict]]:
        """The verdicts about each dialogue of the settings."""
        rows = self._rows(
            "SELECT dialogue, rule, keep, reason, detail FROM verdicts JOIN dialogues ON dialogues.id = dialogue "
            "WHERE settings = ? ORDER BY dialogue, number", self.settings_hash,
        )  # fmt: skip
        grouped = itertools.groupby(rows, key=lambda row: row[0])
        return [[FilterVerdict(rule, bool(keep), *why) for _, rule, keep, *why in verdicts] for _, verdicts in grouped]

    def usage(self) -> dict[str, dict[str, Any]]:
        """By role, totals of the settings' calls: `calls`, `failed`, `prompt_tokens`, `completion_tokens`, `latency_s`.

        Failed attempts are included.
        """
        rows = self._rows(
            "SELECT role, count(*) AS calls, sum(failure IS NOT NULL) AS failed, sum(prompt_tokens) AS prompt_tokens, "
            "sum(completion_tokens) AS completion_tokens, sum(latency_s) AS latency_s FROM calls WHERE settings = ? "
            "GROUP BY role ORDER BY role", self.settings_hash,
        )  # fmt: skip
        return {row.pop("role"): row for row in map(dict, rows)}

    def count_by_status(self) -> dict[str, int]:
        """The number of the settings' dialogues, by status."""
        query = "SELECT status, count(*) FROM dialogues WHERE settings = ? GROUP BY status"
        return dict(self._rows(query, self.settings_hash))

    def rejected_rows(self) -> list[dict[str, Any]]:
        """The settings' dialogues that were dropped, with the rule that dropped them, in the order of their ids."""
        rows = self._rows(
            "SELECT id, persona, topic, mood, status, rule, reason, detail FROM dialogues JOIN verdicts "
            "ON id = dialogue WHERE settings = ? AND NOT keep ORDER BY id, number", self.settings_hash,
        )  # fmt: skip
        return [dict(row) for row in rows]

    def judge_answers(self) -> list[list[dict[str, Any]]]:
        """The judges' answers about each dialogue of the settings."""
        rows = self._rows(
            "SELECT owner, answer FROM answers JOIN dialogues ON id = owner "
            "WHERE settings = ? AND role LIKE 'rolecs_check%' ORDER BY owner, role", self.settings_hash,
        )  # fmt: skip
        return [
            [self._value(answer) for _, answer in panel] for _, panel in itertools.groupby(rows, key=lambda r: r[0])
        ]


def _first_difference(before: Any, now: Any, name: str = "") -> str:
    """The first value in which two groups of settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
        return _first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {before!r} then, {now!r} now"
