"""Converters: each published shape, in own words, becomes a file that reads back; what does not fit is counted."""

import gzip
import json
import re
import shlex
import threading
from collections import Counter

import pytest
from conftest import ROOT, load_recipe
from processes import TIMEOUT_S, Script

from csc_train.config.compose import compose
from csc_train.conversion.labelling import label_agreement
from csc_train.conversion.strategy_table import read_table
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import read_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.jsonl import read_jsonl

ESCONV = {
    "experience_type": "Current Experience", "emotion_type": "anxiety", "problem_type": "job crisis",
    "situation": "The shop may close.", "survey_score": {"seeker": {"relevance": "4"}, "supporter": {}},
    "dialog": [
        {"speaker": "supporter", "annotation": {"strategy": "[Others]"}, "content": "Hello there\n"},
        {"speaker": "seeker", "annotation": {}, "content": " Our shop may close."},
        {"speaker": "supporter", "annotation": {"strategy": "Reflection of feelings"}, "content": "That is hard."},
        {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": "Since when?"},
        {"speaker": "seeker", "annotation": {"feedback": "5"}, "content": "Since May."},
        {"speaker": "supporter", "annotation": {"strategy": "Providing Suggestions"}, "content": "Ask the owner."},
    ],
}  # fmt: skip
FAILED_ESCONV = {
    "dialog": [
        {"speaker": "listener", "annotation": {"strategy": "Questions"}, "content": "How are you?"},
        {"speaker": "speaker", "annotation": {"feedback": "1"}, "content": "Bad."},
        {"speaker": "speaker", "annotation": {}, "content": "Bad."},
        {"speaker": "listener", "annotation": {"strategy": "Direct Guidance"}, "content": "Sleep more."},
        {"speaker": "listener", "annotation": {}, "content": "Or less."},
    ]
}
ABCD = {
    "convo_id": 7001,
    "scenario": {"flow": "account_access", "subflow": "recover_password", "order": {"order_id": "12"}},
    "original": [
        ["agent", "Hello, how can I help?"], ["customer", "I forgot my password."], ["agent", "Your name, please?"],
        ["customer", "Ann Lee."], ["action", "Account has been pulled up for Ann Lee."], ["agent", "Found you."],
        ["agent", "One moment."], ["customer", "Fine."], ["action", "A password has been generated."],
        ["customer", "Thanks."], ["agent", "Bye!"],
    ],
}  # fmt: skip
STEPS = {4: ("take_action", "pull-up-account"), 8: ("take_action", "make-password"), 10: ("end_conversation", None)}
ABCD["delexed"] = [
    {"speaker": speaker, "text": text.lower(), "turn_count": number + 1, "candidates": [], "targets": [
        "recover_password", *STEPS.get(number, (None if speaker == "customer" else "retrieve_utterance", None)), [], -1,
    ]}
    for number, (speaker, text) in enumerate(ABCD["original"])
]  # fmt: skip
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "My bill is wrong."},
        {"from": "function_call", "value": '{"name": "bill", "arguments": "{}"}'},
        {"from": "observation", "value": "12 euros"},
        {"from": "gpt", "value": "[Problem Refinement] Which month?"},
        {"from": "human", "value": "May."},
        {"from": "gpt", "value": "[信息传达]五月是 12 欧元。"},
    ],
    "system": "You are kind.",
    "tools": '[{"name": "bill"}]',
}
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "My bill "}, {"type": "text", "text": "is wrong."}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "b"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12"},
        {"role": "assistant", "content": "[PR] Which month?", "refusal": None},
        {"role": "user", "content": "May."},
        {"role": "assistant", "content": "It was 12.", "strategy": "ID"},
    ]
}
CSV = """\
dialogue_id;speaker;text;strategy
1;Agent;Hello;GT
2;customer;Hi;
1;customer;"Help; please";
1;agent;Sure;RI
2;agent;Yes?;4
"""

BY_HAND = Dialogue("s", (
    Turn(Speaker.SUPPORTER, "Hello", STRATEGIES[0]), Turn(Speaker.CUSTOMER, "Hi"),
    Turn(Speaker.SUPPORTER, "When?", STRATEGIES[6]), Turn(Speaker.CUSTOMER, "Now"),
    Turn(Speaker.SUPPORTER, "Bye", STRATEGIES[10]),
))  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Converts records and returns the dialogues read back, and the counts by (what, name)."""
    monkeypatch.chdir(tmp_path)

    def convert(form, records, *overrides):
        text = records if isinstance(records, str) else json.dumps(records)
        (tmp_path / f"in.{'csv' if form == 'csv' else 'json'}").write_text(text, encoding="utf-8")
        source = f"input=in.{'csv' if form == 'csv' else 'json'}"
        load_recipe("convert").main(compose("convert", [f"from={form}", source, "output=out/a.jsonl", *overrides]))
        counts = json.loads((tmp_path / "out/_a.report.json").read_text(encoding="utf-8"))["counts"]
        counted = Counter({(row["what"], row["name"]): row["count"] for row in counts})
        if "kind=chat" in overrides:
            return [json.loads(line) for line in (tmp_path / "out/a.jsonl").open(encoding="utf-8")], counted
        return read_dialogues(tmp_path / "out", strict=True), counted

    return convert


def strategies(dialogue):
    return [dialogue.turns[turn].strategy.code for turn in dialogue.supporter_turns]


def test_esconv_and_failed_esconv(run):
    (one, other), counts = run("esconv", [ESCONV, FAILED_ESCONV])
    assert strategies(one) == ["OT", "EM", "PS"] and strategies(other) == ["PR", "PS"]
    assert [each.code for each in one.turns[2].accepted] == ["EM", "PR"]
    assert one.turns[0].text == "Hello there" and one.turns[2].text == "That is hard. Since when?"
    assert one.source == "esconv" and one.extra["emotion_type"] == "anxiety"
    assert other.turns[0].speaker is Speaker.SUPPORTER and other.turns[1].text == "Bad. Bad."
    assert counts["turns", "joined to the one before"] == 3 and counts["turns", "written"] == 8
    assert counts["label", "[Others] -> Others"] == 1


def test_abcd_actions_label_the_agent_and_are_dropped(run):
    (filled,), counts = run("abcd", [ABCD], "unlabelled=OT")
    assert filled.id == "7001" and filled.extra == {"flow": "account_access", "subflow": "recover_password"}
    assert strategies(filled) == ["OT", "OT", "IV", "AC"]
    assert "pulled up" not in filled.text and filled.turns[5].text == "Fine. Thanks."
    assert counts["dropped", "action"] == 2 and counts["turns", "of the supporter without a label"] == 2


def test_without_a_label_a_dialogue_is_left_out_with_its_place(run, tmp_path):
    with pytest.raises(InputError, match=r"in.json, row 1: turn 1: no label: none of 1 records fits format=abcd"):
        run("abcd", [ABCD])
    assert not (tmp_path / "out").exists()
    _, counts = run(
        "esconv", [ESCONV, {"dialog": [{"speaker": "supporter", "content": "Hm", "strategy": "Informatoin"}]}, 3]
    )
    rows = [json.loads(line) for line in (tmp_path / "out/_a.rejected.jsonl").open(encoding="utf-8")]
    assert [row["row"] for row in rows] == [2, 3]
    assert rows[0]["reason"].startswith("turn 1: unknown label ('Informatoin'.")
    assert rows[1]["reason"] == "not an object (int)"
    assert counts["left out", "unknown label"] == 1 and counts["records", "written"] == 1
    assert sum(count for (what, _), count in counts.items() if what == "unknown label") == 1


def test_sharegpt_and_openai_with_labels_in_brackets_or_a_field(run):
    (one,), counts = run("sharegpt", [SHAREGPT])
    assert strategies(one) == ["PR", "ID"] and one.turns[1].text == "Which month?"
    for name in ("function_call", "observation", "tools", "system"):
        assert counts["dropped", name] == 1, name
    (two,), counts = run("openai", [OPENAI], "if_exists=replace")
    assert strategies(two) == ["PR", "ID"] and two.turns[0].text == "My bill is wrong."
    assert counts["dropped", "tool calls"] == counts["dropped", "tool"] == counts["dropped", "developer"] == 1


def test_chats_need_no_labels(run):
    (row,), _ = run("sharegpt", [SHAREGPT], "kind=chat")
    assert [each["role"] for each in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][2]["content"].startswith("[Problem Refinement]") and row["source"] == "sharegpt"


def test_csv_by_the_names_of_its_columns(run):
    (one, two), _ = run("csv", CSV)
    assert (one.id, strategies(one), one.turns[1].text) == ("1", ["GT", "RI"], "Help; please")
    assert strategies(two) == ["PR"]
    with pytest.raises(InputError, match=r"column 'who' is missing; found dialogue_id, .*: say columns.speaker=NAME"):
        run("csv", CSV, "columns.speaker=who", "if_exists=replace")
    with pytest.raises(InputError, match=r"turn 1: unknown speaker 'Ann': say who it is by \+speakers"):
        run("csv", "dialogue_id,speaker,text\n1,Ann,Hi\n", "if_exists=replace")
    (named,), _ = run("csv", "dialogue_id,speaker,text\n1,Ann,[GT]Hi\n", "if_exists=replace", "+speakers.Ann=supporter")
    assert strategies(named) == ["GT"] and named.turns[0].text == "Hi"


def test_several_files_are_one_input_and_each_row_names_its_file(run, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(FAILED_ESCONV) + "\n[]\n", encoding="utf-8")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/c.ndjson").write_text(json.dumps(ESCONV | {"situation": "Another."}), encoding="utf-8")
    found, counts = run("esconv", [{"dialog": 1}, ESCONV], "input=[in.json,b.jsonl,parts]")
    assert [len(each.turns) for each in found] == [5, 3, 5] and found[2].extra["situation"] == "Another."
    assert counts["records", "read"] == 5 and counts["left out", "not an object"] == 1
    rows = [row for _, row in read_jsonl(tmp_path / "out/_a.rejected.jsonl")]
    assert [(row["file"], row["row"]) for row in rows] == [("in.json", 1), ("b.jsonl", 2)]
    with pytest.raises(InputError, match=r"^c\.json: cannot read: No such file"):
        run("esconv", [ESCONV], "input=[in.json,c.json]", "if_exists=replace")
    with pytest.raises(InputError, match=r"^output=out/a\.jsonl: is the input"):
        run("esconv", [ESCONV], "input=[in.json,out/a.jsonl]", "if_exists=replace")


def test_csv_files_are_read_compressed_and_in_their_encoding(run, tmp_path):
    text = "dialogue_id,speaker,text\n甲,客服,[GT]您好\n甲,客户,你好\n"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode("gb18030")))
    (tmp_path / "b.tsv").write_bytes(text.replace(",", "\t").replace("甲", "乙").encode("gb18030"))
    (one, two), _ = run("csv", "", "input=[a.csv.gz,*.tsv]", "encoding=gb18030")
    assert (one.id, two.id, one.turns[0].text) == ("甲", "乙", "您好")
    with pytest.raises(InputError, match=r"^b\.tsv, line 2: not UTF-8 at byte 0: try data\.encoding=gb18030 \(convert"):
        run("csv", "", "input=b.tsv", "if_exists=replace")
    (tmp_path / "c.csv").write_bytes("dialogue_id,speaker,text\n甲\n".encode("gb18030")[:-2] + b"\xff\n")
    with pytest.raises(InputError, match=r"^c\.csv, line 2, byte 25 of the file: not gb18030: give its own"):
        run("csv", "", "input=c.csv", "if_exists=replace", "encoding=gb18030")
    cut = gzip.compress(text.encode())[:-9]
    (tmp_path / "a.csv.gz").write_bytes(cut)
    with pytest.raises(InputError, match=r"^a\.csv\.gz: cannot read: "):
        run("csv", "", "input=a.csv.gz", "if_exists=replace")


def test_a_model_labels_what_has_no_label_and_is_not_asked_again(run, tmp_path):
    (tmp_path / "hand.jsonl").write_text(json.dumps(BY_HAND.row()) + "\n", encoding="utf-8")
    (filled,), counts = run("abcd", [ABCD], "label=fill", "llm=mock", "label_sample=hand.jsonl")
    assert strategies(filled) == ["GT", "PR", "IV", "AC"] and counts["turns", "labelled by the model"] == 2
    log = (tmp_path / "out/_a.answers.jsonl").read_text(encoding="utf-8")
    assert len(log.splitlines()) == 2
    report = json.loads((tmp_path / "out/_a.report.json").read_text(encoding="utf-8"))
    # Hand 1, 7, 11; rule 1, 4, 11: p = 2/3, e = (1 + 0 + 0 + 1) / 9, so (2/3 - 2/9) / (1 - 2/9) = 4/7.
    assert report["agreement"]["kappa"] == pytest.approx(4 / 7)
    assert report["agreement"]["accuracy"] == pytest.approx(200 / 3) and report["agreement"]["turns"] == 3
    (every,), counts = run("abcd", [ABCD], "label=llm", "llm=mock", "if_exists=replace")
    assert strategies(every) == ["GT", "PR", "ID", "AC"] and counts["turns", "labelled by the model"] == 4
    assert (tmp_path / "out/_a.answers.jsonl").read_text(encoding="utf-8") == log


@pytest.mark.slow
def test_a_killed_labelling_asks_only_for_the_rest(run, tmp_path, fault_server):
    """Six dialogues; the process is killed while the fourth question waits for its answer."""
    records = [ABCD | {"convo_id": number, "original": [["agent", f"Hello, case {number}."], *ABCD["original"][1:]]}
               for number in range(6)]  # fmt: skip
    waiting, killed = threading.Event(), threading.Event()

    def answer(body):
        if len(fault_server.bodies) == 4:
            waiting.set()
            killed.wait(TIMEOUT_S)
        return '{"strategies": [1, 4, 7, 11]}'

    fault_server.answer = answer
    (tmp_path / "in.json").write_text(json.dumps(records), encoding="utf-8")
    served = ["label=llm", "llm=openai", f"llm.base_url={fault_server.base_url}", "llm.model=small",
              "llm.api_key_env=null", "llm.concurrency=1"]  # fmt: skip
    words = ["from=abcd", "input=in.json", "output=out/a.jsonl", *served]
    process = Script(ROOT / "recipes/convert.py", *words, cwd=tmp_path)
    try:
        while not waiting.wait(0.1):
            assert process.poll() is None, process.stderr
    finally:
        process.kill()
        killed.set()
    assert process.wait().returncode == -9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_a.answers.jsonl"]
    found, counts = run("abcd", records, *served)
    assert [strategies(each) for each in found] == [["GT", "PR", "ID", "AC"]] * 6
    assert counts["turns", "labelled by the model"] == 24
    asked = Counter(re.search(r"case \d", body["messages"][0]["content"])[0] for body in fault_server.bodies)
    assert asked == {f"case {number}": 1 + (number == 3) for number in range(6)}


def test_agreement_without_answers_is_undefined():
    assert label_agreement([], []) == {"turns": 0, "accuracy": None, "kappa": None, "failed": 0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["from=sharegtp"], r"format=sharegtp: choose one of .* Did you mean 'sharegpt'\?"),
        (["label=llm"], "label=llm: name the model by llm="),
        (["llm=mock"], "label=given asks no model"),
        (["label=fill", "llm=mock", "kind=chat"], "kind=chat has no labels"),
        (["input=[]"], r"input=\[\]: give a file"),
        (["encoding=gb18300"], r"encoding=gb18300: no encoding of texts .* Did you mean 'gb18030'\?"),
        (["output=a.txt"], "output=a.txt: cannot write this file type"),
        (["+speakers.Ann=boss"], "choose one of supporter, customer, system, drop"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(InputError, match=message):
        compose("convert", ["from=csv", "input=x", "output=y.jsonl", *overrides])


def test_an_output_that_exists_is_kept(run, tmp_path):
    run("esconv", [ESCONV])
    with pytest.raises(InputError, match=r"output=out/a.jsonl: exists: .*if_exists=replace"):
        run("esconv", [FAILED_ESCONV])
    assert read_dialogues(tmp_path / "out")[0].turns[0].text == "Hello there"
    with pytest.raises(InputError, match=r"unlabelled=XX: .*choose one of ours"):
        run("esconv", [ESCONV], "if_exists=replace", "unlabelled=XX")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Question: {strategy: Problem Refinment, reason: It asks.}",
            r"key 'Question': unknown .* Did you mean 'Problem",
        ),
        (
            "Question: {strategy: PR, reason: It asks.}\nQuestion: {strategy: RP, reason: No.}",
            r"line \d: found duplicate key",
        ),
        ("Question: {strategy: PR, reason: It asks.}\n'[question]': {strategy: RP, reason: No.}", "stands twice"),
        ("Question: {strategy: PR}", "key 'Question': found strategy: give strategy and reason"),
        ("Question: {strategy: PR, reason: ''}", "reason is missing"),
        ("Question: PR", "key 'Question': found 'PR'"),
        ("- Question", "no table"),
        ("", "no table"),
        ("Question: {", r"line \d.*mend the YAML"),
    ],
)
def test_a_bad_table_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_of_the_users_own(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("Question: {strategy: IV, reason: Ours ask who it is.}\n", encoding="utf-8")
    record = {"dialog": [{"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": "Who?"}]}
    (one,), _ = run("esconv", [record], "strategies=mine.yaml")
    assert strategies(one) == ["IV"]


@pytest.mark.parametrize("name", ["esconv", "abcd"])
def test_the_bundled_tables_are_whole(name):
    table = read_table(ROOT / f"csc_train/conversion/strategies.{name}.yaml")
    assert len(table) == {"esconv": 13, "abcd": 33}[name]


def test_every_command_of_the_page_works(run, tmp_path):
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## Other data sets")[2].partition("\n## ")[0]
    commands = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", " ").strip().splitlines()
    ]
    for name, content in {"ESConv": [ESCONV], "abcd_sample": [ABCD], "sharegpt": [SHAREGPT]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "calls.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.csv.gz").write_bytes(gzip.compress(CSV.replace("\n", "\nmore-").encode()))
    (tmp_path / "hand.jsonl").write_text(json.dumps(BY_HAND.row()) + "\n", encoding="utf-8")
    for words in commands:
        served = [word for word in words[2:] if not word.startswith("llm")]
        config = compose("convert", words[2:])
        load_recipe("convert").main(config if served == words[2:] else compose("convert", [*served, "llm=mock"]))
    assert len(commands) == 4 and len(read_dialogues(tmp_path / "data/abcd.jsonl")) == 1
