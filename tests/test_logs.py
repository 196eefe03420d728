"""Logs and other JSONL: every kind of bad line in every kind of file, torn ends, full disks and damaged stores."""

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from test_build_csconv import SCRIPT, built
from test_rolecs_runner import SETTINGS, run
from test_sweep import SMALL

from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.judges import llm_judge
from csc_train.inference.predictions import Prediction, read_external_replies, read_outcomes
from csc_train.jsonl import JsonlLog, parse_step, to_line
from csc_train.launching.search_space import distributions
from csc_train.launching.sweep import STUDY_FILE, open_study, plan_sweep
from csc_train.runs.comparison import history_log
from csc_train.synthesis.csconv.build import AnswerLog, read_calls
from csc_train.synthesis.rolecs.batch_api import read_batch_results
from csc_train.synthesis.rolecs.personas import read_profiles
from csc_train.synthesis.rolecs.store import SynthesisStore

DIALOGUES = generate_sample(3, seed=0)
PREDICTION = asdict(Prediction("d", 0, "generated", "ab", "您好", 1, "您好", 1, "您好"))
REQUEST = {"failure": None, "prompt_tokens": 1, "completion_tokens": 1, "latency_s": 0.1}
USAGE = {"attempts": 1, "prompt_tokens": 1, "completion_tokens": 1}
ASKED_AGAIN = "delete the line: its question is asked again"
CORRECT = "correct or delete the line"


@dataclass
class Kind:
    """A kind of file: good rows with Chinese texts, a field that each needs, and how it is read.

    Attributes:
        advice: the end of the refusal of a bad line; None if it is left out.
        read: returns one item for each row that is used.
    """

    rows: list[dict[str, Any]]
    field: str
    read: Callable[[Path], Any]
    advice: str | None


def read_answers(path: Path) -> dict:
    return AnswerLog(path)._answers


KINDS = {
    "history": Kind([{"step": n, "损失": 1.0} for n in range(3)], "step",
                    lambda path: history_log(path.parent).read(), None),
    "samples": Kind([{"step": n, "text": "您好"} for n in range(3)], "step",
                    lambda path: JsonlLog(path, parse_step).read(), None),
    "predictions": Kind([PREDICTION | {"turn": n} for n in range(3)], "turn", read_outcomes, None),
    "predictions of a finished run": Kind([PREDICTION | {"turn": n} for n in range(3)], "turn",
                                          lambda path: read_outcomes(path, "delete it"), "delete it"),
    "answers": Kind([{"key": f"k{n}", "task": "quality", "answer": {"a": "好"}, "requests": [REQUEST]}
                     for n in range(3)], "requests", read_answers, ASKED_AGAIN),
    "judgements": Kind([{"key": f"k{n}", "task": "pairwise", "answer": {"reason": "更好", "better": "1"}, **USAGE}
                        for n in range(3)], "attempts", lambda path: llm_judge._judgement_log(path).read(),
                       ASKED_AGAIN),
    "batch results": Kind([{"custom_id": f"c{n}", "error": None, "response": {
        "status_code": 200, "body": {"choices": [{"message": {"content": "好"}}]}}} for n in range(3)], "custom_id",
        lambda path: read_batch_results([path]), "delete the line: its request stays pending"),
    "calls": Kind([{"id": f"c{n}", "turns": [{"speaker": "客服", "text": "好"}]} for n in range(3)], "turns",
                  read_calls, CORRECT),
    "profiles": Kind([{"id": f"p{n}", "job": "教师"} for n in range(3)], "job", read_profiles, CORRECT),
    "replies": Kind([{"text": "好", "dialogue_id": each.id, "turn": turn} for each in DIALOGUES[:1]
                     for turn in each.supporter_turns], "turn",
                    lambda path: read_external_replies(path, DIALOGUES[:1], "reference"), CORRECT),
}  # fmt: skip
FAULTS = {
    "NULs": (lambda line, field: b"\0" * 40, r"not JSON \(column 1: "),
    "garbage": (lambda line, field: b"\x9f\x92 {]", r"not JSON \(not UTF-8 at byte 0\)"),
    "cut": (lambda line, field: line[: len(line) // 2], r"not JSON \("),
    "cut in a character": (lambda line, field: line[: line.index("好".encode()) + 1 if "好".encode() in line else
                                                    [byte > 127 for byte in line].index(True) + 1],
                           r"not JSON \(not UTF-8 at byte "),
    "no object": (lambda line, field: b"[1]", "not a JSON object"),
    "no field": (lambda line, field: without(line, field), ""),
    "wrong type": (lambda line, field: to_line(json.loads(line) | {field: {"x": "?"}}).encode()[:-1], "field "),
}  # fmt: skip


def without(line: bytes, field: str) -> bytes:
    row = json.loads(line)
    del row[field]
    return to_line(row).encode()[:-1]


def lines_of(kind: Kind) -> list[bytes]:
    return [to_line(row).encode()[:-1] for row in kind.rows]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_bad_line_is_named_and_left_out_or_refused(tmp_path, name, fault, said):
    kind, (spoil, reason) = KINDS[name], FAULTS[fault]
    path, lines = tmp_path / "history.jsonl", lines_of(kind)
    lines[1] = spoil(lines[1], kind.field)
    path.write_bytes(b"\n".join(lines) + b"\n")
    place = f"{path}, line 2: "
    if kind.advice is None:
        for _ in range(2):  # said once, however often it is read
            assert len(kind.read(path)) == len(lines) - 1
        (message,) = said
        assert message.startswith(place) and message.endswith(": left out")
    else:
        with pytest.raises(InputError) as refusal:
            kind.read(path)
        message = str(refusal.value)
        assert message.startswith(place) and message.endswith(f": {kind.advice}") and "\n" not in message
    assert re.match(reason or r"field |no values", message.removeprefix(place)), message
    if fault in ("no field", "wrong type") and name != "profiles":
        assert message.removeprefix(place).startswith(f"field {kind.field}"), message


@pytest.mark.parametrize("name", KINDS)
def test_line_separators_byte_order_marks_blank_lines_and_carriage_returns_are_no_fault(tmp_path, name, said):
    kind = KINDS[name]
    text = json.dumps(kind.rows, ensure_ascii=False).replace("好", "好\u2028\u2029\x85")
    lines = [to_line(row).encode()[:-1] for row in json.loads(text)]
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n \n".join(lines) + b"\r\n\n")
    assert len(kind.read(path)) == len(lines) and said == []


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("history", "samples", "replies")])
def test_two_records_of_one_name_are_refused(tmp_path, name):
    kind, path = KINDS[name], tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines_of(kind), lines_of(kind)[0], b""]))
    if name.startswith("predictions"):  # the last line of a turn counts, such as a retry
        assert len(kind.read(path)) == 4
        return
    with pytest.raises(InputError, match=rf"a\.jsonl, line 4: .* stands in line 1 already: {kind.advice}$"):
        kind.read(path)


def test_a_bad_row_of_dialogues_is_rejected_with_its_line(tmp_path, said):
    path = tmp_path / "dialogues.jsonl"
    lines = [to_line(each.row()).encode()[:-1] for each in DIALOGUES]
    for _, (spoil, _) in FAULTS.items():
        path.write_bytes(b"\n".join([lines[0], spoil(lines[1], "dialogue"), lines[2], b""]))
        assert [each.id for each in read_dialogues(path)] == [DIALOGUES[0].id, DIALOGUES[2].id]
        with pytest.raises(InputError, match=r"dialogues\.jsonl, row 2, field (row|dialogue): "):
            read_dialogues(path, strict=True)


@pytest.mark.parametrize("length", [10, 1 << 17])
def test_a_torn_end_is_cut_before_the_next_row(tmp_path, length):
    log = JsonlLog(tmp_path / "a.jsonl")
    log.append({"step": 1, "text": "好" * length})
    log.close()
    whole = log.path.read_bytes()
    for torn in (b"", b"\0" * length, b'{"step": 2', "好".encode()[:2]):
        log.path.write_bytes(whole + torn)
        with log:
            log.append({"step": 2})
        assert log.path.read_bytes() == whole + b'{"step": 2}\n'
    log.path.write_bytes(whole[:-1])
    with log:
        log.open()
    assert log.path.read_bytes() == b""


def test_a_later_step_is_removed_and_a_row_without_one_is_named(tmp_path, said):
    log = JsonlLog(tmp_path / "a.jsonl", parse_step)
    log.path.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    log.truncate_after(1)
    assert log.path.read_text() == '{"step": 1}\n'
    assert said == [f"{log.path}, line 2: field step: missing: left out"]


def test_a_row_that_the_disk_takes_half_of_is_cut_off(full_disk):
    """The error is said, and the next row begins on a line of its own once there is room."""
    log = JsonlLog(full_disk / "a.jsonl")
    log.append({"step": 1})
    with pytest.raises(InputError, match=r"a\.jsonl: cannot write: (No space left on device|File too large)$"):
        log.append({"text": "x" * 50_000})
    log.append({"step": 2})
    assert log.read() == [{"step": 1}, {"step": 2}]


# A sweep's journal


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """A planned sweep, and its journal with two finished trials and a running one."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directory = tmp_path_factory.mktemp("sweep")
    planned = plan_sweep([*SMALL, "sweep=lr", f"sweep.directory={directory}"])
    study = open_study(planned)
    for value in (0.5, 0.25, None):
        trial = study.ask(distributions(planned.config))
        trial.report(1.0, 1)
        if value is not None:
            study.tell(trial, value)
    return planned, (directory / STUDY_FILE).read_bytes(), study.trials


@pytest.mark.parametrize("fault", ["NULs", "garbage", "cut", "empty", "no object"])
def test_a_bad_line_of_a_sweeps_journal_is_left_out_or_refused(journal, fault, said):
    planned, content, trials = journal
    path, lines = planned.directory / STUDY_FILE, content.split(b"\n")[:-1]
    used = 0
    for number, line in enumerate(lines):
        bad = b"" if fault == "empty" else FAULTS[fault][0](line, "")
        path.write_bytes(b"\n".join([*lines[:number], bad, *lines[number + 1 :], b""]))
        said.clear()
        try:
            study = open_study(planned)
        except InputError as refusal:
            assert str(refusal).startswith(f"{path}: a lost line ") and "choose another sweep.directory" in str(refusal)
        else:
            used += 1
            for trial, known in zip(study.trials, trials, strict=True):
                running = trial.state == optuna.trial.TrialState.RUNNING
                assert running or (trial.params, trial.value) == (known.params, known.value)
            trial = study.ask()  # the repaired journal goes on
            assert trial.number == 3
        assert fault == "empty" or said[0].startswith(f"{path}, line {number + 1}: ")
    assert used >= 5
    path.write_bytes(content + b'{"op_code": 4, "wor')
    assert len(open_study(planned).trials) == 3 and path.read_bytes().startswith(content)


# Stores of a synthesis


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "synthesis.db"
    run(path, 3)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "header": lambda data: b"\0" * 100 + data[100:],
    "pages": lambda data: data[:8192] + b"\x5a" * (len(data) - 8192),
    "text": lambda data: b"not a store " * 1000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_named(tmp_path, finished, kind):
    path = tmp_path / "synthesis.db"
    path.write_bytes(DAMAGE[kind](finished.read_bytes()))
    with pytest.raises(InputError, match=r"synthesis\.db: is damaged: .*: restore a copy of it, or ") as refusal:
        run(path, 3)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [
    "UPDATE answers SET answer = substr(answer, 3)", "UPDATE answers SET answer = cast(x'ff00' AS TEXT)",
    "UPDATE turns SET speaker = 'x'", "UPDATE turns SET strategy = 77", "UPDATE dialogues SET extra = '['",
    "DROP TABLE verdicts; CREATE TABLE verdicts (x)", "UPDATE answers SET answer = '{}'",
])  # fmt: skip
def test_content_that_is_damaged_is_named(tmp_path, finished, change):
    path = tmp_path / "synthesis.db"
    shutil.copy(finished, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    with pytest.raises(InputError, match=r"synthesis\.db: is damaged: ") as refusal:
        run(path, 4)
    assert "\n" not in str(refusal.value)


def test_a_store_on_a_full_disk_ends_in_one_line_and_goes_on(full_disk, tmp_path):
    _, accepted, _ = run(tmp_path / "whole.db", 3)
    with pytest.raises(InputError, match=r"s\.db: cannot write: (database or disk is full|disk I/O error): make it wr"):
        run(full_disk / "s.db", 3)
    for file in full_disk.iterdir():
        shutil.copy(file, tmp_path)
    assert run(tmp_path / "s.db", 3)[1] == accepted


def test_answers_on_a_full_disk_end_in_one_line_and_go_on(full_disk, tmp_path):
    with pytest.raises(InputError, match=r"answers\.jsonl: cannot write: (No space left on device|File too large)$"):
        built(AnswerLog(full_disk / "answers.jsonl").cached(SCRIPT))
    shutil.copy(full_disk / "answers.jsonl", tmp_path)
    assert built(AnswerLog(tmp_path / "answers.jsonl").cached(SCRIPT)) == built(SCRIPT)


def test_a_read_only_store_is_named(tmp_path, finished):
    folder = tmp_path / "synthesis.db"
    folder.mkdir()
    with pytest.raises(InputError, match=r"synthesis\.db: cannot write: unable to open database file: "):
        SynthesisStore(folder, SETTINGS)
