"""Files of dialogues as users have them: containers, compressions, encodings; what is refused, and how it is said."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from csc_train.data.config import DataConfig, DialogueSourceConfig
from csc_train.data.readers import read_dialogues
from csc_train.data.splits import read_splits
from csc_train.errors import InputError
from csc_train.synthesis.csconv.build import BUNDLED_CALLS, read_calls


def make_rows(count, first=0):
    return [
        {
            "id": str(n),
            "dialogue": [
                {"speaker": "客服", "strategy": "1", "text": f"您好{n}。\n"},
                {"speaker": "客户", "strategy": None, "text": "在\u2028吗"},
            ],
        }
        for n in range(first, first + count)
    ]


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def zst(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


ROWS = make_rows(3)
LINES = lines(ROWS)
TEXT = LINES.encode()
NAN = float("nan")
SHAPES = {
    "bom_crlf.jsonl": ("\ufeff" + LINES.replace("\n", "\r\n")).encode(), "x.ndjson": TEXT, "X.JSONL": TEXT,
    "x.jsonl.gz": gzip.compress(TEXT), "X.NDJSON.GZ": gzip.compress(TEXT),
    "list.json.zst": zst(json.dumps(ROWS).encode()),
    "members.jsonl.gz": gzip.compress(TEXT[:40]) + gzip.compress(TEXT[40:]),
    "frames.jsonl.zst": zst(TEXT[:40]) + zst(TEXT[40:]),
    "lines.json": TEXT, "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "float_id.jsonl": lines([row | {"id": float(row["id"]), "source": NAN} for row in ROWS]).encode(),
    "text.jsonl": lines([row | {"dialogue": json.dumps(row["dialogue"])} for row in ROWS]).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_whole(tmp_path, name):
    (tmp_path / name).write_bytes(SHAPES[name])
    dialogues = read_dialogues(tmp_path / name, strict=True)
    assert [dialogue.id for dialogue in dialogues] == ["0", "1", "2"]
    assert [turn.text for turn in dialogues[2].turns] == ["您好2。", "在\u2028吗"]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_an_encoding_is_read_if_it_is_given_and_asked_for_if_not(tmp_path, encoding, name):
    content = (json.dumps(ROWS, ensure_ascii=False) if name == "a.json" else LINES).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert len(read_dialogues(tmp_path / name, strict=True, encoding=encoding)) == 3
    with pytest.raises(InputError, match=rf"{name}, line 1: not UTF-8 at byte \d+: try data.encoding={encoding[:6]}"):
        read_dialogues(tmp_path / name)


def test_a_byte_that_does_not_decode_is_named(tmp_path):
    content = LINES.encode("gb18030").split(b"\n")
    content[1] = content[1][:20] + b"\xff" + content[1][20:]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    place = len(content[0]) + 1 + 20
    with pytest.raises(InputError, match=rf"a\.jsonl, line 2, byte {place} of the file: not gb18030"):
        read_dialogues(tmp_path / "a.jsonl", encoding="gb18030")


@pytest.mark.slow
@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
def test_a_cut_off_file_is_an_error_and_never_a_shorter_file(tmp_path, pack):
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    whole = pack(lines(make_rows(3000)).encode())
    path.write_bytes(whole)
    assert len(read_dialogues(path)) == 3000
    for end in (0, 1, 5, 12, len(whole) // 2, len(whole) - 9, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"^\S+a\.jsonl\.\w+: "):
            read_dialogues(path)
    path.write_bytes(whole + b"rubbish")
    with pytest.raises(InputError, match=r"cannot read"):
        read_dialogues(path)


def test_parts_with_different_columns_are_unified(tmp_path):
    for day, rows in (("01", make_rows(2)), ("02", [row | {"note": "回访"} for row in make_rows(2, 2)])):
        folder = tmp_path / "spark.parquet" / f"day={day}"
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part-0.parquet")
    dialogues = read_dialogues(tmp_path / "spark.parquet", strict=True)
    assert [dialogue.id for dialogue in dialogues] == ["0", "1", "2", "3"]
    assert [dialogue.extra for dialogue in dialogues] == [{}, {}, {"note": "回访"}, {"note": "回访"}]
    (tmp_path / "spark.parquet" / "a.jsonl").write_bytes(TEXT)
    with pytest.raises(InputError, match=r"spark\.parquet: holds two kinds of files, such as part-0.parquet and"):
        read_dialogues(tmp_path / "spark.parquet")


def test_a_glob_and_further_files_are_read(tmp_path):
    for name, first in (("a1.jsonl", 0), ("a2.jsonl", 40), ("b.jsonl", 80)):
        (tmp_path / name).write_text(lines(make_rows(40, first)), encoding="utf-8")
    where = DialogueSourceConfig(str(tmp_path / "a*.jsonl"), also=[str(tmp_path / "b.jsonl")])
    splits = read_splits(DataConfig(train=where))
    assert len(splits.train) + len(splits.evaluation) == 120
    with pytest.raises(InputError, match=r"c\*: no file matches"):
        read_dialogues(str(tmp_path / "c*"))


def test_too_many_rejected_rows_are_refused_with_the_reasons_by_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([*make_rows(80), {"dialog": [], "id": 1}, *[{}] * 7, 5]), encoding="utf-8")
    config = DataConfig(train=DialogueSourceConfig(str(path)))
    with pytest.raises(InputError) as refusal:
        read_splits(config, tmp_path)
    said = str(refusal.value)
    assert f"{path}: 9 of 89 rows are rejected, above data.max_rejected=0.1 (8 dialogue: missing, 1 row: " in said
    assert "fields found: dialog, id; wanted: dialogue. Did you mean 'dialog'?" in said
    assert len((tmp_path / "rejected-train.jsonl").read_text().splitlines()) == 9
    config.max_rejected = 0.11
    assert len(read_splits(config).train) > 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "gb18300"}, r"data.encoding=gb18300: no encoding.* Did you mean 'gb18030'"),
        ({"encoding": "base64"}, r"data.encoding=base64: no encoding"),
        ({"max_rejected": 1.5}, r"data.max_rejected=1.5: must be between 0 and 1"),
        ({"evaluation": DialogueSourceConfig(also=["a"])}, r"data.evaluation.also is set, but"),
    ],
)
def test_a_bad_setting_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**settings)


def test_a_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(TEXT)
    longest = max(map(len, TEXT.splitlines(keepends=True)))
    monkeypatch.setattr("csc_train.data.records.MAX_LINE", longest)
    assert len(read_dialogues(tmp_path / "a.jsonl")) == 3
    monkeypatch.setattr("csc_train.data.records.MAX_LINE", longest - 1)
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: longer than"):
        read_dialogues(tmp_path / "a.jsonl")


def test_bad_calls_are_counted_and_left_out(tmp_path, said):
    calls = BUNDLED_CALLS["zh"].read_bytes()
    path = tmp_path / "calls.jsonl.gz"
    path.write_bytes(gzip.compress(calls.rstrip() + b'\n{"turns": 1}\n{'))
    assert len(read_calls(path)) == len(calls.splitlines())
    assert "22 rows, 20 accepted, 2 rejected" in said[0]
    path.write_bytes(gzip.compress(calls.rstrip() + b"\n{" * 4))
    with pytest.raises(InputError, match=r"4 of 24 rows are rejected, above max_rejected=0\.1"):
        read_calls(path)
