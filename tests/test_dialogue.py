"""Reading, checking and writing dialogues: what is accepted, what is refused and where, and that nothing vanishes."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from processes import TIMEOUT_S

from csc_train.data.chats import check_chat
from csc_train.data.dialogue import Dialogue, Speaker, Turn, accept_sets_digest, data_digest
from csc_train.data.readers import ReadReport, iter_dialogues, read_accept_sets, read_dialogues, write_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError

BY_CODE = {strategy.code: strategy for strategy in STRATEGIES}
GOOD = [("客服", "策略1 礼貌问候", "您好，请讲。"), ("客户", "", "卡丢了！"), ("客服", "5", "您别急。")]


def make_row(turns=GOOD, **columns):
    return {
        "dialogue": [{"speaker": speaker, "strategy": strategy, "text": text} for speaker, strategy, text in turns],
        **columns,
    }


def make_rows(count, **columns):
    return [make_row([*GOOD[:2], ("客服", "情感管理", f"您别急，第{i}位客户。")], **columns) for i in range(count)]


def changed(turn, **values):
    """The good row with some fields of one turn (from 1) changed; a field set to `...` is taken out."""
    row = make_row()
    fields = row["dialogue"][turn - 1] | values
    row["dialogue"][turn - 1] = {name: value for name, value in fields.items() if value is not ...}
    return row


def write_file(path, rows):
    """Write rows as they are; a row given as bytes is a raw line of JSONL."""
    if path.suffix in (".jsonl", ".ndjson"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Zero-width characters, fillers, control characters, a selector without a character, white space.
INVISIBLE = "\u200b\u200d\ufeff\u2060\u00ad\u3164\u115f\u2800\ufe0f\U000e0020\x00\x7f\u0085\u3000"

# (row, turn or None, field, reason)
BAD = {
    "wrong speaker": (changed(2, speaker="经理"), 2, "speaker", "unknown speaker ('经理')"),
    "no speaker": (changed(2, speaker=...), 2, "speaker", "unknown speaker (None)"),
    "speaker is a list": (changed(1, speaker=["客服"]), 1, "speaker", "unknown speaker (['客服'])"),
    "empty text": (changed(3, text=""), 3, "text", "empty"),
    "blank text": (changed(2, text=" \t\n\u3000"), 2, "text", "empty"),
    **{
        f"invisible text {text!a} in turn {turn}": (changed(turn, text=text), turn, "text", "empty")
        for text in (*INVISIBLE, "".join(INVISIBLE))
        for turn in (2, 3)
    },
    "invisible strategy": (changed(3, strategy="\u200b\ufeff"), 3, "strategy", "missing on a supporter turn"),
    "no text": (changed(2, text=...), 2, "text", "not a text (NoneType)"),
    "image as text": (
        changed(2, text=[{"type": "text", "text": "这个"}, {"type": "image", "image": "1.png"}]),
        2,
        "text",
        'image, video or sound: only text is trained: take it out ("image")',
    ),
    "placeholder of an image": (
        changed(2, text="这个<|vision_start|><|image_pad|><|vision_end|>"),
        2,
        "text",
        "image, video or sound: only text is trained: take it out (<|vision_start|>)",
    ),
    "number as text": (changed(2, text=5), 2, "text", "not a text (int)"),
    "unknown strategy": (
        changed(1, strategy="策略13 其它"),
        1,
        "strategy",
        "unknown strategy ('策略13 其它'. Did you mean '策略12 其它'?)",
    ),
    "misspelt strategy": (
        changed(3, strategy="情感管里"),
        3,
        "strategy",
        "unknown strategy ('情感管里'. Did you mean '情感管理'?)",
    ),
    "zero as strategy": (changed(3, strategy=0), 3, "strategy", "unknown strategy ('0')"),
    "strategy in two lines": (changed(3, strategy="5\n6"), 3, "strategy", r"unknown strategy ('5\n6')"),
    "surrogate in strategy": (changed(3, strategy="\ud800"), 3, "strategy", r"unknown strategy ('\ud800')"),
    "double strategy": (
        changed(3, strategy="策略5 情感管理+策略6 提供建议"),
        3,
        "strategy",
        "two strategies ('策略5 情感管理+策略6 提供建议')",
    ),
    "full-width plus": (changed(3, strategy="5＋6"), 3, "strategy", "two strategies ('5＋6')"),
    "supporter without strategy": (changed(3, strategy=""), 3, "strategy", "missing on a supporter turn"),
    "customer with strategy": (changed(2, strategy="5"), 2, "strategy", "given on a customer turn ('5')"),
    "accepted is a number": (changed(1, accepted=5), 1, "accepted", "not a list (int)"),
    "accepted is a text": (changed(1, accepted="1"), 1, "accepted", "not a list (str)"),
    "accepted is unknown": (changed(1, accepted=["1", "x"]), 1, "accepted", "unknown strategy ('x')"),
    "accepted is misspelt": (
        changed(3, accepted=["Emotional Managment"]),
        3,
        "accepted",
        "unknown strategy ('Emotional Managment'. Did you mean 'Emotional Management'?)",
    ),
    "accepted is null in a list": (changed(3, accepted=["1", None]), 3, "accepted", "unknown strategy ('')"),
    "accepted is double": (changed(3, accepted=["1+5"]), 3, "accepted", "two strategies ('1+5')"),
    "customer with accepted": (changed(2, accepted=["1"]), 2, "accepted", "given on a customer turn (['1'])"),
    "customer with a number as accepted": (changed(2, accepted=0), 2, "accepted", "given on a customer turn (0)"),
    "no supporter turn": (make_row([GOOD[1]]), None, "dialogue", "no supporter turn"),
    "no turns": (make_row([]), None, "dialogue", "no supporter turn"),
    "no dialogue": ({"id": "a"}, None, "dialogue", "missing"),
    "dialogue is a text": ({"dialogue": "客服：您好"}, None, "dialogue", "not a list"),
    "turn is a text": ({"dialogue": [*make_row()["dialogue"], "再见"]}, 4, "turn", "not an object (str)"),
    "row is a list": ([1, 2], None, "row", "not an object (list)"),
    "row is null": (None, None, "row", "not an object (NoneType)"),
    "id is a list": (make_row(id=["a"]), None, "id", "not a text (list)"),
    "source is an object": (make_row(source={}), None, "source", "not a text (dict)"),
    "surrogate in text": (changed(2, text="好\ud83d"), 2, "text", "lone surrogate, which UTF-8 cannot hold"),
    "surrogate in id": (make_row(id="\ud83d"), None, "id", "lone surrogate, which UTF-8 cannot hold"),
    "surrogate in a column": (make_row(a=["\ud83d"]), None, "a", "lone surrogate, which UTF-8 cannot hold"),
}
UNREADABLE = {
    "broken line": (b'{"dialogue": [}', "broken JSON (column 15: Expecting value)"),
    "cut line": (b'{"dialogue": [', "broken JSON (column 15: Expecting value)"),
    "cut UTF-8": (b'{"id": "' + "情".encode()[:2], "broken JSON (not UTF-8 at byte 8)"),
    "nested too deep": (b"[" * 200_000, "broken JSON (maximum recursion depth exceeded"),
    "number too long": (b"1" * 5_000, "broken JSON (Exceeds the limit"),
}


def message(place, turn, name, reason):
    return f"{place}, " + (f"turn {turn}, " if turn else "") + f"field {name}: {reason}"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_with_its_place(tmp_path, case, suffix):
    row, turn, name, reason = BAD[case]
    path = write_file(tmp_path / f"a{suffix}", [*make_rows(2), row, make_row()])
    expected = message(f"{path}, row 3", turn, name, reason)

    with pytest.raises(InputError) as refusal:
        read_dialogues(path, strict=True)
    assert str(refusal.value) == expected

    report = ReadReport(str(path))
    assert len(list(iter_dialogues(path, report=report))) == 3
    assert [str(reject) for reject in report.rejected] == [expected]
    assert report.rejected[0].record == row
    assert (report.rows, report.accepted) == (4, 3)


@pytest.mark.parametrize("case", UNREADABLE)
def test_only_the_broken_line_of_a_jsonl_is_refused(tmp_path, case):
    line, reason = UNREADABLE[case]
    path = write_file(tmp_path / "a.jsonl", [make_row(), line, *make_rows(2)])
    expected = message(f"{path}, row 2", None, "row", reason)
    with pytest.raises(InputError) as refusal:
        read_dialogues(path, strict=True)
    assert str(refusal.value).startswith(expected)
    report = ReadReport(str(path))
    assert len(list(iter_dialogues(path, report=report))) == 3
    (reject,) = report.rejected
    assert reject.row == 2 and str(reject).startswith(expected)
    assert reject.record == line.decode("utf-8", "replace")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[\n{"dialogue": [}]', "broken JSON at line 2, column 15: Expecting value"),
        ("a.json", '["情'.encode()[:-1], "not UTF-8 at byte 2"),
        ("a.json", b"[" * 200_000, "broken JSON: maximum recursion depth exceeded"),
        ("a.json", b'{"dialogue": []}', "expected a JSON list of dialogues, found dict"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b" \n", "the file is empty"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.parquet", b"PAR1, but no Parquet", "not a Parquet file: "),
        ("a.csv", b"speaker,text", "not a dialogue file: use one of .json, .jsonl, .ndjson, .parquet"),
    ],
)
def test_a_file_unusable_as_a_whole(tmp_path, name, content, reason, strict):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_dialogues(path, strict=strict)
    assert str(refusal.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(refusal.value)


def test_a_file_whose_rows_are_all_refused_is_an_error(tmp_path):
    path, rejects = write_file(tmp_path / "a.jsonl", [[], b"{"]), tmp_path / "rejects.jsonl"
    with pytest.raises(InputError) as refusal:
        read_dialogues(path, rejected_path=rejects)
    assert str(refusal.value) == (
        f"{path}: every row is rejected (1 row: not an object, 1 row: broken JSON); the first: "
        f"{path}, row 1, field row: not an object (list)"
    )
    assert len(rejects.read_text().splitlines()) == 2


def test_a_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    texts = pyarrow.array(["情".encode()[:2]], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"dialogue": texts}), path)
    with pytest.raises(InputError, match=r"a\.parquet: a text is not UTF-8"):
        read_dialogues(path)


@pytest.mark.parametrize("name", ["none.json", "none.jsonl", "none.parquet"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(InputError) as refusal:
        read_dialogues(tmp_path / name)
    assert str(refusal.value) == f"{tmp_path / name}: cannot read: No such file or directory"


def test_a_missing_path_and_a_local_file_are_not_taken_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file: give a file, a folder or the id of a hub data set"):
        read_dialogues("some/where/none")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dialogues.txt").write_text("您好")
    with pytest.raises(InputError, match="not a dialogue file"):
        read_dialogues("data/dialogues.txt")


@pytest.mark.parametrize("folder", ["shop/plain", "./shop/plain", "数据/a=b,c"])
def test_a_folder_is_read_whole_and_never_taken_for_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    ids = iter("abcdefgh")
    for name in ("train-0101.jsonl", "0102.jsonl", "test.json", "0103.ndjson"):
        rows = [row | {"id": next(ids)} for row in make_rows(2)]
        write_file(Path(folder) / name, rows)
    for ignored in ("README.md", "_SUCCESS", ".part.crc"):
        (Path(folder) / ignored).write_text("no data")
    assert [dialogue.id for dialogue in read_dialogues(folder)] == ["c", "d", "g", "h", "e", "f", "a", "b"]
    with (Path(folder) / "0102.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(Path(folder) / '0102.jsonl'))}, row 3, field dialogue"):
        read_dialogues(folder, strict=True)
    for other in ("notes.csv", "more"):
        (Path(folder) / other).mkdir() if other == "more" else (Path(folder) / other).write_text("x")
        with pytest.raises(InputError, match=rf"{other}: not a dialogue file: use one of .json"):
            read_dialogues(folder)
    Path("shop/none").mkdir(parents=True)
    with pytest.raises(InputError, match=r"^shop/none: the folder holds no dialogue file"):
        read_dialogues("shop/none")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_rows_are_selected_by_source(tmp_path, suffix):
    rows = [*make_rows(3, source="RoleCS"), *make_rows(2, source="CSConv"), make_row(source=None)]
    path = write_file(tmp_path / f"a{suffix}", rows)
    report = ReadReport(str(path))
    selected = list(iter_dialogues(path, source="CSConv", report=report))
    assert [dialogue.source for dialogue in selected] == ["CSConv", "CSConv"]
    assert report.other_sources == {"RoleCS": 3, "": 1} and report.rows == 6
    with pytest.raises(InputError) as refusal:
        read_dialogues(path, source="rolecs")
    assert str(refusal.value) == f"{path}: no row has source 'rolecs'; found: 'RoleCS' (3), 'CSConv' (2), '' (1)"


def test_an_unknown_source_is_an_error_even_where_a_line_is_broken(tmp_path):
    path = write_file(tmp_path / "a.jsonl", [*make_rows(2, source="RoleCS"), b"{"])
    with pytest.raises(InputError, match=r"no row has source 'x'; found: 'RoleCS' \(2\)"):
        read_dialogues(path, source="x")


def test_collecting_counts_every_row_and_keeps_each_refused_one(tmp_path, said):
    bad = [row for row, *_ in BAD.values()] + [line for line, _ in UNREADABLE.values()]
    rows = [*make_rows(7, source="a"), *make_rows(5, source="b"), *bad]
    random.Random(0).shuffle(rows)
    path = write_file(tmp_path / "a.jsonl", rows)
    report = ReadReport(str(path))
    accepted = list(iter_dialogues(path, report=report))
    assert len(accepted) == report.accepted == 12
    assert report.rows == len(rows) == report.accepted + len(report.rejected)

    rejects = tmp_path / "out" / "rejects.jsonl"
    assert read_dialogues(path, rejected_path=rejects) == accepted
    lines = [json.loads(line) for line in rejects.read_text(encoding="ascii").splitlines()]
    assert [line["row"] for line in lines] == [i for i, row in enumerate(rows, start=1) if row in bad]
    for line in lines:
        row = rows[line["row"] - 1]
        assert line["record"] == (row.decode("utf-8", "replace") if isinstance(row, bytes) else row)
        assert line["file"] == str(path) and line["issues"][0]["reason"]
    table = "\n".join(said).splitlines()
    assert table[0] == f"{path}: {len(rows)} rows, 12 accepted, {len(bad)} rejected"
    assert sum(int(line.split()[0]) for line in table[1:-1]) == len(bad)
    assert str(rejects) in table[-1]

    report = ReadReport(str(path))
    assert len(list(iter_dialogues(path, source="b", report=report))) == 5
    assert report.rows == report.accepted + len(report.rejected) + sum(report.other_sources.values())
    assert "of other sources" in report.summary()


def test_all_problems_of_a_row_are_listed(tmp_path):
    row = make_row([("客服", "x", ""), ("谁", "", "好")])
    path = write_file(tmp_path / "a.jsonl", [row, make_row()])
    report = ReadReport(str(path))
    list(iter_dialogues(path, report=report))
    assert [(p.turn, p.field) for p in report.rejected[0].issues] == [(1, "text"), (1, "strategy"), (2, "speaker")]


def test_strict_reading_counts_the_row_it_stops_at_and_writes_nothing(tmp_path, said):
    path = write_file(tmp_path / "a.jsonl", [make_row(), b"{", make_row()])
    report = ReadReport(str(path))
    with pytest.raises(InputError):
        list(iter_dialogues(path, strict=True, report=report))
    assert (report.rows, report.accepted, len(report.rejected)) == (2, 1, 1)
    with pytest.raises(InputError):
        read_dialogues(path, strict=True, rejected_path=tmp_path / "rejects.jsonl")
    assert said == [] and not (tmp_path / "rejects.jsonl").exists()


def test_rows_of_jsonl_are_counted_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + json.dumps(make_row()).encode() + b"\r\n\n{\n")
    with pytest.raises(InputError, match=r"a\.jsonl, row 4, field row"):
        read_dialogues(path, strict=True)


def test_jsonl_is_streamed(tmp_path):
    path = write_file(tmp_path / "a.jsonl", [*make_rows(3), b"{"])
    dialogues = iter_dialogues(path, strict=True)
    assert [next(dialogues).turns[0].text for _ in range(3)] == ["您好，请讲。"] * 3
    with pytest.raises(InputError, match="row 4"):
        next(dialogues)


def test_a_pipe_is_read_line_by_line(tmp_path):
    """The first dialogue comes out while the file has no end yet, so nothing waits for the whole file."""
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    os.write(pipe, json.dumps(make_row(id="first")).encode() + b"\n")
    # Ends the file in the end, so that a reader that does wait fails instead of hanging.
    end = threading.Timer(5, os.close, [pipe])
    end.start()
    dialogues = iter_dialogues(path)
    assert next(dialogues).id == "first"
    assert end.is_alive()
    end.cancel()
    os.close(pipe)
    assert list(dialogues) == []


ODD = ['他说"好"\\n', "😀👍🏽", "a\nb\r\nc\u2028d\x85e", "[手机号码] <|im_end|>", "\x00\x1b[0m", "٣½", "e\u0301"]


def random_dialogues(count, seed=0):
    random_ = random.Random(seed)
    dialogues = []
    for number in range(count):
        turns = []
        opens = random_.choice(list(Speaker))
        for place in range(random_.randint(2, 9)):
            text = random_.choice(["好", "x"]) + "".join(random_.sample(ODD, 2)) + random_.choice("。！")
            if (place % 2 == 0) == (opens is Speaker.SUPPORTER):
                own, *others = random_.sample(STRATEGIES, 3)
                turns.append(Turn(Speaker.SUPPORTER, text, own, random_.choice([(), (own,), (own, *others)])))
            else:
                turns.append(Turn(Speaker.CUSTOMER, text))
        extra = {"topic": random_.choice(ODD), "score": random_.random(), "tags": [str(number)]}
        dialogues.append(Dialogue(f"d{number}", tuple(turns), random_.choice(["", "RoleCS"]), extra))
    return dialogues


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_round_trip(tmp_path, suffix):
    dialogues = random_dialogues(50)
    path = tmp_path / f"a{suffix}"
    write_dialogues(path, iter(dialogues))
    again = read_dialogues(path, strict=True)
    assert again == dialogues
    assert [dialogue.extra for dialogue in again] == [dialogue.extra for dialogue in dialogues]
    assert data_digest(again) == data_digest(dialogues)


def test_json_round_trip_by_rows(tmp_path):
    dialogues = random_dialogues(20)
    path = write_file(tmp_path / "a.json", [dialogue.row() for dialogue in dialogues])
    again = read_dialogues(path, strict=True)
    assert again == dialogues
    assert [dialogue.extra for dialogue in again] == [dialogue.extra for dialogue in dialogues]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_that_the_first_row_lacks_is_kept(tmp_path, suffix):
    rows = make_rows(3)
    rows[1]["note"] = "回访"
    path = tmp_path / f"a{suffix}"
    write_dialogues(path, read_dialogues(write_file(tmp_path / "in.json", rows)))
    assert [dialogue.extra.get("note") for dialogue in read_dialogues(path)] == [None, "回访", None]


def test_a_date_from_parquet_can_be_written_as_jsonl(tmp_path):
    path = write_file(tmp_path / "a.parquet", [make_row(day=date(2025, 1, 2))])
    write_dialogues(tmp_path / "a.jsonl", read_dialogues(path))
    assert read_dialogues(tmp_path / "a.jsonl")[0].extra == {"day": "2025-01-02"}


@pytest.mark.parametrize("values", [[1, "x"], [{}, {}], [2**70, 1]])
def test_columns_without_a_parquet_type_are_refused_and_nothing_is_left(tmp_path, values):
    dialogues = [Dialogue(str(i), random_dialogues(1)[0].turns, extra={"x": x}) for i, x in enumerate(values)]
    with pytest.raises(InputError, match=r"a\.parquet: cannot write: "):
        write_dialogues(tmp_path / "a.parquet", dialogues)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_suffix_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv: cannot write this file type: use \.jsonl or \.parquet"):
        write_dialogues(tmp_path / "a.csv", random_dialogues(1))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_of_dialogues_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_dialogues(path, random_dialogues(1))
    broken = write_file(tmp_path / "b.jsonl", [*make_rows(3), b"{"])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"b\.jsonl, row 4"):
        write_dialogues(path, iter_dialogues(broken, strict=True))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_row_becomes_a_dialogue(tmp_path):
    row = make_row(
        [
            ("客服", " 策略1: 礼貌问候 ", " \u3000您好\n您请讲。\n"),
            ("客户", " ", "\t卡 丢了 "),
            ("supporter", 5, "您别急"),
        ],
        id=0,
        source="RoleCS",
        topic={"名": ["a", None]},
        score=0.5,
    )
    del row["dialogue"][1]["strategy"]
    (dialogue,) = read_dialogues(write_file(tmp_path / "a.json", [row]), strict=True)
    assert dialogue == Dialogue(
        "0",
        (
            Turn(Speaker.SUPPORTER, "您好\n您请讲。", BY_CODE["GT"]),
            Turn(Speaker.CUSTOMER, "卡 丢了"),
            Turn(Speaker.SUPPORTER, "您别急", BY_CODE["EM"]),
        ),
        "RoleCS",
    )
    assert dialogue.extra == {"topic": {"名": ["a", None]}, "score": 0.5}
    assert dialogue.supporter_turns == [0, 2]


SAID = [
    ("客户", "", " 在吗 \n"), ("客户", "", "有人吗？"), ("客服", "1", "您好"), ("客服", "策略4", "怎么了？"),
    ("客服", "礼貌问候", "请讲。"), ("客户", "", "卡丢了！"), ("客服", "5", "您别急。"),
]  # fmt: skip
"""A web chat: the customer opens, and both write several messages in a row."""


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_customer_may_open_and_consecutive_turns_are_joined(tmp_path, suffix, said):
    rows = [make_row(SAID, id="chat"), make_row(GOOD[1:], id="opened"), make_row(id="plain")]
    chat, opened, plain = read_dialogues(write_file(tmp_path / f"a{suffix}", rows), strict=True)
    assert chat.turns == (
        Turn(Speaker.CUSTOMER, "在吗 有人吗？"),
        Turn(Speaker.SUPPORTER, "您好 怎么了？ 请讲。", BY_CODE["GT"], (BY_CODE["GT"], STRATEGIES[3])),
        Turn(Speaker.CUSTOMER, "卡丢了！"),
        Turn(Speaker.SUPPORTER, "您别急。", BY_CODE["EM"]),
    )
    assert [turn.text for turn in opened.turns] == ["卡丢了！", "您别急。"] and opened.supporter_turns == [1]
    assert not any(turn.accepted for each in (opened, plain) for turn in each.turns)
    assert said[0].splitlines() == [
        f"{tmp_path / f'a{suffix}'}: 3 rows, 3 accepted, 0 rejected",
        "       1  rows: 3 turns joined to the same speaker's turn before (data.merge_turns=off rejects such rows)",
    ]
    labels = [turn.get("accepted") for turn in chat.row()["dialogue"]]
    assert labels == [None, ["策略1 礼貌问候", STRATEGIES[3].label], None, None]


def test_joined_turns_are_read_back_and_joined_once(tmp_path, said):
    (chat,) = read_dialogues(write_file(tmp_path / "a.json", [make_row(SAID)]))
    for name in ("b.jsonl", "b.parquet"):
        write_dialogues(tmp_path / name, [chat])
        said.clear()
        assert read_dialogues(tmp_path / name, strict=True) == [chat] and said == []
    plain = Dialogue(chat.id, tuple(Turn(turn.speaker, turn.text, turn.strategy) for turn in chat.turns))
    assert chat.fingerprint == plain.fingerprint  # what was accepted is not what was said
    row = chat.row()
    row["dialogue"].append({"speaker": "客服", "strategy": "1", "text": "再见", "accepted": ["11"]})
    (more,) = read_dialogues(write_file(tmp_path / "c.json", [row]))
    assert [each.number for each in more.turns[-1].accepted] == [5, 1, 11]  # by joining and by the data


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_accept_sets_are_read_in_every_form_with_the_own_strategy_first(tmp_path, suffix):
    forms = ["策略5 情感管理", "策略6: 提供建议", "情感管理", "7", "Problem Refinement", "GT"]
    turns = [{**turn, "accepted": None} for turn in make_row()["dialogue"]]
    rows = [
        make_row(id="missing"),
        {"id": "null", "dialogue": turns},
        {"id": "empty", "dialogue": [{**turn, "accepted": []} for turn in turns]},
        {"id": "several", "dialogue": [*turns[:2], {**turns[2], "accepted": forms}]},
        {"id": "others", "dialogue": [*turns[:2], {**turns[2], "accepted": ["1", "1"]}]},
    ]
    for one in (rows, rows[:3]):  # without a set, Parquet has no type for the column
        dialogues = read_dialogues(write_file(tmp_path / f"a{suffix}", one), strict=True)
        sets = {each.id: [[other.number for other in turn.accepted] for turn in each.turns] for each in dialogues}
        expected = {"several": [[], [], [5, 6, 7, 4, 1]], "others": [[], [], [5, 1]]}
        assert sets == {row["id"]: expected.get(row["id"], [[], [], []]) for row in one}


def test_accept_sets_change_the_evaluation_only(tmp_path):
    plain, empty, own, several, other = (
        read_dialogues(write_file(tmp_path / "a.json", [row | {"id": "a"}]))
        for row in (make_row(), *(changed(3, accepted=each) for each in ([], ["5"], ["5", "6"], ["7"])))
    )
    assert len({data_digest(each) for each in (plain, empty, own, several, other)}) == 1
    assert [accept_sets_digest(each) for each in (plain, empty, own)] == [None] * 3
    digests = [accept_sets_digest(each) for each in (several, other)]
    assert None not in digests and len(set(digests)) == 2
    reordered = read_dialogues(write_file(tmp_path / "a.json", [changed(3, accepted=["6"]) | {"id": "a"}]))
    assert accept_sets_digest(reordered) == digests[0]


def sets_of(dialogues):
    return {(each.id, n): [s.number for s in turn.accepted] for each in dialogues for n, turn in enumerate(each.turns)}


def test_a_file_of_accept_sets_replaces_those_of_the_turns_that_it_names(tmp_path, said):
    rows = [changed(3, accepted=["6"]) | {"id": name} for name in ("1", "b")]
    dialogues = read_dialogues(write_file(tmp_path / "a.json", rows))
    named = [
        {"dialogue_id": 1, "turn": 0, "accepted": ["Others"], "note": "kept out"},
        {"dialogue_id": "b", "turn": 2, "accepted": []},
        {"dialogue_id": "gone", "turn": 9, "accepted": ["1"]},
    ]
    path = write_file(tmp_path / "sets.jsonl", named)
    assert {place: numbers for place, numbers in sets_of(read_accept_sets(path, dialogues)).items() if numbers} == {
        ("1", 0): [1, 12],
        ("1", 2): [5, 6],
    }
    assert said == [f"note: {path}: 1 of 3 lines are of other dialogues, such as gone"]
    assert read_accept_sets(None, dialogues) is dialogues
    assert sets_of(dialogues)["b", 2] == [5, 6]  # the data's own are as they were


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"dialogue_id": "a", "turn": 2}, ", line 2: field accepted: missing: correct or delete the line"),
        ({"dialogue_id": "a", "turn": 2, "accepted": "1"}, ", line 2: field accepted: not a list (str): correct"),
        ({"dialogue_id": "a", "turn": 2, "accepted": None}, ", line 2: field accepted: not a list (null): correct"),
        (
            {"dialogue_id": "a", "turn": 2, "accepted": ["1", "情感管里"]},
            ", line 2: field accepted: unknown strategy ('情感管里'. Did you mean '情感管理'?): correct",
        ),
        ({"dialogue_id": "a", "turn": 1, "accepted": []}, ", line 2: field turn: 1 is no supporter turn of dialogue a"),
        ({"dialogue_id": "a", "turn": "2", "accepted": []}, ", line 2: field turn: not a whole number"),
        ({"dialogue_id": None, "turn": 2, "accepted": []}, ", line 2: field dialogue_id: not a text"),
        ({"dialogue_id": "a", "turn": 0, "accepted": []}, ", line 2: turn 0 of dialogue a stands in line 1 already"),
        (b"{", ", line 2: not JSON"),
        (None, ": no line is of these dialogues: give the ids of dialogues.jsonl"),
    ],
)
def test_a_bad_file_of_accept_sets_is_refused_with_its_place(tmp_path, line, problem):
    dialogues = read_dialogues(write_file(tmp_path / "a.json", [make_row(id="a")]))
    good = {"dialogue_id": "a" if line else "b", "turn": 0, "accepted": ["2"]}
    path = write_file(tmp_path / "sets.jsonl", [good, *([line] if line else [])])
    with pytest.raises(InputError) as refusal:
        read_accept_sets(path, dialogues)
    assert str(refusal.value).startswith(f"{path}{problem}")


@pytest.mark.parametrize(
    ("turns", "turn", "speaker"),
    [([GOOD[0], GOOD[2]], 2, "客服"), ([*GOOD[:2], *GOOD[1:]], 3, "客户"), (SAID, 2, "客户")],
)
def test_without_merging_consecutive_turns_are_refused(tmp_path, turns, turn, speaker):
    path = write_file(tmp_path / "a.jsonl", [make_row(turns), make_row(GOOD[1:])])
    report = ReadReport(str(path))
    assert [len(each.turns) for each in iter_dialogues(path, merge=False, report=report)] == [2]
    (rejected,) = report.rejected
    assert str(rejected) == message(f"{path}, row 1", turn, "speaker", f"the same speaker twice in a row ({speaker})")
    assert len(list(iter_dialogues(path))) == 2


def test_a_bad_turn_is_never_joined_away(tmp_path):
    rows = [make_row([*GOOD, ("客服", "", "请讲")]), make_row([*GOOD, ("客服", "1", " ")]), make_row()]
    path = write_file(tmp_path / "a.jsonl", rows)
    report = ReadReport(str(path))
    assert len(list(iter_dialogues(path, report=report))) == 1
    assert [(each.issues[0].turn, each.issues[0].field) for each in report.rejected] == [(4, "strategy"), (4, "text")]


def test_ids_given_twice_are_refused(tmp_path):
    first, second, third = make_rows(3)
    path = write_file(tmp_path / "a.jsonl", [first | {"id": "x"}, second | {"id": "y"}, third | {"id": "x"}])
    with pytest.raises(InputError) as refusal:
        read_dialogues(path, strict=True)
    assert str(refusal.value) == f"{path}, row 3, field id: used by an earlier row ('x')"
    assert [dialogue.id for dialogue in read_dialogues(path)] == ["x", "y"]


def test_numbers_from_zero_are_ids(tmp_path):
    path = write_file(tmp_path / "a.jsonl", [row | {"id": i} for i, row in enumerate(make_rows(3))])
    assert [dialogue.id for dialogue in read_dialogues(path, strict=True)] == ["0", "1", "2"]


def test_ids_are_stable_under_reordering(tmp_path):
    rows = [*make_rows(20), *make_rows(3)]
    ids = []
    for seed in (None, 1, 2):
        order = list(rows)
        if seed:
            random.Random(seed).shuffle(order)
        dialogues = read_dialogues(write_file(tmp_path / "a.json", order))
        ids.append({(dialogue.id, dialogue.turns) for dialogue in dialogues})
        assert len({dialogue.id for dialogue in dialogues}) == len(rows)
    assert ids[0] == ids[1] == ids[2]


def test_a_made_up_id_is_never_given_twice(tmp_path):
    """Equal rows without an id are told apart by a count, which an id given in the file must not repeat."""
    (row,) = make_rows(1)
    (plain,) = read_dialogues(write_file(tmp_path / "a.json", [row]))
    path = write_file(tmp_path / "b.jsonl", [row, row, make_row(id=f"{plain.id}-2")])
    with pytest.raises(InputError, match="row 3, field id: used by an earlier row"):
        read_dialogues(path, strict=True)


def test_the_fingerprint_depends_only_on_the_conversation():
    turns = (Turn(Speaker.SUPPORTER, "您好", BY_CODE["GT"]), Turn(Speaker.CUSTOMER, "好"))
    same = Dialogue("b", turns, "RoleCS", {"x": 1})
    assert Dialogue("a", turns).fingerprint == same.fingerprint
    others = [
        (Turn(Speaker.SUPPORTER, "您好", BY_CODE["OT"]), turns[1]),
        (Turn(Speaker.SUPPORTER, "您好！", BY_CODE["GT"]), turns[1]),
        turns[:1],
        (*turns, Turn(Speaker.SUPPORTER, "好", BY_CODE["OT"])),
    ]
    assert len({Dialogue("a", other).fingerprint for other in [turns, *others]}) == 5


LOAD = """
import os
import sys
import datasets
from csc_train.data.readers import ReadReport, iter_dialogues
from csc_train.errors import InputError

load = datasets.load_dataset
datasets.load_dataset = lambda name, **options: load(f"hub/{name}" if os.path.isdir(f"hub/{name}") else name, **options)
for name, source in zip(sys.argv[1::2], sys.argv[2::2]):
    report = ReadReport(name)
    try:
        rows = list(iter_dialogues(name, source=source, report=report))
        print([(row.id, row.source, row.turns[0].strategy.code, row.extra) for row in rows], end=" ")
        print(report.rows, report.accepted, dict(report.other_sources))
    except InputError as error:
        print(error)
sys.stdout.flush()
os._exit(0)  # at its ordinary end a thread of the Parquet reader, still running, aborts the process now and then
"""


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["answers", "is switched off", "cannot be reached"])
def test_a_data_set_id_is_loaded_by_datasets(tmp_path, hub):
    """`datasets` takes a directory for a data set of the hub, so this is its real path without network."""
    directory = tmp_path / "hub" / "DianJin" / "DianJin-CSC-Data" / "data"
    directory.mkdir(parents=True)
    rows = [*make_rows(2, source="RoleCS", topic="a"), make_row(source="CSConv", topic="b", id="z")]
    rows = [{"id": f"r{i}"} | row for i, row in enumerate(rows)]
    write_file(directory / "train-00000-of-00001.parquet", rows)

    name = "DianJin/DianJin-CSC-Data"
    # A data set that is not there is not asked for where the hub seems to answer.
    wanted = [name, "CSConv", name, "x", *(["DianJin/none", ""] if hub != "answers" else [])]
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if hub == "cannot be reached":
        listening.close()
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": str(int(hub == "is switched off")),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-c", LOAD, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    selected, unknown, *missing = done.stdout.splitlines()
    assert selected == f"{[('z', 'CSConv', 'GT', {'topic': 'b'})]} 3 1 {{'RoleCS': 2}}"
    assert unknown == f"{name}: no row has source 'x'; found: 'RoleCS' (2), 'CSConv' (1)"
    why = "HF_HUB_OFFLINE is set" if hub == "is switched off" else f"http://127.0.0.1:{port} cannot be reached"
    refused = f"DianJin/none: cannot load the data set from the Hugging Face hub: {why} and the cache has no copy"
    assert missing == ([] if hub == "answers" else [refused])
    listening.close()


def write_chats(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_messages(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chats_are_read_with_their_own_system_prompt_and_read_back_as_written(tmp_path):
    system = {"role": "system", "content": " Be brief. "}
    twice = [*chat_messages("Hi"), *chat_messages("there", "Hello!")]
    rows = (
        {"id": "a", "messages": [system, *chat_messages("2+2?", "4")], "tag": 1},
        {"messages": chat_messages("Hi", "Hello!")},
        {"id": 3, "messages": twice, "dialogue": "a column like any other"},
    )
    report = ReadReport("chats")
    chats = list(iter_dialogues(write_chats(tmp_path / "a.jsonl", *rows), check=check_chat, report=report))
    first, _, joined = chats
    assert [(chat.kind, chat.system) for chat in chats] == [("chat", "Be brief."), ("chat", ""), ("chat", "")]
    assert first.extra == {"tag": 1} and joined.extra == {"dialogue": "a column like any other"}
    assert [turn.text for turn in joined.turns] == ["Hi there", "Hello!"] and report.merged == 1
    assert all(turn.strategy is None for chat in chats for turn in chat.turns)
    again = write_chats(tmp_path / "b.jsonl", *(chat.row() for chat in chats))
    assert read_dialogues(again, check=check_chat) == chats
    assert data_digest(chats) == data_digest(read_dialogues(again, check=check_chat))
    other = Dialogue(first.id, first.turns, kind="chat", system="Be long.")
    assert len({first.fingerprint, other.fingerprint, Dialogue("a", first.turns).fingerprint}) == 3


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"dialogue": []}, "field messages: missing"),
        ({"messages": {}}, "field messages: not a list"),
        ({"messages": ["Hi"]}, "turn 1, field turn: not an object (str)"),
        ({"messages": chat_messages("a", "b", roles=("user", "tool"))}, "turn 2, field role: unknown role ('tool')"),
        ({"messages": chat_messages("a", "b", roles=("user", "system"))}, "turn 2, field role: only the first message"),
        ({"messages": chat_messages("a", " ")}, "turn 2, field content: empty"),
        ({"messages": chat_messages("a", None)}, "turn 2, field content: not a text (NoneType)"),
        ({"messages": chat_messages("a")}, "field dialogue: no supporter turn"),
    ],
)
def test_a_bad_chat_is_rejected_with_its_place(tmp_path, row, reason):
    with pytest.raises(InputError, match=re.escape(f"row 1, {reason}")):
        read_dialogues(write_chats(tmp_path / "a.jsonl", row), check=check_chat)
