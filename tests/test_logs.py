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
from conftest import full_disk, load_recipe
from test_build_csconv import SCRIPT, built
from test_llm_judge import DIALOGUES as JUDGED
from test_llm_judge import planted, system
from test_rolecs_runner import SETTINGS, run
from test_sweep import SMALL

from csc_train.config.compose import compose
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.judges import llm_judge
from csc_train.inference.predictions import Prediction, read_external_replies, read_outcomes, write_predictions
from csc_train.jsonl import JsonlLog, parse_step, to_line
from csc_train.launching.search_space import distributions
from csc_train.launching.sweep import STUDY_FILE, open_study, plan_sweep
from csc_train.llm.answer_log import AnswerLog
from csc_train.runs.claim import release_all
from csc_train.runs.comparison import history_log
from csc_train.synthesis.rolecs.batch_api import read_batch_results
from csc_train.synthesis.rolecs.personas import read_profiles
from csc_train.synthesis.rolecs.store import SynthesisStore

DIALOGUES = generate_sample(3, seed=0)
PREDICTION = asdict(Prediction("d", 0, "generated", "ab", "您好", 1, "您好", 1, "您好"))
REQUEST = {"failure": None, "prompt_tokens": 1, "completion_tokens": 1, "latency_s": 0.1}
USAGE = {"attempts": 1, "prompt_tokens": 1, "completion_tokens": 1}
ASKED_AGAIN = "delete the line: its question is asked again"
FULL = "(No space left on device|File too large)"
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


def test_a_row_that_the_disk_takes_half_of_is_cut_off(tmp_path):
    """The error is said, and the next row begins on a line of its own once there is room."""
    with full_disk(tmp_path / "disk") as disk:
        log = JsonlLog(disk / "a.jsonl")
        log.append({"step": 1})
        with pytest.raises(InputError, match=rf"a\.jsonl: cannot write: {FULL}$"):
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


@pytest.mark.slow
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
def test_a_damaged_store_is_named_before_anything_is_asked(tmp_path, finished, kind):
    path = tmp_path / "synthesis.db"
    path.write_bytes(DAMAGE[kind](finished.read_bytes()))
    with pytest.raises(InputError, match=r"synthesis\.db: is damaged: .*: restore a copy of it, or ") as refusal:
        SynthesisStore(path, SETTINGS)
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


def test_a_store_on_a_full_disk_ends_in_one_line_and_goes_on(tmp_path):
    _, accepted, _ = run(tmp_path / "whole.db", 3)
    with full_disk(tmp_path / "disk") as disk:
        reason = "(database or disk is full|disk I/O error)"
        with pytest.raises(InputError, match=rf"s\.db: cannot write: {reason}: make room or make it writable, then "):
            run(disk / "s.db", 3)
        for file in disk.iterdir():
            shutil.copy(file, tmp_path)
    assert run(tmp_path / "s.db", 3)[1] == accepted


def test_answers_on_a_full_disk_end_in_one_line_and_go_on(tmp_path):
    with full_disk(tmp_path / "disk") as disk:
        with pytest.raises(InputError, match=rf"answers\.jsonl: cannot write: {FULL}$"):
            built(AnswerLog(disk / "answers.jsonl").cached(SCRIPT))
        shutil.copy(disk / "answers.jsonl", tmp_path)
    assert built(AnswerLog(tmp_path / "answers.jsonl").cached(SCRIPT)) == built(SCRIPT)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "empty"])
def test_a_store_that_is_gone_is_not_paid_for_again(arguments, lost):
    main = load_recipe("synthesize_rolecs").main
    main(compose("synthesize_rolecs", ["target=2", "run.directory=r"]))
    before = Path("r/dialogues.jsonl").read_bytes()
    lost(Path("r/synthesis.db"))
    for words in (["target=2", "run.directory=r"], ["run=r", "resume=true"]):
        with pytest.raises(InputError, match=r"r/synthesis\.db: is lost or empty, .*: restore a copy of it, or "):
            main(compose("synthesize_rolecs", words))
    assert Path("r/dialogues.jsonl").read_bytes() == before


def test_a_read_only_store_is_named(tmp_path, finished):
    folder = tmp_path / "synthesis.db"
    folder.mkdir()
    with pytest.raises(InputError, match=r"synthesis\.db: cannot write: unable to open database file: "):
        SynthesisStore(folder, SETTINGS)


# Recipes


@pytest.fixture
def arguments(tmp_path, monkeypatch, fault_server):
    """The arguments of each recipe, small; two evaluations lie in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 3), ("other", 2)):
        predictions = system(lambda n, value=value: f"品质{value}，第{n}句")
        write_predictions(tmp_path / name / "predictions" / "trained-reference.jsonl", predictions)
        write_dialogues(tmp_path / name / "dialogues.jsonl", JUDGED.values())
    write_dialogues("train.jsonl", DIALOGUES)
    fault_server.answer = lambda body: "[礼貌问候]您好" if body["model"] == "m" else planted(body)
    llm = ["llm=openai", f"llm.base_url={fault_server.base_url}", "llm.api_key_env=null"]
    return {
        "synthesize_rolecs": ["target=2"],
        "build_csconv": [],
        "judge": ["one", "other", *llm, "llm.model=judge", "judge.num_turns=3"],
        "evaluate": [*llm, "llm.model=m", "data=files", "data.train.path=train.jsonl",
                     "data.evaluation.path=train.jsonl", "evaluation.contexts=[reference]"],
        "human_eval": ["export", "one", "other"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synthesize_rolecs", "build_csconv", "judge", "evaluate", "human_eval"])
def test_a_recipe_on_a_full_disk_ends_in_one_line_and_resumes(tmp_path, arguments, name):
    """At whichever write the disk is full: nothing but the error is different from a disk with room."""

    def start(directory: Path, if_exists: str) -> None:
        more = [f"run.directory={directory}", f"run.if_exists={if_exists}"]
        load_recipe(name).main(compose(name, [*arguments[name], *more]))

    failures = []
    for kilobytes in (4, 8, 12, 16, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640, 2048):
        kept = tmp_path / f"kept-{kilobytes}"
        with full_disk(tmp_path / f"disk-{kilobytes}", kilobytes) as disk:
            try:
                start(disk / "run", "error")
                break
            except InputError as error:
                failures.append(str(error))
                release_all()  # as the end of the process does
                if (disk / "run").exists():  # it goes if nothing could be written there
                    shutil.copytree(disk / "run", kept)
        assert f"disk-{kilobytes}/run" in failures[-1] and ": cannot write: " in failures[-1], failures[-1]
        assert "\n" not in failures[-1] and not list(kept.glob(".*"))
        if (kept / "run.json").exists():
            start(kept, "resume")
    else:
        pytest.fail(f"never finished: {failures}")
    assert len(set(failures)) > 2, failures
