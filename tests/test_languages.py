"""Languages: the table and its third row, which language dialogues are in, and what follows: words, metrics, labels."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import load_recipe, small_tokenizer

from csc_train.config.compose import compose
from csc_train.data import languages
from csc_train.data.config import LANGUAGE_CODES
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.languages import LANGUAGES, detect_language, get_language, register_language
from csc_train.data.overlap import NGRAM, Overlap, find_shared_text
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits
from csc_train.data.strategies import STRATEGIES, Stage, parse_strategy
from csc_train.errors import InputError
from csc_train.evaluation.config import HumanConfig, JudgeConfig, MetricsConfig
from csc_train.evaluation.contamination import find_contamination
from csc_train.evaluation.evaluated_model import read_language, write_evaluated
from csc_train.evaluation.judges.annotation_form import draw_annotation_form
from csc_train.evaluation.judges.llm_judge import judge_questions
from csc_train.evaluation.report.tables import results_markdown
from csc_train.evaluation.scoring import context_drift, score_predictions
from csc_train.evaluation.table import align_tables
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.generator import generate_predictions
from csc_train.inference.predictions import Prediction, write_predictions
from csc_train.synthesis.config import NUM_STRATEGIES
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply, format_reply, parse_reply
from csc_train.template.system_prompt import language_note, prompt_language, system_prompt

FRENCH = "Bonjour, votre commande est prête depuis ce matin."
CHINESE = "您好，很高兴为您服务，您购买的手机 V15 今天上午已经发出。"
ENGLISH = "Hello, your order has shipped from 北京."
MINIMAL = {
    "code": "xx",
    "strategies": {strategy.number: (f"Name {strategy.code}", f"Meaning {strategy.code}") for strategy in STRATEGIES},
    "stages": {stage.name: stage.name.title() for stage in Stage},
    "supporter": "S",
    "customer": "C",
    "opening": "(Call.)",
    "system_prompt": "{{ mode }}{% for each in strategies %} {{ each.number }} {{ each.name }}{% endfor %}",
}


@pytest.fixture
def forgotten():
    """What the test registers is forgotten."""
    yield
    for code in [*LANGUAGES][2:]:
        del LANGUAGES[code]
    del LANGUAGE_CODES[2:]


def dialogue(name, texts):
    """A dialogue of supporter and customer in turns."""
    turns = [
        Turn(Speaker.CUSTOMER, text) if index % 2 else Turn(Speaker.SUPPORTER, text, STRATEGIES[index % 12])
        for index, text in enumerate(texts)
    ]
    return Dialogue(name, tuple(turns))


# --- the table ---


def test_the_taxonomy_has_as_many_strategies_and_stages_as_each_language():
    assert languages.NUM_STRATEGIES == NUM_STRATEGIES == len(STRATEGIES)
    assert [stage.name for stage in Stage] == list(languages.STAGE_NAMES)
    assert [*LANGUAGES] == LANGUAGE_CODES == ["zh", "en"]
    for language in LANGUAGES.values():
        assert list(language.strategies) == [strategy.number for strategy in STRATEGIES]
        assert list(language.stages) == list(languages.STAGE_NAMES)
    with pytest.raises(InputError, match=r"^language=eng: choose one of zh, en\. Did you mean 'en'\?"):
        get_language("eng")


@pytest.mark.usefixtures("forgotten")
def test_a_registered_language_names_labels_speakers_and_prompt():
    shuffled = dict(sorted(MINIMAL["strategies"].items(), reverse=True))
    language = register_language(**MINIMAL | {"strategies": shuffled})
    assert get_language("xx") is language and LANGUAGE_CODES[-1] == "xx"
    assert (language.profiles, language.spaced_words, language.texts) == (("en",), True, "en")
    assert system_prompt("given", "xx").startswith("given 1 Name GT 2 Name IV ")
    assert Speaker.SUPPORTER.title("xx") == "S" and Stage.EXPLORING.title("xx") == "Exploring"
    for strategy in STRATEGIES:
        said = Reply(strategy, "Halo")
        assert format_reply(said, "xx") == f"[Name {strategy.code}]Halo"
        assert parse_reply(format_reply(said, "xx")) == said
        assert parse_strategy(f"策略{strategy.number} Name {strategy.code}") is strategy
    with pytest.raises(InputError, match=r"^language xx: the code is taken; taken are zh, en, xx: choose another"):
        register_language(**MINIMAL)


def with_name(number, name):
    return {"strategies": MINIMAL["strategies"] | {number: (name, "")}}


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"greeting": "?"}, "language: unknown field 'greeting'"),
        ({"openin": "?"}, "language: unknown field 'openin'. Did you mean 'opening'?"),
        ({"customer": None}, "language: the field 'customer' is missing; give customer"),
        ({"texts": "fr"}, "language xx: texts=fr: choose one of zh, en."),
        ({"stages": {"CONNECTING": "?"}}, "language xx: stages: give one entry for each of CONNECTING, IDENTIFYING, "),
        ({"strategies": {1: ("A", "B")}}, "language xx: strategies: give one entry for each of 1, 2, "),
        ({"system_prompt": "{{ mood }}"}, "language xx: system_prompt: UndefinedError: 'mood' is undefined"),
        ({"system_prompt": "{% if %}"}, "language xx: system_prompt: TemplateSyntaxError: "),
        (with_name(5, "Greeting"), "language xx: the name 'Greeting' of strategy 5 is that of another one"),
        (with_name(5, "Name GT"), "language xx: the name 'Name GT' of strategy 1 is that of another one"),
        (with_name(5, "[x]"), "language xx: the name '[x]' of strategy 5: begin with a letter; no brackets, no +"),
        (with_name(5, "5"), "language xx: the name '5' of strategy 5: begin with a letter"),
        (with_name(5, "x "), "language xx: the name 'x ' of strategy 5: begin with a letter"),
        (with_name(5, ""), "language xx: the name '' of strategy 5: begin with a letter"),
    ],
)
def test_a_language_that_could_not_be_read_back_is_refused(change, message):
    with pytest.raises(InputError) as refusal:
        register_language(**MINIMAL | change)
    assert str(refusal.value).startswith(message)
    assert [*LANGUAGES] == LANGUAGE_CODES == ["zh", "en"]


@pytest.mark.usefixtures("forgotten")
def test_a_strategy_may_have_one_name_in_two_languages():
    register_language(**MINIMAL | with_name(1, "Greeting"))
    assert parse_strategy("Greeting") is STRATEGIES[0]


@pytest.mark.usefixtures("forgotten")
def test_other_labels_are_another_template_though_the_prompt_does_not_show_them():
    def fingerprint(mode, **change):
        LANGUAGES.pop("xx", None)
        register_language(**MINIMAL | {"system_prompt": "Help."} | change)
        return DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode, "xx")).fingerprint

    for mode, same in (("joint", False), ("given", False), ("reply_only", True)):
        assert (fingerprint(mode) == fingerprint(mode, **with_name(5, "Feeling"))) is same


# --- the language of dialogues ---


@pytest.mark.slow
def test_the_language_of_most_dialogues_is_found():
    assert detect_language([]) == (None, 0)
    assert detect_language(["123 ❤", "OK, bye"]) == (None, 1)
    assert detect_language([CHINESE, FRENCH, FRENCH]) == ("fr", pytest.approx(2 / 3))
    assert detect_language(each.text for each in generate_sample(20, seed=3)) == ("zh", 1)


def test_chinese_is_told_by_its_writing_and_japanese_is_not_taken_for_it(monkeypatch):
    assert detect_language(["ご注文商品の配送状況は現在確認中です。少々お待ちください。"])[0] == "ja"
    assert detect_language(["注文商品配送状況確認中です"])[0] != "zh"
    monkeypatch.setattr("csc_train.data.languages._identifier", None)  # a call would raise
    assert detect_language([CHINESE, "订单号 A-12345 已发货。"]) == ("zh", 1)
    with pytest.raises(TypeError):
        detect_language([CHINESE, ENGLISH])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("texts", "theirs"),
    [
        ([CHINESE], "zh"),
        ([ENGLISH], "en"),
        ([CHINESE, CHINESE, ENGLISH], "zh"),
        ([ENGLISH, ENGLISH, CHINESE], "en"),
        ([FRENCH], "fr"),
        (["123 ❤"], None),
        ([], None),
    ],
)
def test_a_prompt_in_another_language_than_the_dialogues_is_noted(texts, theirs, language, caplog):
    dialogues = [dialogue(str(number), [text]) for number, text in enumerate(texts)]
    note = language_note(dialogues, language)
    assert prompt_language(dialogues, None) == {None: "zh", "fr": "en"}.get(theirs, theirs)
    assert prompt_language(dialogues, TemplateConfig(language=language)) == language
    if theirs in (None, language):
        assert note is None
    else:
        advice = "add theirs as docs/extending.md says" if theirs == "fr" else f"choose template.language={theirs} "
        assert f"are in the language {theirs}, but template.language={language}: {advice}" in note


# --- words ---

LONG = "We have checked your parcel and it is waiting at the depot in Leeds until Friday evening."  # 17 words


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([LONG], 1),
        ([LONG.upper().replace(" and ", ", and ")], 1),  # blind to case and punctuation
        ([LONG.replace("Leeds", "York")], 1 / 5),  # word 14 of 17: all but the first of five n-grams hold it
        ([" ".join(LONG.split()[:12]), " ".join(LONG.split()[12:])], None),  # within turns
    ],
)
def test_english_text_is_shared_by_n_grams_of_words(texts, share):
    train, evaluation = [dialogue("t", texts)], [dialogue("e", [LONG, "Okay, thank you very much indeed."])]
    assert len(LONG.split()) == NGRAM + 4
    found = find_shared_text(train, evaluation, threshold=0.1, language="en")
    assert found == ([] if share is None else [Overlap("t", "e", "shared", pytest.approx(share))])


def test_what_two_english_calls_have_in_common_is_no_overlap_by_words():
    stock = "Thank you for calling. May I have your order number, please?"  # 11 words, 62 characters
    train, evaluation = [dialogue("t", [stock, LONG])], [dialogue("e", [stock, "It has not arrived yet."])]
    assert find_shared_text(train, evaluation, language="en") == []
    assert find_shared_text(train, evaluation, language="zh") != []  # characters would flag it
    found = find_contamination(Splits(train, evaluation), near=0.8, language="en")
    assert not found.flagged and "13-grams (of words, within turns; case and punctuation are ignored" in str(found)
    assert "turns below 13 characters" in str(find_contamination(Splits(train, evaluation), near=0.8))


def test_a_placeholder_is_one_word_whatever_it_stands_for():
    texts = [LONG.replace("Leeds", f"[{name}]") for name in ("City", "Address of the depot")]
    assert find_shared_text([dialogue("t", texts[:1])], [dialogue("e", texts[1:])], language="en") == [
        Overlap("t", "e", "shared", 1.0)
    ]


# --- metrics ---

REPLIES = [  # (predicted, reply, reference strategy, reference)
    (1, "Hello, how can I help?", 1, "Hello, how can I help you?"),
    (6, "Please restart the router.", 7, "please restart THE router."),
    (None, "", 11, "Goodbye."),
]


def predictions(context="reference"):
    rows = enumerate(REPLIES)
    return [Prediction("d", 2 * index, context, "", "", *said) for index, said in rows]


@pytest.fixture(scope="module")
def english():
    said = [text for _, _, _, reference in REPLIES for text in (reference, "Okay.")]
    return {"d": dialogue("d", said[:-1])}


@pytest.fixture(scope="module")
def scores(english):
    return score_predictions(predictions(), english, MetricsConfig(), language="en")


def test_an_english_evaluation_has_the_papers_metrics_over_words(scores):
    assert list(scores["profiles"]) == ["en"]
    found = scores["profiles"]["en"]
    assert list(found) == ["B-2", "B-4", "R-L", "BS", "BR", "ACC"]
    # 7 tokens, the reference has 8, the last of them ?; 6 of 6 orders 1 and 5 of 6 bigrams match behind "help".
    first = math.exp(1 - 8 / 7) * math.sqrt(7 / 7 * 5 / 6)
    assert found["B-2"].value == pytest.approx(100 * (first + 1 + 0) / 3)
    assert found["R-L"].value == pytest.approx(100 * (2 * 7 / (7 + 8) + 1 + 0) / 3)
    assert found["ACC"].value == pytest.approx(100 / 3)
    assert {found[name].unit for name in ("B-2", "B-4", "R-L")} == {"words"}
    assert "words in lower case by the tokenizer 13a of sacrebleu" in found["R-L"].signature
    assert scores["reply"]["distinct-1"]["system"].unit == "words"
    # hello , how can i help ? please restart the router . are 12, no word twice
    assert scores["reply"]["distinct-1"]["system"].value == 100


def test_jieba_would_score_otherwise(english):
    """The negative control: words by jieba keep their case, so the second reply is not the reference."""
    words = score_predictions(predictions(), english, MetricsConfig(profiles=["en"]))["profiles"]["en"]
    assert words["B-2"].unit == "jieba words"
    assert words["R-L"].value < 100 * (2 * 7 / (7 + 8) + 1) / 3 - 1


def test_a_chinese_evaluation_has_the_tables_that_it_had(english):
    found = score_predictions(predictions(), english, MetricsConfig())
    assert list(found["profiles"]) == ["paper", "zh"]
    assert list(found["by_strategy"])[4] == "策略5 情感管理"


def test_an_english_evaluation_names_strategies_in_english(scores, english):
    assert list(scores["by_strategy"])[4] == "5 Emotional Management"
    generated = predictions("generated")
    drift = context_drift(predictions(), generated, english, MetricsConfig(), "en")
    assert {"R-L", "ACC"} <= drift[0].keys()
    text = results_markdown({"system": {"reference": scores}}, {})
    assert "| 5 Emotional Management |" in text and "策略" not in text
    assert "The paper's six metrics over words" in text


@pytest.mark.usefixtures("forgotten")
def test_a_language_with_an_unknown_profile_is_refused_by_name(english):
    register_language(**MINIMAL | {"profiles": ("eng",)})
    with pytest.raises(InputError, match=r"^language xx: profiles=eng: choose one of paper, zh, en\. Did you mean"):
        score_predictions(predictions(), english, MetricsConfig(), language="xx")


# --- judges ---


@pytest.mark.usefixtures("forgotten")
def test_judges_and_forms_of_a_third_language_speak_english_with_its_labels(english):
    register_language(**MINIMAL)
    said, other = predictions(), [replace(each, strategy=3, response=each.response + "!") for each in predictions()]
    asked = judge_questions(said, other, english, JudgeConfig(language="xx"))
    instructions, question = (message["content"] for message in asked[0].messages)
    assert "Answer with one JSON object only" in instructions and "[Name RP]Hello, how can I help?!" in question
    sides, _ = align_tables(said, other, "one", "other", [english] * 2, "xx")
    form, _ = draw_annotation_form(sides, english, ("a", "b"), HumanConfig(language="xx", show_strategies="own"))
    assert '<html lang="en">' in form and '<div id="replies" lang="xx">' in form
    assert "Which reply is better?" in form and "Name RP" in form and "Meaning RP" in form


def test_a_baseline_labels_its_replies_in_the_language(english):
    said = generate_predictions(english.values(), StrategyBaseline(list(english.values()), 0, "en"), "reference")
    assert all(each.raw_text.startswith(f"[{STRATEGIES[each.strategy - 1].en}]") for each in said)
    chinese = StrategyBaseline(list(english.values()), 0)
    assert chinese.config_hash != StrategyBaseline(list(english.values()), 0, "en").config_hash


@pytest.mark.slow
def test_recipes_take_the_language_of_the_first_run(english, tmp_path, monkeypatch, fault_server):
    monkeypatch.chdir(tmp_path)
    for name, mark in (("one", ""), ("other", "!")):
        said = [replace(each, response=each.response + mark) for each in predictions()]
        write_predictions(tmp_path / name / "predictions" / "system-reference.jsonl", said)
        write_dialogues(tmp_path / name / "dialogues.jsonl", english.values())
        write_evaluated(Path(name), None, "en", [])

    def run(recipe, *words):
        action = ["export"] if recipe == "human_eval" else []
        load_recipe(recipe).main(compose(recipe, [*action, "one", "other", f"run.directory={recipe}", *words]))

    run("compare", "permutations=1000")
    rows = json.loads(Path("compare/comparison.json").read_text(encoding="utf-8"))["differences"]
    assert {"B-2", "R-L", "ACC"} <= {row["metric"] for row in rows}
    assert next(row["unit"] for row in rows if row["metric"] == "B-2") == "words"
    run("human_eval")
    assert "Which reply is better?" in Path("human_eval/form.html").read_text(encoding="utf-8")
    fault_server.answer = lambda body: '{"reason": "-", "better": "1"}'
    server = ["llm=openai", "llm.model=judge", f"llm.base_url={fault_server.base_url}", "llm.api_key_env=null"]
    run("judge", *server, "judge.tasks=[pairwise]", "judge.permutations=1000")
    asked = [body["messages"][0]["content"] for body in fault_server.bodies if len(body["messages"]) > 1]
    assert len(asked) == 2 * len(REPLIES) and all("You check the quality" in text for text in asked)
    # An evaluation of before languages were recorded.
    Path("one/evaluated_model.json").unlink()
    assert read_language("one") == "zh"
