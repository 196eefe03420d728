"""Metrics against hand-computed values, against the reference libraries, and on small random models saved here."""

import dataclasses
import json
import math
import random
import shutil

import numpy
import pytest
import torch
from bert_score import score as bert_score_package
from omegaconf import OmegaConf
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, BertTokenizerFast, RemBertConfig, RemBertModel

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.segmentation import segment_words
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics import lexical, metric_models, model_based
from csc_train.evaluation.metrics import likelihood as likelihood_metrics
from csc_train.evaluation.metrics import replies as reply_metrics
from csc_train.evaluation.metrics import strategy as strategy_metrics
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.metrics.model_based import fetch_models
from csc_train.evaluation.metrics.registry import metrics_in_profiles
from csc_train.evaluation.scoring import context_drift, score_predictions
from csc_train.evaluation.table import PredictionTable
from csc_train.inference.predictions import Prediction
from csc_train.stats import Statistic

ODD_PAIRS = [
    ("您好，请问有什么可以帮您？", "您好，有什么可以帮您的吗？"),
    ("手续费是１２元，已退到您的账户。", "手续费是12元，将退到账户。"),
    ("请打开 App 的 Settings 页面😀", "请打开App，进入Settings页面。"),
    ("", "感谢您的来电，再见！"),
    ("😀", "好的"),
]


# --- BLEU ---


def word_pairs(pairs):
    return [(segment_words(reply), segment_words(reference)) for reply, reference in pairs]


def corpus_bleu_zh(pairs, order):
    return float(lexical.corpus_bleu_zh(lexical.corpus_bleu_zh_counts(pairs).sum(axis=0), order))


def test_sentence_bleu_by_hand():
    # Two of three words and one of two bigrams match; orders 3 and 4 have one and no n-gram, and method1 counts 0.1.
    [[bleu_2, bleu_4]] = lexical.sentence_bleu([(["您", "好", "吗"], ["您", "好", "呀"])])
    assert bleu_2 == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 2))
    assert bleu_4 == pytest.approx(100 * (2 / 3 * 1 / 2 * 0.1 * 0.1) ** (1 / 4))


def test_sentence_bleu_punishes_short_replies():
    [[bleu_2, _]] = lexical.sentence_bleu([(["您", "好"], ["您", "好", "请", "问"])])
    assert bleu_2 == pytest.approx(100 * math.exp(1 - 4 / 2))


@pytest.mark.parametrize("order", [2, 4])
def test_corpus_bleu_zh_equals_sacrebleu_on_odd_text(order):
    replies, references = zip(*ODD_PAIRS, strict=True)
    expected = BLEU(tokenize="zh", max_ngram_order=order).corpus_score(list(replies), [list(references)]).score
    assert expected > 1
    assert corpus_bleu_zh(ODD_PAIRS, order) == pytest.approx(expected)


def test_corpus_bleu_zh_counts_characters():
    assert corpus_bleu_zh([("您好吗", "您好呀")], 2) == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 2))


def test_corpus_bleu_zh_signature_is_complete():
    assert lexical.corpus_bleu_zh_signature(2).startswith("nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:")
    assert lexical.corpus_bleu_zh_signature(2).endswith("|order:2")


# --- ROUGE-L ---


def lcs_length(left, right):
    """Longest common subsequence by the textbook table."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_on_words_equals_the_textbook():
    rng = random.Random(0)
    vocabulary = ["您好", "账户", "好", "的", "App", "1", "😀", "，"]
    pairs = [tuple(rng.choices(vocabulary, k=rng.randint(1, 12)) for _ in range(2)) for _ in range(50)]
    f1 = []
    for reply, reference in pairs:
        precision = lcs_length(reply, reference) / len(reply)
        recall = lcs_length(reply, reference) / len(reference)
        f1.append(2 * precision * recall / (precision + recall) if precision else 0)
    assert lexical.rouge_l(pairs) == pytest.approx([100 * each for each in f1])


def test_rouge_l_on_characters_by_hand():
    # 您 and 好 in common, of 3 and 5 characters once the space is gone.
    assert lexical.rouge_l([(lexical.characters("您 好吗"), lexical.characters("您们好的呀"))]) == 100 * 2 * 2 / 8


def test_default_tokenizer_of_rouge_score_ignores_chinese():
    same = "您好，很高兴为您服务。"
    assert lexical.rouge_l_latin([(same, same)]) == 0
    assert lexical.rouge_l_latin([("１２元", "１２元")]) == 0  # full-width digits are not ASCII
    assert lexical.rouge_l_latin([("手续费共12元", "请支付12块")]) == 100  # 12 is all that it sees
    assert lexical.rouge_l_latin([("用App交12元", "app里交30元")]) == 50


# --- edges that all lexical metrics share ---


def test_no_pairs_give_no_score():
    for metric in (lexical.sentence_bleu, lexical.corpus_bleu_zh_counts, lexical.rouge_l, lexical.rouge_l_latin):
        assert len(metric([])) == 0
    assert len(metric_models.bertscore([], "nowhere")) == len(metric_models.bleurt([], "nowhere")) == 0


@pytest.mark.parametrize("reply", ["", "  "])
def test_an_empty_reply_scores_zero(reply):
    good, empty = ("卡号 6222", "卡号 6222"), (reply, "卡号 6222")
    for metric, prepare in (
        (lambda pairs: lexical.sentence_bleu(pairs)[:, 0], word_pairs),
        (lexical.rouge_l, word_pairs),
        (lexical.rouge_l_latin, list),
    ):
        assert metric(prepare([good, empty])) == pytest.approx([100, 0])
    assert corpus_bleu_zh([empty], 2) == corpus_bleu_zh([empty], 4) == 0
    assert 0 < corpus_bleu_zh([good, empty], 2) < 100


# --- one context scored ---


def prediction(strategy, response, turn=0, **changes):
    fields = {"reference_strategy": 7, "reference_response": "手续费是12元。"} | changes
    return Prediction("d1", turn, "reference", "hash", "", strategy, response, **fields)


FOUR_TURNS = [
    prediction(7, "手续费是12元。"),
    prediction(5, "非常抱歉。", turn=2),
    prediction(None, "手续费", turn=4),
    prediction(7, "", turn=6),
]
SAID = (Turn(Speaker.SUPPORTER, "手续费是12元。", STRATEGIES[6]), Turn(Speaker.CUSTOMER, "多少？"))
DIALOGUES = {"d1": Dialogue("d1", SAID * 4)}


def test_score_has_every_column_in_order():
    result = score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig())
    assert list(result["profiles"]) == ["paper", "zh"]
    assert list(result["profiles"]["paper"]) == ["B-2", "B-4", "R-L", "BS", "BR", "ACC"]
    assert list(result["profiles"]["zh"]) == ["B-2", "B-4", "R-L char", "R-L word", "BS", "BS rescaled", "ACC"]
    for profile in result["profiles"].values():
        for cell in profile.values():
            assert cell.unit and cell.signature and (cell.value is None) == (cell.reason is not None)


def test_score_puts_each_metric_into_its_column():
    paper, zh = score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig())["profiles"].values()
    pairs = [(turn.response, turn.reference_response) for turn in FOUR_TURNS]
    words = word_pairs(pairs)
    assert [paper["B-2"].value, paper["B-4"].value] == pytest.approx(lexical.sentence_bleu(words).mean(axis=0))
    assert paper["R-L"].value == 25  # the one reply that has the 12
    assert (zh["B-2"].value, zh["B-4"].value) == (corpus_bleu_zh(pairs, 2), corpus_bleu_zh(pairs, 4))
    assert zh["R-L char"].value == pytest.approx(lexical.rouge_l(pairs).mean())
    assert zh["R-L word"].value == pytest.approx(lexical.rouge_l(words).mean())
    assert len({paper["B-2"].value, paper["B-4"].value, zh["B-2"].value, zh["R-L char"].value}) == 4


def test_unparsed_strategies_count_as_wrong_and_are_counted():
    result = score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig())
    assert result["profiles"]["paper"]["ACC"].value == result["profiles"]["zh"]["ACC"].value == 50
    whole = {"failed": 0, "failures": {}, "incomplete": False, "cut_off": 0}
    assert result["counts"] == whole | {"dialogues": 1, "turns": 4, "unparsed": 1, "empty_replies": 1}


def test_accuracy_is_not_applicable_where_no_strategy_is_predicted():
    dialogues = {"d1": Dialogue("d1", SAID)}
    result = score_predictions([prediction(None, "好的", predicts_strategy=False)], dialogues, MetricsConfig())
    assert result["profiles"]["paper"]["ACC"].value is None
    assert result["profiles"]["paper"]["ACC"].reason == "this mode predicts no strategy"
    figures = [
        *result["strategy"].values(),
        result["likelihood"]["ECE"],
        *(row["ACC"] for row in result["by_position"]),
    ]
    figures += [cells["F1"] for cells in result["by_strategy"].values()]
    figures += [sides["system"] for sides in result["process"].values()]
    assert {(each.value, each.reason) for each in figures} == {(None, "this mode predicts no strategy")}
    assert result["process"]["greeting first"]["reference"].value == 0
    assert result["confusion"] is None
    assert (result["counts"]["unparsed"], result["counts"]["empty_replies"]) == (None, 0)


def test_missing_metric_models_are_reasons():
    paper = score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig(profiles=["paper"]))["profiles"]["paper"]
    assert (paper["BS"].value, paper["BS"].reason) == (None, "no BERTScore model given")
    assert (paper["BR"].value, paper["BR"].reason) == (None, "no BLEURT model given")
    assert "unverified on real weights" in paper["BR"].signature


def test_no_turns_give_reasons_not_numbers():
    result = score_predictions([], {}, MetricsConfig())
    assert {cell.value for profile in result["profiles"].values() for cell in profile.values()} == {None}
    assert result["profiles"]["paper"]["ACC"].reason == "no turns to score"


def test_scores_serialise():
    result = score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig())
    plain = json.loads(json.dumps(result, default=dataclasses.asdict))
    assert MetricResult(**plain["profiles"]["zh"]["R-L char"]) == result["profiles"]["zh"]["R-L char"]


# --- strategies, process, replies ---


def chosen(*rows):
    """Turns of dialogues given as [(predicted, reference), ...] each; a predicted 0 was not read."""
    return PredictionTable(
        [
            dataclasses.replace(prediction(predicted or None, "好", turn=2 * index), dialogue_id=f"d{number}",
                                reference_strategy=reference)
            for number, row in enumerate(rows)
            for index, (predicted, reference) in enumerate(row)
        ]
    )  # fmt: skip


def value(metric):
    return metric.statistic.value if isinstance(metric.statistic, Statistic) else metric.statistic


def sides(table, section):
    """By name, the values of a section's metrics for a system and for the reference."""
    return {
        spec.name: (value(spec.function(table)), value(spec.function(table.gold)))
        for spec in metrics_in_profiles([section])
    }


def accuracy_by_position(table):
    return [
        (position + 1, int(here.sum()), value(strategy_metrics.accuracy(table).restrict(here)))
        for position in range(table.longest)
        for here in [table.position == position]
    ]


EIGHT = chosen([(1, 1), (5, 5), (5, 4), (11, 11)], [(2, 1), (4, 4), (0, 5), (11, 12)])


def test_accuracy_by_hand():
    assert value(strategy_metrics.accuracy(EIGHT)) == 50
    assert value(strategy_metrics.parse_rate(EIGHT)) == 100 * 7 / 8
    # Of the wrong ones, 5 for 4 and 2 for 1 are in the right stage; 11 for 12 is not.
    assert value(strategy_metrics.stage_accuracy(EIGHT)) == 100 * 6 / 8
    assert accuracy_by_position(EIGHT) == [(1, 2, 50), (2, 2, 100), (3, 2, 0), (4, 2, 50)]


def test_any_strategy_of_a_joined_turn_is_accepted():
    turns = [
        Turn(Speaker.SUPPORTER, "您好 请讲", STRATEGIES[0], (STRATEGIES[0], STRATEGIES[3])),
        Turn(Speaker.CUSTOMER, "好"),
    ]
    dialogues = {"d0": Dialogue("d0", (*turns, *turns, *turns, turns[1], Turn(Speaker.SUPPORTER, "好", STRATEGIES[0])))}
    rows = chosen([(1, 1), (4, 1), (5, 1), (4, 1)]).predictions
    table = PredictionTable([dataclasses.replace(each, turn=(0, 2, 4, 7)[n]) for n, each in enumerate(rows)], dialogues)
    assert value(strategy_metrics.accuracy(table)) == 25
    assert value(strategy_metrics.accepted_accuracy(table)) == 50  # the last turn was never joined
    unread = [dataclasses.replace(each, strategy=None) for each in table.predictions]
    assert value(strategy_metrics.accepted_accuracy(PredictionTable(unread, dialogues))) == 0


def test_accepted_accuracy_by_hand(tmp_path):
    """Of 12 turns with strategy 5, three are predicted as 5, four as 6, and five as 7; 6 is accepted, too."""

    def scored(accepted, predicted=(5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7), config=None, known=True):
        rows = chosen(*([(each, 5)] for each in predicted)).predictions
        turns = (Turn(Speaker.SUPPORTER, "好", STRATEGIES[4], tuple(STRATEGIES[n - 1] for n in accepted)),)
        dialogues = {each.dialogue_id: Dialogue(each.dialogue_id, turns) for each in rows}
        table = PredictionTable(rows, dialogues if known else None)
        return strategy_metrics.accepted_accuracy(table, config).compute(table.dialogue, 1000)

    found = scored([5, 6])
    assert found.value == pytest.approx(100 * 7 / 12) and 0 < found.low < found.value < found.high < 100
    assert (
        found.signature == "any accepted strategy; 12 of 12 turns accept several, from the data, joined turns included"
    )
    assert scored([6]).value == found.value  # the own strategy always counts
    file = tmp_path / "sets.jsonl"
    file.write_text("")
    assert scored([5, 6], config=MetricsConfig(accepted=str(file))).signature.endswith(
        "accept several, from sets.jsonl, else from the data"
    )
    for none in ([], [5]):
        assert (scored(none).value, scored(none).reason) == (None, "no turn accepts several strategies")
    assert (scored([5, 6], known=False).value, scored([5, 6], known=False).reason) == (
        None, "the run has no dialogues.jsonl",
    )  # fmt: skip
    assert (scored([5, 6], predicted=()).value, scored([], predicted=()).reason) == (None, "no turns to score")


def test_f1_by_hand():
    rows = {label: (count, figures) for label, count, figures in strategy_metrics.by_strategy(EIGHT)}
    assert len(rows) == 12
    expected = {1: (2, 1, 1 / 2), 2: (0, 0, None), 4: (2, 1, 1 / 2), 5: (2, 1 / 2, 1 / 2), 11: (1, 1 / 2, 1)}
    f1 = {1: 2 / 3, 2: 0, 4: 2 / 3, 5: 1 / 2, 11: 2 / 3, 12: 0}
    for number, (count, precision, recall) in expected.items():
        turns, figures = rows[STRATEGIES[number - 1].label]
        assert turns == count
        assert value(figures["precision"]) == 100 * precision
        assert value(figures["F1"]) == pytest.approx(100 * f1[number])
        if recall is not None:
            assert value(figures["recall"]) == 100 * recall
    # Over the six strategies that occur on either side; the turn that was not read counts against strategy 5.
    assert value(strategy_metrics.macro_f1(EIGHT)) == pytest.approx(100 * sum(f1.values()) / 6)
    # Weighted by occurrences: strategy 1, 4 and 5 occur twice, 11 and 12 once, 2 never.
    assert value(strategy_metrics.weighted_f1(EIGHT)) == pytest.approx(100 * (2 * (2 / 3 + 2 / 3 + 1 / 2) + 2 / 3) / 8)
    never = rows[STRATEGIES[6].label][1]
    scores = {name: figure.compute(EIGHT.dialogue, 100) for name, figure in never.items()}
    assert {name: (each.value, each.reason) for name, each in scores.items()} == {
        "precision": (None, "never predicted"), "recall": (None, "not in the reference"), "F1": (None, "never occurs"),
        "preference": (None, "never occurs"),
    }  # fmt: skip


def test_preference_bias_by_hand():
    # 1 is predicted five times for 2, never 2 for 1; two of each are right. At p = (3, 1/3) the slope is zero:
    # 5 - 5 x 9/10 from the turns and 1 - 2 x 3/4 from the prior. With mean 1: 1.8 and 0.2.
    five = chosen([(1, 2)] * 5 + [(1, 1), (2, 2)] * 2 + [(0, 7)])
    assert value(strategy_metrics.preference_bias(five)) == pytest.approx(0.8)
    rows = {label: cells for label, _, cells in strategy_metrics.by_strategy(five)}
    assert [value(rows[each.label]["preference"]) for each in STRATEGIES[:2]] == pytest.approx([1.8, 0.2])
    assert rows[STRATEGIES[6].label]["preference"].compute(five.dialogue, 0).reason == "never occurs"
    # Without a prior, two strategies are preferred as they win, here three to one.
    assert strategy_metrics.preferences(numpy.array([[9.0, 1], [3, 9]]), 1e-6) == pytest.approx([1.5, 0.5], abs=1e-6)
    right = chosen([(number, number) for number in range(1, 13)])
    assert value(strategy_metrics.preference_bias(right)) == pytest.approx(0)
    only = chosen([(7, number) for number in range(1, 13)] * 500)
    assert 3.3 < value(strategy_metrics.preference_bias(only)) < math.sqrt(11)
    unread = strategy_metrics.preference_bias(chosen([(0, 1)] * 20)).compute(numpy.arange(20), 100)
    assert (unread.value, unread.reason) == (None, "no strategy was parsed")


def test_preferences_without_a_prior_are_the_fixed_point_of_the_published_iteration():
    rng = numpy.random.default_rng(0)
    confusion = rng.integers(1, 40, (3, 12, 12)) * rng.random((12, 1)).astype(float)
    found = strategy_metrics.preferences(confusion, 1e-7)
    for turns, preferred in zip(confusion, found, strict=True):
        expected = numpy.ones(12)
        for _ in range(200):
            for i in range(12):
                others = [j for j in range(12) if j != i]
                won = sum(turns[j, i] * expected[j] / (expected[i] + expected[j]) for j in others)
                expected[i] = won / sum(turns[i, j] / (expected[i] + expected[j]) for j in others)
            expected *= 12 / expected.sum()
        assert preferred == pytest.approx(expected, abs=1e-4)
        # The prior changes little where there are many turns, and keeps what has none finite.
        assert strategy_metrics.preferences(turns) == pytest.approx(expected, abs=0.1)
    assert numpy.ptp(found) > 1  # or equal preferences would have passed


def believing(turn, reference, *probabilities, **changes):
    """A prediction of a system whose probabilities of the first labels are these; the rest share what is left."""
    rest = (1 - sum(probabilities)) / (12 - len(probabilities))
    logs = numpy.log([*probabilities, *[rest] * (12 - len(probabilities))]) - 3  # their sum need not be 1
    return prediction(1, "好", turn, reference_strategy=reference, label_log_likelihoods=tuple(logs), **changes)


def believed(predictions):
    return score_predictions(predictions, {"d1": Dialogue("d1", SAID * 6)}, MetricsConfig(profiles=[]))["likelihood"]


def test_likelihoods_by_hand():
    rows = [
        believing(0, 1, 0.92, 0.05),  # right, 0.92 sure
        believing(2, 2, 0.96, 0.03),  # wrong, second
        believing(4, 3, 0.45, 0.35, 0.1),  # wrong, third
        believing(6, 2, 0.1, 0.42),  # right, 0.42 sure
        prediction(1, "好", 8),  # of which nothing is known
    ]
    scores = believed(rows)
    assert scores["top-2 ACC"].value == 75
    # Bins 0.9 to 1: 0.94 sure, half right; 0.4 to 0.5: 0.435 sure, half right.
    assert scores["ECE"].value == pytest.approx(100 * (0.44 + 0.065) / 2)
    assert scores["NLL"].reason == scores["perplexity"].reason == "the likelihood of the reference is not known here"
    known = [prediction(1, "好", 0, reference_nll=3.0, reference_tokens=2)]
    known += [prediction(1, "好", 2, reference_nll=1.0, reference_tokens=6)]
    scores = believed(known)
    assert (scores["NLL"].value, scores["perplexity"].value) == (0.5, pytest.approx(math.exp(0.5)))
    assert scores["ECE"].reason == "the system reports no likelihoods of the labels"


def test_labels_that_a_system_holds_impossible_are_wrong_and_a_reference_that_it_does_is_infinitely_unlikely():
    impossible = (-math.inf,) * 12
    rows = [
        believing(0, 1, 0.92),
        prediction(1, "好", 2, reference_strategy=3, label_log_likelihoods=(-3.0, *impossible[1:])),
        prediction(1, "好", 4, label_log_likelihoods=impossible),  # which says nothing
        prediction(1, "好", 6, reference_nll=math.inf, reference_tokens=3),
    ]
    scores = believed(rows)
    assert (scores["top-2 ACC"].value, scores["ECE"].value) == (50, pytest.approx(100 * abs(0.96 - 0.5)))
    assert likelihood_metrics.calibration(PredictionTable(rows), 100)[0]["turns"] == 2
    for name in ("NLL", "perplexity"):
        assert (scores[name].value, scores[name].reason) == (None, "it is infinite")


def test_accuracy_by_coverage_by_hand():
    # By confidence: right, then one right and one wrong of 0.82, wrong, right, and one of which nothing is known.
    rows = [
        believing(0, 1, 0.92), believing(2, 1, 0.82), believing(4, 2, 0.82), believing(6, 3, 0.52),
        believing(8, 1, 0.42), prediction(1, "好", 10),
    ]  # fmt: skip
    swapped = [dataclasses.replace(rows[i], turn=turn) for i, turn in ((2, 0), (1, 2), (0, 4), (4, 6), (5, 8), (3, 10))]
    for each in (rows, swapped):
        scores = believed(each)
        assert scores["ACC at 80 % coverage"].value == pytest.approx(50)  # two of four
        accuracies = [1, 1.5 / 2, 2 / 3, 2 / 4, 3 / 5]
        assert scores["AURC"].value == pytest.approx(100 * (1 - sum(accuracies) / 5))
        assert scores["overconfidence"].value == pytest.approx(100 * (0.7 - 0.6))
        curve = {row["coverage"]: row["ACC"] for row in likelihood_metrics.coverage_curve(PredictionTable(each))}
        assert len(curve) == 20 and list(curve)[-1] == 100
        # Half of the turns: the surest and one and a half of the two of equal confidence.
        assert [curve[at] for at in (5, 20, 50, 60, 100)] == pytest.approx([100, 100, 100 * 1.75 / 2.5, 200 / 3, 60])
    for nothing in (PredictionTable([]), EIGHT):
        assert likelihood_metrics.coverage_curve(nothing) is None
    unknown = {believed([prediction(1, "好")])[name].reason for name in ("ACC at 80 % coverage", "AURC", "ECE")}
    assert unknown == {"the system reports no likelihoods of the labels"}


def test_calibration_and_coverage_have_intervals_over_dialogues():
    dialogues = {f"d{number}": Dialogue(f"d{number}", SAID) for number in range(20)}
    rows = [dataclasses.replace(believing(0, 1 + index % 2, 0.92), dialogue_id=name)
            for index, name in enumerate(dialogues)]  # fmt: skip
    found = score_predictions(rows, dialogues, MetricsConfig(profiles=[]))
    for name in ("ECE", "overconfidence", "ACC at 80 % coverage", "AURC"):
        score = found["likelihood"][name]
        assert score.low < score.value < score.high, name
    [row] = found["calibration"]
    assert row["low"] < row["ACC"] == 50 < row["high"]
    assert found["coverage"][0] == {"coverage": 5, "ACC": pytest.approx(50)}  # all are as sure


def test_confusion_by_hand():
    table = strategy_metrics.confusion(EIGHT)
    assert table.shape == (12, 13)
    assert table.sum() == 8
    cells = {
        (reference + 1, predicted): table[reference, predicted]
        for reference, predicted in numpy.argwhere(table).tolist()
    }
    assert cells == {(1, 1): 1, (5, 5): 1, (4, 5): 1, (11, 11): 1, (1, 2): 1, (4, 4): 1, (5, 0): 1, (12, 11): 1}


def test_transitions_by_hand():
    for strategy, expected in (
        (EIGHT.predicted, {(1, 5), (5, 5), (5, 11), (2, 4)}),
        (EIGHT.reference, {(1, 5), (5, 4), (4, 11), (1, 4), (4, 5), (5, 12)}),
    ):
        table = strategy_metrics.transitions(EIGHT, strategy)
        assert {(before + 1, after + 1) for before, after in numpy.argwhere(table).tolist()} == expected
        assert table.sum() == len(expected)
    thrice = chosen([(3, 3), (3, 3), (3, 3)])
    assert strategy_metrics.transitions(thrice, thrice.predicted)[2, 2] == 2


def test_calibration_by_hand():
    assert likelihood_metrics.calibration(EIGHT, 100) is None
    said = []
    # The likeliest strategy is 1 at 81 %, which is right, then 1 at 83 % and 2 at 40 %, which are wrong.
    rows = [[0.81, 0.19], [0.83, 0.17], [0.35, 0.4, 0.25]]
    for index, shares in enumerate(rows):
        likelihoods = [math.log(share) - 7 for share in shares] + [-math.inf] * (12 - len(shares))
        one = prediction(1, "好", turn=2 * index, reference_strategy=index + 1)
        said.append(dataclasses.replace(one, label_log_likelihoods=tuple(likelihoods)))
    low, high = likelihood_metrics.calibration(PredictionTable(said), 100)
    none = {"low": None, "high": None}
    assert low == {"turns": 1, "confidence": pytest.approx(40), "ACC": 0} | none
    assert high == {"turns": 2, "confidence": pytest.approx(82), "ACC": 50} | none


def test_the_lowest_scoring_turns_come_one_a_dialogue_and_the_longest_of_equals_first():
    def said(dialogue, turn, response, reference, **changes):
        return dataclasses.replace(
            prediction(7, response, turn=turn, reference_response=reference, **changes), dialogue_id=dialogue
        )

    turns = PredictionTable(
        [
            said("half", 0, "你们好吗", "你们"), said("half", 2, "好的", "好的"),
            said("short", 0, "好", "您早"), said("long", 0, "好", "您早您早"),
            said("wrong", 0, "好", "早", reference_strategy=1), said("wrong", 2, "好", "您早您早您早"),
        ]
    )  # fmt: skip
    rows = reply_metrics.lowest_scoring(turns)
    assert [(row["dialogue_id"], row["turn"]) for row in rows] == [("wrong", 0), ("long", 0), ("short", 0), ("half", 0)]
    assert [row["R-L char"] for row in rows] == pytest.approx([0, 0, 0, 200 / 3])
    assert [row["dialogue_id"] for row in reply_metrics.lowest_scoring(turns, 2)] == ["wrong", "long"]


def test_the_length_histogram_counts_every_reply_once():
    lengths = [0, 1, 1, 5, 200]
    turns = PredictionTable(
        [prediction(7, "字 " * size, turn=turn, reference_response="字字") for turn, size in enumerate(lengths)]
    )
    found = reply_metrics.length_histogram(turns)
    width, last = found["from"][1], len(found["from"]) - 1
    assert found["from"] == [width * number for number in range(last + 1)] and found["from"][-1] <= 200
    counts = [sum(min(size // width, last) == number for size in lengths) for number in range(last + 1)]
    assert found["system"] == counts and sum(found["system"]) == sum(found["reference"]) == 5
    assert found["reference"][2 // width] == 5
    assert reply_metrics.length_histogram(PredictionTable([])) == {"from": [0], "system": [0], "reference": [0]}


def test_process_by_hand():
    turns = chosen(
        # Stages of the system: 1 2 2 2 | 5 then 1 (back), 12 passed over, 3; its last is no farewell.
        [(1, 1), (5, 3), (5, 5), (5, 11)],
        [(11, 1), (2, 2), (12, 8), (7, 4), (7, 12), (0, 11), (7, 11)],
    )
    assert sides(turns, "process") == {
        "greeting first": (50, 100),
        "farewell last": (0, 100),
        "repeated strategy": (50, 0),  # 5 5 5; the 7 that was not read ends its run
        # System: 1-2, 2-2, 2-2 | 5-1, 1-3, 3-3, 3-3. Reference: 1-2, 2-2, 2-5 | 1-1, 1-4, 4-2, 2-5, 5-5.
        "stage regressions": (pytest.approx(100 / 7), pytest.approx(100 / 8)),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("好的😀，请稍等", set()),
        ("手续费１２．５０元", {"12.5"}),
        ("共1,200元，分3期", {"1200", "3"}),
        ("100，200或1,234.50", {"100", "200", "1234.5"}),
        ("一千二百元", {"1200"}),
        ("三万五千零五十元和八折", {"35050", "8"}),
        ("十五块钱，五十块，三百块吧，五角钱", {"15", "50", "300", "5"}),
        ("3万元、3.5万元和1.2亿", {"30000", "35000", "120000000"}),
        ("一千五块钱，两千五元，一万五元，五百二十元", {"1500", "2500", "15000", "520"}),
        ("一亿二千万元，一万亿元", {"120000000", "1000000000000"}),
        ("3千元，1万2千元，１万２元", {"3000", "12000"}),
        ("一点五元，零点五元，一点五万元，百分之二十", {"1.5", "0.5", "15000", "20"}),
        ("十元起，二十元内，一百元整，五元券", {"10", "20", "100", "5"}),
        ("一定为您处理，请等三天，一折腾，一角落里，五角星，两元件", set()),
        ("App 5.0.1，12:30前，9:05十分钟，2.0.0万", {"5.0.1", "12:30", "9:05", "2.0.0"}),
        ("订单A20240817B", {"20240817"}),
    ],
)
def test_numbers_and_amounts_in_a_text(text, expected):
    assert reply_metrics.numbers(text, words=False) == expected
    assert reply_metrics.numbers(text) >= expected


def test_a_numeral_that_is_no_amount_is_a_number_too():
    assert reply_metrics.numbers("三天前，七月二十号，三点五十分，二〇二五年") == {"3", "7", "20", "50", "2025"}
    assert reply_metrics.numbers("欠一千五，五百二，两万三，十二") == {"1500", "520", "23000", "12"}


def test_whatever_looks_like_a_number_is_read():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("0129０,.:，点零一二十百千万亿元块角折%分之 ", k=rng.randint(1, 12)))
        assert reply_metrics.numbers(text, words=False) <= reply_metrics.numbers(text)
    for text in ("十" + "亿" * 5000, "一" * 5000, "1." * 5000, "9" * 5000 + "万"):
        assert reply_metrics.numbers(text)


def new_numbers(table):
    """[turns] of the system and of the reference: whether a reply has a new number."""
    found = [reply_metrics.new_numbers(side).statistic.terms[:, 0] for side in (table, table.gold)]
    return [(side == 100).tolist() for side in found]


@pytest.mark.parametrize(
    ("said", "reply", "new"),
    [
        ("等了三天", "您等了3天", False),
        ("欠了三千", "欠款3千元", False),
        ("一百块", "退您100元", False),
        ("七月二号下的单", "您7月2号下的单", False),
        ("付了一千五", "退您1500元", False),
        ("百分之二十", "扣20%", False),
        ("你好", "退您五十块", True),
        ("你好", "再等三天", False),  # neither digits nor an amount
        ("你好", "再等3天", True),
    ],
)
def test_a_number_was_said_before_however_it_was_written(said, reply, new):
    dialogue = Dialogue("d1", (Turn(Speaker.CUSTOMER, said), Turn(Speaker.SUPPORTER, reply, STRATEGIES[6])))
    table = PredictionTable([prediction(7, reply, turn=1, reference_response=reply)], {"d1": dialogue})
    assert new_numbers(table) == [[new], [new]]


def test_new_numbers_are_those_that_nobody_said_before():
    said = [("您好", None), ("我付了100元", None), ("为您退80元", None), ("多少？", None), ("是的，一百元减20元", None)]
    turns = tuple(
        Turn(Speaker.CUSTOMER, text) if index % 2 else Turn(Speaker.SUPPORTER, text, STRATEGIES[6])
        for index, (text, _) in enumerate(said)
    )
    dialogues = {"d1": Dialogue("d1", turns)}
    replies = ["工号7", "100元退７元", "80元，１００元"]

    def flags(context):
        made = [
            dataclasses.replace(
                prediction(7, reply, turn=2 * index), context=context, reference_response=turns[2 * index].text
            )
            for index, reply in enumerate(replies)
        ]
        return new_numbers(PredictionTable(made, dialogues))

    # 7 is new; again in reference context, where the system's own 7 was never said. 80 was said by the reference's
    # supporter alone, and so never in generated context.
    assert flags("reference") == [[True, True, False], [False, True, True]]
    assert flags("generated") == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("我是[姓名]，手机号［手机号码］。", {"姓名", "手机号码"}),
        ("[手机号]和[手机号码]", {"手机号", "手机号码"}),
        ("[手机 号码][ 手机号码 ][手机号码2][手机号码_２]", {"手机号码"}),
        ("Call [Phone_Number 1] or [phone number], [E-mail]", {"phonenumber", "email"}),
        ("[customer's name/title]", {"customer'sname/title"}),
        ("[[姓名]]，[我的[手机号码]]", {"姓名", "手机号码"}),
        ("【温馨提示】【手机号码】", set()),
        ("[1]、[2024-01-01]、[3天]、[]、[ ]", set()),
        ("[您好，请稍等。] [Please hold on, thanks!]", set()),
        ("[情感管理]您好 [Emotional Management] [其它]", set()),
        ("[官网](https://example.com)，[姓名](先生)", {"姓名"}),
        ("[请您在这里填写您办理业务的时候预留在我们系统里的手机号码谢谢您]", set()),  # 31 characters
        ("[姓名", set()),
        ("", set()),
    ],
)
def test_kinds_of_placeholders(text, kinds):
    assert reply_metrics.placeholders(text) == kinds


PLACEHOLDER_METRICS = (
    reply_metrics.placeholders_kept,
    reply_metrics.placeholders_invented,
    reply_metrics.placeholders_filled,
)
CALLS = {
    "zh": (
        "您好，我是[工号]。", "我叫[姓名]，付了300元。", "请提供[手机号码]和[身份证号]。", "手机是[手机号码]。",
        "已登记[手机号码]，请放心。", "好的，[验证码]收到。", "再见。",
    ),
    "en": (
        "Hello, this is [employee number].", "I am [name] and I paid $300.", "Your [phone number] and [ID number]?",
        "My number is [phone number].", "I noted [phone number], all is well.", "Got [code].", "Goodbye.",
    ),
}  # fmt: skip
FAULTY = {
    "zh": (
        "您好，我是8012号。", "请提供［手机号码］，付款300元。", "[姓名]您好，[手机号]8012已登记。",
        "[手机号]再见8012。",
    ),
    "en": (
        "Hello, this is 8012.", "[Phone_Number], you paid 300.00?", "[name], I noted [phone] of 8012.", "[phone] 8012.",
    ),
}  # fmt: skip


def answered(call, replies, context="reference", known=True, **changes):
    turns = tuple(
        Turn(Speaker.CUSTOMER, text) if index % 2 else Turn(Speaker.SUPPORTER, text, STRATEGIES[6])
        for index, text in enumerate(call)
    )
    made = [
        dataclasses.replace(prediction(7, reply, 2 * index), context=context, reference_response=call[2 * index])
        for index, reply in enumerate(replies)
    ]
    made = [dataclasses.replace(each, **changes) for each in made]
    return PredictionTable(made, {"d1": Dialogue("d1", turns)} if known else None)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_placeholders_by_hand(language):
    """The references have 1, 2, 1 and 0 kinds; the replies keep one. The third and the last reply have a kind that the
    reference's dialogue lacks; in generated context the last one repeats the third. The first and the third reply have
    a new number, which in generated context the third one repeats."""
    call, replies = CALLS[language], FAULTY[language]
    reference, generated = (answered(call, replies, context) for context in ("reference", "generated"))
    assert [value(metric(reference)) for metric in PLACEHOLDER_METRICS] == [25, 50, pytest.approx(200 / 3)]
    assert [value(metric(generated)) for metric in PLACEHOLDER_METRICS] == [25, 25, pytest.approx(100 / 3)]
    for table in (reference.gold, answered(call, call[::2]), answered(call, call[::2], "generated")):
        assert [value(metric(table)) for metric in PLACEHOLDER_METRICS] == [100, 0, 0]
    many = [
        dataclasses.replace(each, dialogue_id=f"d{n}") for n in range(12) for each in reference.predictions[n % 3 :]
    ]
    table = PredictionTable(many, {f"d{n}": reference.dialogues["d1"] for n in range(12)})
    for metric in PLACEHOLDER_METRICS:
        found = metric(table).compute(table.dialogue, 200)
        assert found.low < found.value < found.high


def test_a_bracket_in_the_place_of_a_strategy_is_no_placeholder():
    call = ("您好", "在吗", "[姓名]您好")
    replies = ("[热情问候]您好", "[姓名]您好")
    invented = reply_metrics.placeholders_invented
    assert value(invented(answered(call, replies))) == 50  # the text had a strategy before it
    assert value(invented(answered(call, replies, strategy=None))) == 0
    assert value(invented(answered(call, replies, strategy=None, predicts_strategy=False))) == 50
    assert value(reply_metrics.placeholders_kept(answered(call, replies))) == 100


def test_placeholder_metrics_are_not_applicable_without_placeholders_or_dialogues():
    def reasons(table):
        return [metric(table).compute(table.dialogue, 100).reason for metric in PLACEHOLDER_METRICS]

    none = "no reference reply has a placeholder"
    assert reasons(answered(("您好", "我叫[姓名]", "好"), ("[姓名]您好", "7号"))) == [none, None, none]
    assert reasons(answered((), ())) == [none, "no turns to score", none]
    # A placeholder in each reply is invented, although no reference has one.
    plain = answered(("您好", "在吗", "好"), ("[姓名]您好", "[姓名]，在的"))
    assert value(reply_metrics.placeholders_invented(plain)) == 100
    assert value(reply_metrics.placeholders_invented(plain.gold)) == 0
    unknown = "the run has no dialogues.jsonl"
    assert reasons(answered(CALLS["zh"], FAULTY["zh"], known=False)) == [None, unknown, unknown]


def test_length_and_distinct_by_hand():
    turns = PredictionTable([prediction(7, "好 的\n😀"), prediction(7, "", turn=2)])
    assert [value(reply_metrics.reply_length(side)) for side in (turns, turns.gold)] == [1.5, 8]
    turns = PredictionTable([prediction(7, "您好 您好 您好"), prediction(7, "您好 您好", turn=2)])
    one, two = (
        metric(turns).compute(turns.dialogue, 100) for metric in (reply_metrics.distinct_1, reply_metrics.distinct_2)
    )
    assert (one.value, two.value) == (20, pytest.approx(100 / 3))
    assert one.low is None
    empty = reply_metrics.distinct_1(PredictionTable([prediction(7, "")])).compute(numpy.zeros(1, int), 100)
    assert (empty.value, empty.reason) == (None, "no reply has 1 words")


def test_drift_is_reference_minus_generated_turn_by_turn():
    reference = [*EIGHT.predictions]
    generated = [dataclasses.replace(each, context="generated", strategy=4) for each in reference]
    dialogues = {"d0": Dialogue("d0", SAID * 4), "d1": Dialogue("d1", SAID * 4)}
    rows = context_drift(reference, generated, dialogues, MetricsConfig())
    assert [(row["position"], row["turns"]) for row in rows] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    # Right in reference context: 1, 2, 0, 1 of two; with 4 throughout: 0, 1, 1, 0.
    assert [row["ACC"].value for row in rows] == [50, 50, -50, 50]
    assert [row["R-L char"].value for row in rows] == [0, 0, 0, 0]
    # A turn that failed in one context is left out of both, and the others stay where they are in their dialogues.
    without = context_drift(reference[1:], generated[:-1], dialogues, MetricsConfig())
    assert [(row["position"], row["turns"]) for row in without] == [(1, 1), (2, 2), (3, 2), (4, 1)]
    assert without[1:3] == rows[1:3] and without[3]["ACC"].value == 100
    # Each context's own figures are of the same turns.
    for row, expected in zip((rows[0], without[0], without[3]), ((50, 0), (0, 0), (100, 0)), strict=True):
        assert (row["reference"]["ACC"].value, row["generated"]["ACC"].value) == expected
        assert [row[context]["R-L char"].value for context in ("reference", "generated")] == [0, 0]
    assert context_drift(reference, [], dialogues, MetricsConfig()) == []


def test_turns_that_failed_move_no_other_turn():
    dialogues = {name: Dialogue(name, SAID * 4) for name in ("d0", "d1", "d2")}
    rest = [each for each in EIGHT.predictions if (each.dialogue_id, each.turn) not in {("d0", 0), ("d0", 4)}]
    turns = PredictionTable(rest, dialogues)
    assert accuracy_by_position(turns) == [(1, 1, 0), (2, 2, 100), (3, 1, 0), (4, 2, 50)]
    with pytest.raises(InputError, match="dialogue d1 has no supporter turn 7, but it is predicted"):
        PredictionTable([dataclasses.replace(rest[-1], turn=7)], dialogues)
    # d1 alone is whole, and d2 failed altogether.
    alone = PredictionTable([each for each in rest if each.dialogue_id == "d1"], dialogues)
    assert (turns.whole.tolist(), alone.whole.all()) == ([False] * 2 + [True] * 4, True)
    assert strategy_metrics.transitions(turns, turns.reference).tolist() == [
        [int((row, column) in {(1, 4), (4, 5), (5, 12)}) for column in range(1, 13)] for row in range(1, 13)
    ]
    found, expected = (sides(each, "process") for each in (turns, alone))
    assert found == expected and found["greeting first"] == (0, 100)


def test_bleu_of_resampled_sums_equals_sacrebleu_of_the_resample():
    counts = lexical.corpus_bleu_zh_counts(ODD_PAIRS)
    draws = [[0, 0, 1, 4], [3, 3], [2, 1, 1], [4], [3, 4]]
    for order in (2, 4):
        sums = numpy.stack([counts[draw].sum(axis=0) for draw in draws])
        expected = []
        for draw in draws:
            replies, references = zip(*(ODD_PAIRS[index] for index in draw), strict=True)
            metric = BLEU(tokenize="zh", max_ngram_order=order)
            expected.append(metric.corpus_score(list(replies), [list(references)]).score)
        assert lexical.corpus_bleu_zh(sums, order) == pytest.approx(expected)


def test_config_is_a_structured_config_and_checks_itself(tmp_path):
    schema = OmegaConf.structured(MetricsConfig)
    assert OmegaConf.to_object(schema).profiles is None  # those of the language
    for change, message in (
        ({"profiles": ["papr"]}, "metrics.profiles=papr: choose one of paper, zh, en"),
        ({"batch_size": 0}, "metrics.batch_size=0"),
        ({"bootstrap_resamples": 10}, "metrics.bootstrap_resamples=10"),
        ({"bertscore_layers": 0}, "metrics.bertscore_layers=0"),
        ({"bertscore_model": str(tmp_path)}, "metrics.bertscore_model=.*no config.json"),
        ({"bleurt_model": str(tmp_path / "none")}, "metrics.bleurt_model=.*no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            OmegaConf.to_object(OmegaConf.merge(schema, change))


# --- BERTScore on a random BERT ---

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = sorted(set("您好，请问有什么可以帮您？的吗手续费是元已退到账户将开打进入页面感谢来电再见！0123456789"))
LONG_PAIRS = [*ODD_PAIRS, ("手续费" * 20, "请问" * 3), ("好", "您好，请打开页面。" * 4), ("再见！", "再见！")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory with a random 3-layer BERT whose tokenizer config has `model_max_length`."""
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join([*SPECIAL, *CHARACTERS]), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(path)
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def edit_json(path, **changes):
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def package_f1(pairs, directory, layers):
    replies, references = map(list, zip(*pairs, strict=True))
    return bert_score_package(replies, references, model_type=str(directory), num_layers=layers, device="cpu")[2]


@pytest.mark.slow
def test_bertscore_equals_the_package(bert):
    scorable = [pair for pair in LONG_PAIRS if pair[0]]
    expected = package_f1(scorable, bert, layers=2)
    assert expected.max() - expected.min() > 0.2  # the random model tells these pairs apart
    assert metric_models.bertscore(scorable, bert, 2, batch_size=3) == pytest.approx(100 * expected.numpy(), abs=1e-4)
    assert abs(metric_models.bertscore(scorable, bert, 1) - metric_models.bertscore(scorable, bert, 2)).max() > 0.1


def test_bertscore_counts_an_empty_reply_as_zero(bert):
    pair = ("您好，请问", "您好，请进")
    alone = metric_models.bertscore([pair], bert, 2).item()
    assert metric_models.bertscore([(" ", "您好"), pair], bert, 2) == pytest.approx([0, alone])


def test_bertscore_survives_a_tokenizer_without_a_maximum_length(bert, tmp_path):
    unlimited = shutil.copytree(bert, tmp_path / "unlimited")
    edit_json(unlimited / "tokenizer_config.json", model_max_length=None)
    with pytest.raises(OverflowError):
        package_f1(LONG_PAIRS[:1], unlimited, layers=2)
    assert metric_models.bertscore(LONG_PAIRS, unlimited, 2) == pytest.approx(
        metric_models.bertscore(LONG_PAIRS, bert, 2)
    )


def test_bertscore_reaches_the_table(bert):
    config = MetricsConfig(bertscore_model=str(bert), bertscore_layers=2)
    cell = score_predictions(FOUR_TURNS, DIALOGUES, config)["profiles"]["paper"]["BS"]
    pairs = [(turn.response, turn.reference_response) for turn in FOUR_TURNS]
    assert cell.value == pytest.approx(metric_models.bertscore(pairs, bert, 2).mean()) and cell.reason is None
    assert f"layer 2 of {bert.name}, not rescaled" in cell.signature


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_rescaled_bertscore_equals_the_package(bert, tmp_path):
    table = tmp_path / "baseline.tsv"
    table.write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.2,0.2\n2,0.31,0.32,0.33\n", encoding="utf-8")
    scorable = [pair for pair in LONG_PAIRS if pair[0]]
    replies, references = map(list, zip(*scorable, strict=True))
    expected = bert_score_package(
        replies, references, model_type=str(bert), num_layers=2, device="cpu", lang="zh",
        rescale_with_baseline=True, baseline_path=str(table),
    )[2]  # fmt: skip
    baseline = model_based.bertscore_baseline("whatever", 2, table)
    assert baseline == pytest.approx(33)
    raw = metric_models.bertscore(scorable, bert, 2)
    assert model_based.rescale_bertscore(raw, baseline) == pytest.approx(100 * expected.numpy(), abs=1e-4)
    assert model_based.rescale_bertscore(numpy.array([0.0, 33.0, 100.0]), 33).tolist() == [
        0,
        0,
        100,
    ]  # the first: an empty reply
    with pytest.raises(InputError, match=r"baseline\.tsv: not a baseline table .* with layer 3"):
        model_based.bertscore_baseline("whatever", 3, table)


def test_the_baseline_is_the_packages_where_it_has_one(bert, tmp_path):
    assert model_based.bertscore_baseline("bert-base-chinese", 8) == pytest.approx(54.755783)
    assert model_based.bertscore_baseline(bert.name, 2) is None
    named = shutil.copytree(bert, tmp_path / "bert-base-chinese")
    cells = [
        score_predictions(FOUR_TURNS, DIALOGUES, MetricsConfig(bertscore_model=str(path), bertscore_layers=2))[
            "profiles"
        ]["zh"]
        for path in (bert, named)
    ]
    assert cells[0]["BS rescaled"].value is None
    assert cells[0]["BS rescaled"].reason.startswith(f"bert-score has no baseline for a model named {bert.name}")
    assert cells[1]["BS rescaled"].value != pytest.approx(cells[1]["BS"].value)
    assert "rescaled with the baseline 42.74, unverified on real weights" in cells[1]["BS rescaled"].signature


def test_bertscore_refuses_models_that_it_cannot_score_with(bert, tmp_path):
    with pytest.raises(InputError, match="BERTScore needs layer 8, but the model has 3 layers"):
        metric_models.bertscore(ODD_PAIRS, bert, 8)
    with pytest.raises(InputError, match="cannot load the BERTScore model"):
        metric_models.bertscore(ODD_PAIRS, tmp_path / "none", 2)
    partial = shutil.copytree(bert, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights missing.*encoder\.layer\.1\.output\.dense\.weight"):
        metric_models.bertscore(ODD_PAIRS, partial, 2)


# --- BLEURT on a random RemBERT ---

HIDDEN = 16
VOCABULARY = ["<pad>", "<unk>", "[CLS]", "[SEP]", *CHARACTERS]


def rembert():
    torch.manual_seed(1)
    config = RemBertConfig(
        vocab_size=len(VOCABULARY), input_embedding_size=8, hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return RemBertModel(config).eval(), torch.nn.Linear(HIDDEN, 1)


@pytest.fixture
def bleurt_directory(tmp_path):
    """A directory as conversions of BLEURT-20 lay it out: their names in the config and for the weights."""
    model, head = rembert()
    weights = {
        "bleurt." + name.replace("embedding_hidden_mapping_in", "embedding_projection"): value
        for name, value in model.state_dict().items()
    }
    weights["bleurt.embeddings.position_ids"] = torch.arange(64)[None]
    weights |= {f"classifier.{name}": value for name, value in head.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    config = model.config.to_dict() | {"model_type": "bleurt", "embedding_size": 8}
    del config["input_embedding_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in VOCABULARY], unk_id=1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def bleurt_by_hand(reply, reference):
    """[CLS] reference [SEP] reply [SEP], one pair without padding, through encoder, pooler and head."""
    model, head = rembert()
    first, second = ([VOCABULARY.index(character) for character in text] for text in (reference, reply))
    ids = torch.tensor([[2, *first, 3, *second, 3]])
    types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
    with torch.inference_mode():
        return 100 * head(model(input_ids=ids, token_type_ids=types).pooler_output).item()


BLEURT_PAIRS = [("您好，请问", "您好"), ("手续费是12元", "手续费12"), ("再见！", "感谢您的来电，再见！")]


def test_bleurt_equals_a_forward_by_hand(bleurt_directory):
    for reply, reference in BLEURT_PAIRS:
        expected = bleurt_by_hand(reply, reference)
        assert abs(expected - bleurt_by_hand(reference, reply)) > 1  # the order of the two matters
        assert metric_models.bleurt([(reply, reference)], bleurt_directory) == pytest.approx(expected, abs=1e-3)


def test_bleurt_batches_do_not_change_scores(bleurt_directory):
    expected = [0, *(bleurt_by_hand(*pair) for pair in BLEURT_PAIRS)]  # an empty reply counts as 0
    pairs = [("", "您好"), *BLEURT_PAIRS]
    for batch_size in (1, 2, 64):
        assert metric_models.bleurt(pairs, bleurt_directory, batch_size) == pytest.approx(expected, abs=1e-3)


def test_bleurt_truncates_long_pairs(bleurt_directory):
    long = metric_models.bleurt([("手" * 90, "费" * 200)], bleurt_directory)
    assert long == pytest.approx(bleurt_by_hand("手" * 30, "费" * 31), abs=1e-3)  # 64 positions less 3 markers


def test_bleurt_reads_pytorch_files(bleurt_directory):
    expected = metric_models.bleurt(BLEURT_PAIRS, bleurt_directory)
    other = shutil.copytree(bleurt_directory, bleurt_directory / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    assert metric_models.bleurt(BLEURT_PAIRS, other) == pytest.approx(expected)


def test_bleurt_refuses_weights_that_are_not_its_own(bleurt_directory):
    file = bleurt_directory / "model.safetensors"
    weights = load_file(file)
    headless = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(headless, file)
    with pytest.raises(InputError, match=r"missing classifier\.bias, classifier\.weight; unexpected none"):
        metric_models.bleurt(BLEURT_PAIRS, bleurt_directory)
    save_file(weights | {"bleurt.encoder.layer.2.output.dense.bias": torch.zeros(HIDDEN)}, file)
    with pytest.raises(InputError, match=r"missing none; unexpected encoder\.layer\.2\.output\.dense\.bias"):
        metric_models.bleurt(BLEURT_PAIRS, bleurt_directory)
    save_file(weights | {"classifier.weight": torch.zeros(2, HIDDEN)}, file)
    with pytest.raises(InputError, match=r"weights do not fit config\.json"):
        metric_models.bleurt(BLEURT_PAIRS, bleurt_directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_bleurt_names_the_file_that_is_missing_before_it_is_needed(bleurt_directory, name):
    config = MetricsConfig(bleurt_model=str(bleurt_directory))
    fetch_models(config)
    (bleurt_directory / name).unlink()
    for read in (lambda: fetch_models(config), lambda: metric_models.bleurt(BLEURT_PAIRS, bleurt_directory)):
        with pytest.raises(InputError, match=f"has no {name}"):
            read()


def test_bertscore_names_the_file_that_is_missing_before_it_is_needed(bert, tmp_path):
    copy = shutil.copytree(bert, tmp_path / "bert")
    fetch_models(MetricsConfig(bertscore_model=str(copy)))
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"bert: has no \*\.safetensors or \*\.bin"):
        fetch_models(MetricsConfig(bertscore_model=str(copy)))
