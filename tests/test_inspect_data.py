"""A look at dialogues before a training: every number of a file with planted faults, a clean file, and the page."""

import html
import json
import re
from dataclasses import replace

import pytest
from conftest import SMALL_TOKENIZERS, load_recipe, small_tokenizer

from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import read_splits
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.inspection.content import read_numbered, read_numbered_mix
from csc_train.inspection.text_faults import find_text_faults
from csc_train.invisible import find_hidden
from csc_train.jsonl import write_jsonl
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

PHONE = "13912345678"
LABEL_PHONE = "15812345678"
"""In the label of a rejected row."""
MOJIBAKE = "您好".encode().decode("gbk")


def said(dialogue, place, text):
    """A row of a dialogue with another text at one place."""
    row = dialogue.row()
    row["dialogue"][place] = row["dialogue"][place] | {"text": text}
    return row


@pytest.fixture(scope="module")
def template():
    return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())


@pytest.fixture(scope="module")
def looked(tmp_path_factory, template):
    """Looks at rows, in a folder of its own: the report, and the folder with the page."""

    def look(rows, *overrides, evaluation=(), more=""):
        folder = tmp_path_factory.mktemp("look")
        paths = [f"path=[{folder}/data.jsonl{more}]"] if rows else []
        write_jsonl(folder / "data.jsonl", rows or [])
        if evaluation:
            write_jsonl(folder / "evaluation.jsonl", [each.row() for each in evaluation])
            overrides += (f"evaluation_path={folder}/evaluation.jsonl",)
        tokenizer = f"model.tokenizer={SMALL_TOKENIZERS / 'qwen2'}"
        config = compose("inspect_data", [
            *paths, tokenizer, "model.chat_template=qwen2_5", f"run.directory={folder}/run",
            f"tokenization.cache_dir={folder}/cache", *overrides,
        ])  # fmt: skip
        load_recipe("inspect_data").main(config)
        return json.loads((folder / "run" / "inspection.json").read_text(encoding="utf-8")), folder / "run"

    return look


def length(template, dialogue):
    """The tokens of the rendered chat template."""
    return len(template.tokenizer.encode(template.render(dialogue.turns), add_special_tokens=False))


@pytest.fixture(scope="module")
def planted(looked, template):
    """The report of ten rows, each but the first with one planted fault, the folder, and the dialogues of the rows."""
    dialogues = sorted(generate_sample(40, 3), key=lambda each: (length(template, each), each.id))
    shared, *others = dialogues[:8]
    long = Dialogue("long", dialogues[-1].turns)
    joined = others[6].row()
    joined["dialogue"].append(joined["dialogue"][-1] | {"text": "再见。"})
    if joined["dialogue"][-2]["speaker"] == Speaker.CUSTOMER.value:
        joined["dialogue"][-1] |= {"strategy": ""}
    wrong = others[5].row()
    wrong["dialogue"][0]["strategy"] = f"策略99，{LABEL_PHONE}"
    first = others[0].row()
    rows = [
        first,
        first | {"id": "copy"},
        said(others[0], 1, others[0].turns[1].text + "嗯") | {"id": "like"},
        said(others[1], 2, f"{MOJIBAKE}，请\u200b稍等。"),
        said(others[2], 1, f"我的电话是{PHONE}，请回电。"),
        shared.row(),
        long.row(),
        joined,
        wrong,
        others[4].row(),
    ]
    limit = length(template, long) - 1
    report, folder = looked(rows, f"packing.max_length={limit}", evaluation=[Dialogue("test", shared.turns), others[3]])
    return report, folder, dialogues, limit


@pytest.mark.slow
def test_every_planted_fault_is_counted_at_its_place(planted, template):
    report, folder, dialogues, limit = planted
    others = dialogues[1:8]
    reading = report["reading"]
    assert {name: reading[name] for name in ("rows", "accepted", "rejected", "joined_rows", "joined_turns")} == {
        "rows": 10, "accepted": 9, "rejected": 1, "joined_rows": 1, "joined_turns": 1,
    }  # fmt: skip
    (reason,) = reading["reasons"].items()
    assert (
        reason[0] == "strategy: unknown strategy" and reason[1]["rows"] == 1 and "row 9, turn 1" in reason[1]["first"]
    )
    assert json.loads((folder / "rejected.jsonl").read_text())["row"] == 9
    assert report["repeats"]["exact"] == [
        {"row": 2, "dialogue": "copy", "earlier_row": 1, "earlier": others[0].id, "similarity": 1.0}
    ]
    (near,) = report["repeats"]["near"]
    assert (near["row"], near["earlier_row"]) == (3, 1) and 0.8 <= near["similarity"] < 1
    place = {"row": 4, "dialogue": others[1].id, "turn": 3}
    assert report["faults"] == [
        place | {"kind": "mojibake", "detail": f"{MOJIBAKE} (您好)"},
        place | {"kind": "invisible character", "detail": "zero width space"},
    ]
    assert report["private"] == [
        {"row": 5, "dialogue": others[2].id, "turn": 2, "kind": "phone number", "detail": "我的电话是████，请回电。"}
    ]
    (overlap,) = report["overlap"]["overlaps"][:1]
    assert (overlap["evaluation_id"], overlap["train_id"], overlap["kind"]) == ("test", dialogues[0].id, "exact")
    assert {each["evaluation_id"] for each in report["overlap"]["overlaps"]} == {"test"}
    assert report["tokens"]["over"] == [7] and report["tokens"]["packing"]["truncated"] == 1
    longest = report["tokens"]["longest"][0]
    assert longest == {"row": 7, "dialogue": "long", "tokens": limit + 1, "turns": len(dialogues[-1].turns)} | {
        "cut_turns": longest["cut_turns"]
    }
    assert longest["cut_turns"] > 0
    assert report["attention"] == [
        "Rejected rows: 1 of 10",
        "Private data: 1 (phone number 1)",
        "Broken texts: 2 (mojibake 1, invisible character 1)",
        "Evaluation dialogues that are also here: 1 of 2",
        "Exact duplicates: 1",
        "Near duplicates: 1",
        f"Dialogues truncated at packing.max_length={limit:,}: 1",
    ]


def test_private_data_are_neither_on_the_page_nor_in_its_numbers(planted):
    report, folder, dialogues, _ = planted
    page = (folder / "inspection.html").read_text(encoding="utf-8")
    assert f"Row 5, {dialogues[3].id}" in page and "█" in page  # among the samples, too
    visible = re.sub(r"<[^>]*>", "", page)  # the digits are tokens of their own
    (reason,) = report["reading"]["reasons"].values()
    assert "unknown strategy ('策略99，███████████'" in reason["first"] and "策略99，███████████" in visible
    for number in (PHONE, LABEL_PHONE):
        assert number not in visible and number not in json.dumps(report, ensure_ascii=False)


@pytest.mark.slow
def test_a_clean_file_has_nothing_to_look_at(looked, template):
    # Controls: texts that are odd and right, and two dialogues of a topic that are not alike.
    one, other = generate_sample(2, 5)
    odd = "👨\u200d👩\u200d👧 ❤️ café，单号13912345678，已处理。朱镕基"
    texts = [f"第{number}句。" for number in range(24)]
    turns = [
        Turn(Speaker.SUPPORTER, text, STRATEGIES[number // 2]) if number % 2 else Turn(Speaker.CUSTOMER, text)
        for number, text in enumerate(texts)
    ]
    every = Dialogue("all", tuple(turns))
    first = replace(one, turns=(one.turns[0], replace(one.turns[1], text=odd), *one.turns[2:]))
    dialogues = [first, other, every]
    report, folder = looked(
        [each.row() for each in dialogues],
        "packing.max_length=4096",
        "samples=2",
        evaluation=generate_sample(2, 99),
    )
    assert report["attention"] == [] and not (folder / "rejected.jsonl").exists()
    lengths = [length(template, each) for each in dialogues]
    found = report["tokens"]["lengths"]["tokens per dialogue"]["summary"]
    assert (found["min"], found["max"], found["mean"]) == (min(lengths), max(lengths), sum(lengths) / 3)
    assert report["turns"]["summary"]["min"] == min(len(each.turns) for each in dialogues)
    counts = report["strategies"]["strategies"]["set"]
    by_hand = [sum(turn.strategy is each for own in dialogues for turn in own.turns) for each in STRATEGIES]
    assert counts == by_hand and report["supporter_turns"] == sum(by_hand)
    assert report["strategies"]["stages"]["set"] == [
        sum(by_hand[0:2]), sum(by_hand[2:5]), sum(by_hand[5:7]), sum(by_hand[7:9]), sum(by_hand[9:11]), by_hand[11]
    ]  # fmt: skip


def test_chats_are_shown_with_their_own_system_prompts_and_without_strategies(looked, template, tmp_path):
    said = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，请讲。"}]
    system = {"role": "system", "content": f"{MOJIBAKE}，电话{PHONE}。"}
    rows = [
        {"id": "own", "messages": [system, *said]},
        {"id": "none", "messages": said},
        {"id": "copy", "messages": said},
        {"id": "bad", "messages": [{"role": f"boss {LABEL_PHONE}", "content": "?"}]},
    ]
    write_jsonl(
        tmp_path / "more.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "天气？"},
                    *said[1:],
                    said[0],
                    {"role": "assistant", "content": "晴天。"},
                ]
            }
        ],
    )
    report, folder = looked(rows, "kind=chat", more=f",{tmp_path}/more.jsonl")
    assert report["strategies"] is None and report["reading"]["accepted"] == 4 and report["supporter_turns"] == 5
    assert report["path"].endswith("data.jsonl, " + f"{tmp_path}/more.jsonl")
    assert report["attention"] == [
        "Rejected rows: 1 of 5", "Private data: 1 (phone number 1)", "Broken texts: 1 (mojibake 1)",
        "Exact duplicates: 1", "Near duplicates: 1",
    ]  # fmt: skip
    assert report["private"][0]["turn"] == report["faults"][0]["turn"] == 0
    exact = report["repeats"]["exact"][0]
    assert [exact[name].rpartition("/")[2] for name in ("row", "earlier_row")] == ["data.jsonl:3", "data.jsonl:2"]
    lengths = report["tokens"]["lengths"]
    assert lengths["tokens per assistant turn"]["summary"] and lengths["tokens per user turn"]["summary"]
    page = (folder / "inspection.html").read_text(encoding="utf-8")
    assert "4 chats of" in page and "trategies" not in page.partition("</style>")[2] and LABEL_PHONE not in page
    samples = [html.unescape(re.sub(r"<[^>]*>", "", part)).replace("↵\n", "\n") for part in page.split("<h3>Row ")[1:]]
    assert len(samples) == 4
    for row in (rows[0], rows[1]):
        shown = next(each for each in samples if f", {row['id']}:" in each.partition("tokens")[0])
        rendered = template.tokenizer.apply_chat_template(
            row["messages"], chat_template=template.chat_template, tokenize=False
        )
        spelt = rendered.replace(PHONE, "█" * 11).replace("\n", "")
        assert shown.replace("\n", "").replace("system prompt", "").partition("tokens")[2].startswith(spelt), shown
        assert ("客服" in spelt) is False


@pytest.mark.slow
def test_a_reference_stands_beside_and_what_would_stop_the_training_is_said(looked, template, tmp_path):
    dialogues = sorted(generate_sample(6, 8), key=lambda each: length(template, each))
    limit = length(template, dialogues[3])
    write_jsonl(tmp_path / "reference.jsonl", [each.row() for each in dialogues])
    report, _ = looked(
        [each.row() for each in dialogues],
        f"packing.max_length={limit}",
        "packing.overflow=error",
        f"reference_path={tmp_path}/reference.jsonl",
    )
    longer = sum(length(template, each) > limit for each in dialogues)
    assert (
        f"Dialogues longer than packing.max_length={limit:,}, which stop the training: {longer}" in report["attention"]
    )
    assert not any("dropped" in each for each in report["attention"])
    strategies = report["strategies"]
    assert strategies["divergence"] == pytest.approx(0, abs=1e-9)
    assert strategies["stages"]["reference"] == strategies["stages"]["set"]


def test_data_are_read_as_a_training_reads_them(tmp_path):
    """In their encoding, and with the further files of `data.train.also`."""
    rows = [dialogue.row() for dialogue in generate_sample(6, seed=4)]
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode("gb18030"))
    config = compose("inspect_data", [
        "data=files", f"data.train.path={tmp_path}/a.jsonl", f"data.train.also=[{tmp_path}/b.jsonl]",
        "data.encoding=gb18030",
    ])  # fmt: skip
    found = read_numbered(config.data.train, config.data)
    assert [dialogue.row() for dialogue in found.dialogues] == rows
    assert found.report.accepted == 6
    assert [found.rows[0], found.rows[-1]] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:4"]


@pytest.mark.slow
def test_a_mix_is_shown_by_source_and_read_as_a_training_reads_it(looked, template, tmp_path):
    calls = [replace(dialogue, id=f"d{number}") for number, dialogue in enumerate(generate_sample(6, seed=4))]
    write_jsonl(tmp_path / "calls.jsonl", [dialogue.row() for dialogue in calls])
    texts = ((f"天空{number}", "蓝色。" * number) for number in (1, 2, 3))
    said = [[{"role": "user", "content": ask}, {"role": "assistant", "content": reply}] for ask, reply in texts]
    said[1].insert(0, {"role": "system", "content": f"电话{PHONE}。"})
    chats = [{"id": f"d{number}", "messages": messages} for number, messages in enumerate(said)]
    write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": []}])
    parts = f"{{path: {tmp_path}/calls.jsonl, weight: 1}}, {{path: {tmp_path}/chats.jsonl, weight: 1, kind: chat}}"
    mix = f"data.mix=[{parts}]"
    report, folder = looked(None, "data=mix", mix, "data.mix_unit=dialogues", "data.max_rejected=1")
    # An epoch is as large as both: 9 dialogues, so 4.5 of each source, and 4 is as near as 5.
    sources = report["tokens"]["sources"]
    found = [[part[name] for name in part if name != "tokens of an epoch"] for part in sources.values()]
    turns = sum(len(dialogue.turns) for dialogue in calls)
    assert list(sources) == ["calls", "chats"] and found == [["csc", 6, turns, 50, 0.667], ["chat", 3, 6, 50, 1.333]]
    assert report["tokens"]["packing"]["unused"] == 2 and report["tokens"]["prefix"] == len(template.prefix_ids)
    assert (report["reading"]["rows"], report["reading"]["rejected"]) == (10, 1)
    replies = sum(len(dialogue.supporter_turns) for dialogue in calls)
    assert sum(report["strategies"]["strategies"]["set"]) == replies == report["supporter_turns"] - 3
    (private,) = report["private"]
    assert (private["row"], private["dialogue"]) == (f"{tmp_path}/chats.jsonl:2", "chats/d1") and private["turn"] == 0
    config = compose("inspect_data", ["data=mix", mix, "data.max_rejected=1"])
    splits = read_splits(config.data)
    ids = {dialogue.id for dialogue in [*splits.train, *splits.evaluation]}
    assert {dialogue.id for dialogue in read_numbered_mix(config.data).dialogues} == ids
    page = (folder / "inspection.html").read_text(encoding="utf-8")
    assert '<th scope="row">chats</th><td class="text">chat</td><td>3</td><td>6</td>' in page
    assert compose("inspect_data", ["data=mix", "data.mix=[{path: a.jsonl, kind: chat}]"]).kind == "chat"


def test_mojibake_is_told_from_odd_texts():
    for broken, was in [("cafÃ©", "é"), ("æ‚¨å¥½", "您好"), (MOJIBAKE, "您好"), ("ÐŸÑ€Ð¸", "При")]:
        (fault,) = find_text_faults(f"a {broken} b")
        assert fault.kind == "mojibake" and fault.detail.endswith(f"({was})")
    for lost in ("您�好", "锟斤拷"):
        assert [each.kind for each in find_text_faults(lost)] == ["replacement character"]
    for right in (
        "café “DÜ” — naïve",
        "«Éric»",
        "±5 °C，¥¥100",
        "朱镕基、囍、堃",
        "联通",
        "ไทย العربية",
        "宄存康",
        "唯蘸芦堃",
        "👍🏽❤️",
    ):
        assert find_text_faults(right) == []
    assert find_hidden("a\u200bb\ufeffc\u202e\x07\n\t") == ["\u200b", "\ufeff", "\u202e", "\x07"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=chats"], r"kind=chats: choose one of csc, chat\. Did you mean 'chat'\?"),
        (["kind=chat", "reference_path=b.jsonl"], r"reference_path=b\.jsonl: kind=chat has no strategies"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(InputError, match=message):
        compose("inspect_data", ["path=a.jsonl", *overrides])


# The page


@pytest.fixture(scope="module")
def page(planted, browser):
    """The page of the planted file at 1280 pixels."""
    shown, asked = browser.new_page(viewport={"width": 1280, "height": 900}), []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto((planted[1] / "inspection.html").as_uri())
    assert len(asked) == 1  # the page itself
    yield shown
    shown.close()


def test_the_page_leads_to_each_finding_and_is_as_wide_as_its_window(page):
    assert page.locator("h1").inner_text() == "7 things to look at"
    links = page.locator("ul.attention a")
    assert links.count() == 7
    for target in links.evaluate_all("all => all.map(each => each.getAttribute('href'))"):
        assert page.locator(target).count() == 1
    assert page.locator("svg rect").count() > 20 and page.locator("#strategies .bars div div").count() == 18
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("rejected.jsonl", MOJIBAKE, "zero width space", "我的电话是████"):
        assert name in page.locator("main").inner_text()


def test_tokens_are_coloured_by_their_weight_and_spell_the_dialogue(page, planted, template):
    dialogues = planted[2]
    samples = page.locator("div.tokens")
    assert samples.count() == 9  # of ten asked for: all
    kept = dialogues[-1].turns[planted[0]["tokens"]["longest"][0]["cut_turns"] :]
    spelt = "".join(samples.nth(0).locator("i").evaluate_all("all => all.map(each => each.textContent)"))
    assert spelt.count("<|im_end|>") == len(kept) and f"user↵\n{kept[0].text}" in spelt[: len(kept[0].text) + 30]
    whole = page.locator("section#samples h3").evaluate_all("all => all.map(each => each.innerText)")
    assert "Row 7, long" in whole[0] and "leading turns cut" in whole[0] and f"Row 6, {dialogues[0].id}" in whole[1]
    shown = samples.nth(1).locator("i").evaluate_all("all => all.map(each => each.textContent)")
    rendered = template.render(dialogues[0].turns)
    first = rendered.index(dialogues[0].turns[0].text)
    assert rendered.endswith("".join(shown).replace("↵", "")) and dialogues[0].turns[0].text in "".join(shown)
    assert first > 0 and samples.nth(1).locator("i.control").count() == 2 * len(dialogues[0].turns)
    replies = samples.nth(1).locator(".is-reply").evaluate_all("all => all.map(each => each.textContent)")
    supporter = [turn for turn in dialogues[0].turns if turn.strategy]
    assert replies == [f"{turn.text}<|im_end|>" for turn in supporter]
    labels = samples.nth(1).locator(".is-strategy").evaluate_all("all => all.map(each => each.textContent)")
    assert labels == [f"[{turn.strategy.zh}]" for turn in supporter]
    ground = "each => getComputedStyle(each).backgroundColor"
    colours = {
        kind: samples.nth(1).locator(f".is-{kind} i").first.evaluate(ground)
        for kind in ("context", "strategy", "reply")
    }
    assert len(set(colours.values())) == 3 and colours["context"] == "rgba(0, 0, 0, 0)"
