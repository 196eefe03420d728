"""The sample grammar: reproducible, learnable from the customer's words, and not from the strategies alone."""

import dataclasses
import itertools
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import sampled

from csc_train.config.compose import compose
from csc_train.data import sample_grammar as sample
from csc_train.data.config import SAMPLE_LANGUAGES
from csc_train.data.dialogue import Dialogue, Speaker, data_digest
from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import (
    SAMPLE_SOURCE,
    SampleGrammar,
    accuracy_ceiling,
    check_sample_place,
    ensure_sample,
    generate_sample,
    provide_sample,
    sample_grammar,
)
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.synthesis.rolecs.personas import TOPICS

IDENTITY = {
    "zh": re.compile(r"\[手机号码\]|\[身份证号\]|尾号[0-9]{4}"),
    "en": re.compile(r"\[phone number\]|\[ID number\]|digits [0-9]{4}"),
}
LONGEST = {"zh": 40, "en": 120}
"""Characters of the longest text."""
FULL_MARKS = {"zh": "很满意，给您满分。", "en": "Very happy, full marks for you."}
NO_HURRY = {"zh": "我不着急，", "en": "I'm in no hurry, "}
DO_IT = {"zh": "麻烦您替我办一下。", "en": "Please take care of it for me."}
RESTATED = {"zh": ("您", "我的"), "en": ("you", " my ")}
"""What a restatement has, and what it has not."""


@pytest.fixture(scope="module", params=SAMPLE_LANGUAGES)
def language(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def grammar(language) -> SampleGrammar:
    return sample_grammar(language)


@pytest.fixture(scope="module")
def dialogues(language) -> list[Dialogue]:
    return generate_sample(600, 0, language)


def numbers(dialogue: Dialogue) -> list[int]:
    return [turn.strategy.number for turn in dialogue.turns if turn.strategy]


def exchanges(dialogue: Dialogue):
    """(what the customer had said before, the customer's words, the strategy that answers them)."""
    said = []
    for turn, answer in itertools.pairwise(dialogue.turns):
        if turn.speaker is Speaker.CUSTOMER:
            yield "".join(said), turn.text, answer.strategy.number
            said.append(turn.text)


def with_turn(dialogue: Dialogue, index: int, **changes) -> Dialogue:
    turns = list(dialogue.turns)
    turns[index] = dataclasses.replace(turns[index], **changes)
    return dataclasses.replace(dialogue, turns=tuple(turns))


def test_the_same_seed_gives_the_same_dialogues_on_every_platform(language):
    golden = {
        "zh": "2450b3875cbc4496f2ad4ab0c513d06da86149590a3623857666d8e8fe3064b6",
        "en": "d5cb67dbda16e41b310ac20cdf3c88f88384bd2ca811979f6fbbdc8ddc2194a0",
    }
    assert data_digest(generate_sample(20, 0, language)) == golden[language]


@pytest.mark.slow
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(language, dialogues):
    assert [d.row() for d in generate_sample(50, 0, language)] == [d.row() for d in dialogues[:50]]


@pytest.mark.slow
def test_seeds_share_no_dialogue(language, dialogues):
    other = generate_sample(600, 1, language)
    assert len({d.fingerprint for d in dialogues + other}) == 1200
    assert len({d.id for d in dialogues + other}) == 1200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample.jsonl", "sample.parquet"])
def test_a_written_sample_passes_the_checks_and_keeps_its_ceiling(tmp_path, language, dialogues, name):
    assert ensure_sample(tmp_path / name, 60, 0, language)
    read = read_dialogues(tmp_path / name, source=SAMPLE_SOURCE, strict=True)
    assert [d.row() for d in read] == [d.row() for d in dialogues[:60]]
    assert accuracy_ceiling(read, language) == accuracy_ceiling(dialogues[:60], language)


def test_dialogues_have_the_form_of_rolecs(language, dialogues):
    prefix = {"zh": "sample-0-", "en": "sample-en-0-"}[language]
    for dialogue in dialogues:
        strategies = numbers(dialogue)
        speakers = [turn.speaker for turn in dialogue.turns]
        assert speakers == [Speaker.SUPPORTER, Speaker.CUSTOMER] * (len(speakers) // 2) + [Speaker.SUPPORTER]
        assert strategies[0] == 1 and strategies[-1] == 11 and strategies.count(1) == strategies.count(11) == 1
        assert 2 in strategies
        assert all(len(list(run)) <= 2 for _, run in itertools.groupby(strategies))
        assert 8 <= len(strategies) <= 25
        assert dialogue.source == SAMPLE_SOURCE and dialogue.id.startswith(prefix)
    assert 10 < sum(len(numbers(d)) for d in dialogues) / len(dialogues) < 13


def test_texts_are_short_and_every_slot_is_filled(language, dialogues):
    texts = [turn.text for d in dialogues for turn in d.turns]
    assert all(text == text.strip() and 3 <= len(text) <= LONGEST[language] for text in texts)
    assert not [text for text in texts if "{" in text or "}" in text]


def test_english_sentences_begin_with_capitals_and_hold_no_chinese():
    for text in (turn.text for dialogue in generate_sample(200, 0, "en") for turn in dialogue.turns):
        assert text.isascii() and re.match(r"[A-Z$0-9(]", text) and text[-1] in ".?)", text
        assert not re.search(r"[.?!] [a-z]|\bi\b|  |\ba [aeiou]|\byou (?:was|am|is)\b|\b(\w+) \1\b", text), text


def test_every_strategy_topic_and_problem_is_used(grammar, dialogues):
    shares = Counter(number for d in dialogues for number in numbers(d))
    assert shares.keys() == {s.number for s in STRATEGIES}
    assert min(shares.values()) > 0.03 * shares.total() and max(shares.values()) < 0.2 * shares.total()
    assert {d.extra["topic"] for d in dialogues} == set(TOPICS[grammar.language])
    assert len({(d.extra["topic"], d.extra["problem"]) for d in dialogues}) == len(grammar.problems)
    assert all(isinstance(d.extra[key], str) for d in dialogues for key in ("topic", "problem", "mood", "outcome"))


def test_the_previous_strategy_is_a_poor_guide_and_the_rule_is_not(language, dialogues):
    train, test_set = dialogues[:400], dialogues[400:]
    following: dict[int, Counter] = {}
    for dialogue in train:
        for previous, number in itertools.pairwise([0, *numbers(dialogue)]):
            following.setdefault(previous, Counter())[number] += 1
    hits = [
        following[previous].most_common(1)[0][0] == number
        for dialogue in test_set
        for previous, number in itertools.pairwise([0, *numbers(dialogue)])
    ]
    bigram = 100 * sum(hits) / len(hits)
    assert bigram < 50
    assert 85 < accuracy_ceiling(test_set, language) < 94
    assert accuracy_ceiling(test_set, language) > bigram + 30


def expected_ceiling(grammar, dialogues):
    """The hits that the oracle should expect, in percent: free of the luck of the draw."""
    likeliest = [max(chances.values()) for dialogue in dialogues for _, chances in sample._replay(grammar, dialogue)]
    return 100 * sum(likeliest) / len(likeliest)


@pytest.mark.slow
def test_the_oracle_hits_as_often_as_it_expects(grammar, dialogues):
    assert 85 < expected_ceiling(grammar, dialogues) < 94
    ceiling = accuracy_ceiling(dialogues, grammar.language)
    assert ceiling == pytest.approx(expected_ceiling(grammar, dialogues), abs=1.5)


def test_the_ceiling_counts_the_likeliest_strategy_as_the_only_hit(grammar, dialogues):
    # Satisfaction, the last choice before the end, is answered by 10 seven times of ten and else by 11.
    dialogue = next(d for d in dialogues if d.turns[-2].text == FULL_MARKS[grammar.language])
    turns = len(numbers(dialogue))
    likely = with_turn(dialogue, len(dialogue.turns) - 1, strategy=STRATEGIES[9])
    lost = accuracy_ceiling([likely], grammar.language) - accuracy_ceiling([dialogue], grammar.language)
    assert lost == pytest.approx(100 / turns)
    assert expected_ceiling(grammar, [likely]) == expected_ceiling(grammar, [dialogue])


def test_the_ceiling_refuses_what_the_grammar_cannot_have_written():
    dialogues = generate_sample(1, 0)
    with pytest.raises(InputError, match="sample-0-00000, turn 2: not an utterance"):
        accuracy_ceiling([with_turn(dialogues[0], 1, text="这句话不在语法里。")])
    with pytest.raises(InputError, match="sample-0-00000, turn 2: not an utterance"):
        accuracy_ceiling(dialogues, "en")
    with pytest.raises(InputError, match="sample_language=fr: must be one of zh, en"):
        generate_sample(1, 0, "fr")
    with pytest.raises(InputError, match="sample-0-00000, turn 1: not a strategy"):
        accuracy_ceiling([with_turn(dialogues[0], 0, strategy=STRATEGIES[6])])
    with pytest.raises(InputError, match="no dialogues"):
        accuracy_ceiling([])


@pytest.mark.parametrize("act", sampled(sample.PRECONDITIONS, 4))
def test_each_wording_belongs_to_one_act(grammar, act):
    for problem, mood in itertools.product(grammar.problems, grammar.feelings):
        writer = sample._Writer(grammar, random.Random(act), problem, mood)
        for past in [set()] * 4 + [{"stated"}] * 12:
            text = writer.utterance(act, past)
            assert sample._matching_acts(grammar, text) == [act], text


def test_the_languages_have_the_same_tables():
    """As many problems, wordings and values in each language: none is easier for having fewer."""

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(inner) for inner in value] if isinstance(value, tuple) else None

    def counts(grammar):
        tables = vars(grammar) | {"feelings": tuple(grammar.feelings.values())}
        free = ("language", "persons", "slot_values", "feeling", "patterns")
        return {name: shape(table) for name, table in tables.items() if name not in free}

    first, *others = map(sample_grammar, SAMPLE_LANGUAGES)
    for other in others:
        assert counts(other) == counts(first)
        assert other.slot_values.keys() >= first.slot_values.keys()


def test_the_tables_cover_the_same_acts(grammar):
    acts = {*grammar.customer_wordings, "upset"}
    assert grammar.outcomes.keys() == {*sample._RULES["endings"]}
    assert sample.FIXED_STRATEGIES.keys() | sample.STRATEGY_CHANCES.keys() == acts == sample.PRECONDITIONS.keys()
    assert not sample.FIXED_STRATEGIES.keys() & sample.STRATEGY_CHANCES.keys()
    assert set().union(*sample.NEXT_ACTS.values()) == acts
    assert all(sum(chances.values()) == 1 for rows in sample.STRATEGY_CHANCES.values() for _, chances in rows)


def test_a_feeling_wins_over_the_question_beside_it(grammar, dialogues):
    feelings = [feeling.lower() for said, _ in grammar.feelings.values() for feeling in said]
    answers = [n for d in dialogues for _, text, n in exchanges(d) if any(word in text.lower() for word in feelings)]
    assert len(answers) > 100 and set(answers) == {5}
    calm = [n for d in dialogues for _, text, n in exchanges(d) if text.startswith(NO_HURRY[grammar.language])]
    assert len(calm) > 20 and 5 not in calm


def test_the_same_request_is_carried_out_only_after_the_identity_is_known(language, dialogues):
    answers = {True: Counter(), False: Counter()}
    for dialogue in dialogues:
        for before, text, number in exchanges(dialogue):
            if text == DO_IT[language]:
                answers[bool(IDENTITY[language].search(before))][number] += 1
    assert answers[True].keys() == {8} and answers[False].keys() == {2}


def test_a_detail_is_restated_once_before_it_is_acted_upon(grammar, dialogues):
    answers = {True: Counter(), False: Counter()}
    for dialogue in dialogues:
        for index, turn in enumerate(dialogue.turns):
            if turn.speaker is Speaker.CUSTOMER and sample._matching_acts(grammar, turn.text) == ["detail"]:
                restated = any(t.strategy and t.strategy.number == 3 for t in dialogue.turns[:index])
                answers[restated][dialogue.turns[index + 1].strategy.number] += 1
    assert answers[True].keys() == {6, 7} and answers[False].keys() == {3}


def test_a_restatement_adds_nothing_new(grammar, dialogues):
    has, has_not = RESTATED[grammar.language]
    for dialogue in dialogues:
        said = ""
        for turn in dialogue.turns:
            if turn.strategy and turn.strategy.number == 3:
                assert has in turn.text.lower() and has_not not in turn.text
                assert set(re.findall("[0-9]+", turn.text)) <= set(re.findall("[0-9]+", said)), turn.text
            said += turn.text
    persons = grammar.persons["customer"].keys()
    for problem in grammar.problems:
        first, second = ([s for s in re.findall(r"\{(\w+)\}", case) if s not in persons] for case in problem.cases)
        assert sorted(first) == sorted(second), problem.name


def test_both_speak_about_the_product_that_the_customer_named(grammar, dialogues):
    items = {(p.topic, p.name): p.items for p in grammar.problems}
    every = {item for own in items.values() for item in own}
    for dialogue in dialogues:
        own = items[dialogue.extra["topic"], dialogue.extra["problem"]]
        for speaker in Speaker:
            text = "\n".join(turn.text for turn in dialogue.turns if turn.speaker is speaker)
            named = {item for item in every if item in text}
            # A name may be part of another, such as 信用卡 of 白金信用卡.
            named = {item for item in named if not any(item != other and item in other for other in named)}
            assert len(named) <= 1 and named <= set(own), (dialogue.id, named)
        first = next(turn for turn in dialogue.turns if any(item in turn.text for item in own))
        assert first.speaker is Speaker.CUSTOMER, dialogue.id


def test_a_sample_that_is_there_is_kept(tmp_path):
    path = tmp_path / "sample.jsonl"
    assert ensure_sample(path, 5, 0) is True
    before = path.stat()
    assert ensure_sample(path, 5, 0) is False
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe not a sample",
        lambda content: content.replace(SAMPLE_SOURCE.encode(), b"other", 1),
        lambda content: content.replace(b'"id": "sample-', b'"id": "', 1),  # of the grammar, but not its sample
    ],
)
def test_a_file_that_is_no_sample_is_not_touched(tmp_path, spoil):
    path = tmp_path / "sample.jsonl"
    ensure_sample(path, 5, 0)
    content = path.read_bytes()
    spoilt = spoil(content)
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match="exists and is no sample"):
        ensure_sample(path, 5, 0)
    assert path.read_bytes() == spoilt


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace("登".encode(), "等".encode()),
        lambda content: b"".join(content.splitlines(keepends=True)[:-1]),
    ],
)
def test_another_sample_is_replaced(tmp_path, change):
    path = tmp_path / "sample.jsonl"
    ensure_sample(path, 5, 0)
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    assert ensure_sample(path, 5, 0) is True
    assert path.read_bytes() == content


def test_another_seed_or_count_replaces_the_sample(tmp_path):
    path = tmp_path / "sample.parquet"
    assert [ensure_sample(path, *size) for size in ((5, 0), (5, 1), (6, 1), (6, 1))] == [True, True, True, False]
    assert len(read_dialogues(path, strict=True)) == 6


def test_unusable_arguments_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        generate_sample(0, 0)
    with pytest.raises(InputError, match=r"\.jsonl or \.parquet"):
        ensure_sample(tmp_path / "sample.csv", 2, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "prepare", "preflight"])
def test_no_sample_is_written_where_a_user_points(recipe, tmp_path, monkeypatch):
    """The demo's settings on one's own file, whose name is misspelt or which is a sample of another size."""
    monkeypatch.chdir(tmp_path)
    ensure_sample("mine.jsonl", 5, 0)
    before = Path("mine.jsonl").read_bytes()
    for name in ("mine.jsonl", "my_dialogues.jsonl", "runs/x.jsonl"):
        data = compose(recipe, ["experiment=demo", f"data.train.path={name}"]).data
        for refuse in (provide_sample, check_sample_place):
            with pytest.raises(
                InputError,
                match=f"^data.train.path={name}: .* data=files data.train.path={name} data.sample_dialogues=null,",
            ):
                refuse(data)
    assert Path("mine.jsonl").read_bytes() == before and os.listdir() == ["mine.jsonl"]
    provide_sample(compose(recipe, ["experiment=demo", "data.sample_dialogues=3"]).data)
    assert os.listdir("runs/sample") == ["dialogues-zh-3-0.jsonl"]
    provide_sample(compose(recipe, ["experiment=demo", "data.sample_dialogues=3", "template.language=en"]).data)
    [written] = {*os.listdir("runs/sample")} - {"dialogues-zh-3-0.jsonl"}
    assert written == "dialogues-en-3-0.jsonl"
    read = read_dialogues(f"runs/sample/{written}", source=SAMPLE_SOURCE)
    assert [d.row() for d in read] == [d.row() for d in generate_sample(3, 0, "en")]
