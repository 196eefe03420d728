"""Metrics against hand-computed values, against the reference libraries, and on small random models saved here."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jieba
import pytest
import torch
from bert_score import score as bert_score_package
from omegaconf import OmegaConf
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, BertTokenizerFast, RemBertConfig, RemBertModel

from csc_train.errors import InputError
from csc_train.evaluation import learned, lexical
from csc_train.evaluation.metrics import PROFILES, MetricsConfig, Score, score
from csc_train.evaluation.predictions import Prediction

ODD_PAIRS = [
    ("您好，请问有什么可以帮您？", "您好，有什么可以帮您的吗？"),
    ("手续费是１２元，已退到您的账户。", "手续费是12元，将退到账户。"),
    ("请打开 App 的 Settings 页面😀", "请打开App，进入Settings页面。"),
    ("", "感谢您的来电，再见！"),
    ("😀", "好的"),
]


# --- BLEU ---


def test_sentence_bleu_by_hand():
    # Two of three words and one of two bigrams match; orders 3 and 4 have one and no n-gram, and method1 counts 0.1.
    bleu_2, bleu_4 = lexical.sentence_bleu([(["您", "好", "吗"], ["您", "好", "呀"])])
    assert bleu_2 == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 2))
    assert bleu_4 == pytest.approx(100 * (2 / 3 * 1 / 2 * 0.1 * 0.1) ** (1 / 4))


def test_sentence_bleu_punishes_short_replies():
    bleu_2, _ = lexical.sentence_bleu([(["您", "好"], ["您", "好", "请", "问"])])
    assert bleu_2 == pytest.approx(100 * math.exp(1 - 4 / 2))


@pytest.mark.parametrize("order", [2, 4])
def test_corpus_bleu_zh_equals_sacrebleu_on_odd_text(order):
    replies, references = zip(*ODD_PAIRS, strict=True)
    expected = BLEU(tokenize="zh", max_ngram_order=order).corpus_score(list(replies), [list(references)]).score
    assert expected > 1
    assert lexical.corpus_bleu_zh(ODD_PAIRS)[order // 2 - 1] == pytest.approx(expected)


def test_corpus_bleu_zh_counts_characters():
    bleu_2, _ = lexical.corpus_bleu_zh([("您好吗", "您好呀")])
    assert bleu_2 == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 2))


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
    assert lexical.rouge_l(pairs) == pytest.approx(100 * sum(f1) / len(f1))


def test_rouge_l_on_characters_by_hand():
    # 您 and 好 in common, of 3 and 5 characters once the space is gone.
    assert lexical.rouge_l([(lexical.characters("您 好吗"), lexical.characters("您们好的呀"))]) == 100 * 2 * 2 / 8


def test_default_tokenizer_of_rouge_score_ignores_chinese():
    same = "您好，很高兴为您服务。"
    assert lexical.rouge_l_latin([(same, same)]) == 0
    assert lexical.rouge_l_latin([("１２元", "１２元")]) == 0  # full-width digits are not ASCII
    assert lexical.rouge_l_latin([("手续费共12元", "请支付12块")]) == 100  # 12 is all that it sees
    assert lexical.rouge_l_latin([("用App交12元", "app里交30元")]) == 50


# --- words ---


def test_words_keep_odd_text_and_drop_white_space():
    assert lexical.words("转账５００元 to PayPal账户😀") == [
        "转账",
        "５",
        "０",
        "０",
        "元",
        "to",
        "PayPal",
        "账户",
        "😀",
    ]
    assert lexical.words("") == lexical.words(" \n　") == []


def test_words_equal_jieba_as_it_comes(tmp_path):
    stock = jieba.Tokenizer()
    stock.tmp_dir = str(tmp_path)
    for reply, reference in ODD_PAIRS:
        for text in (reply, reference):
            assert lexical.words(text) == [word for word in stock.lcut(text) if word.strip()]


def test_segmenter_is_silent_and_leaves_no_file(tmp_path):
    code = "from csc_train.evaluation.lexical import words; print(len(words('账户余额')))"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr, list(tmp_path.iterdir())) == ("2\n", "", [])


# --- edges that all lexical metrics share ---


def test_no_pairs_give_no_score():
    for metric in (lexical.sentence_bleu, lexical.corpus_bleu_zh, lexical.rouge_l, lexical.rouge_l_latin):
        assert metric([]) is None
    assert learned.bertscore([], "nowhere") is None
    assert learned.bleurt([], "nowhere") is None


@pytest.mark.parametrize("reply", ["", "  "])
def test_an_empty_reply_scores_zero(reply):
    good, empty = ("卡号 6222", "卡号 6222"), (reply, "卡号 6222")
    for metric, prepare in (
        (lambda pairs: lexical.sentence_bleu(pairs)[0], lexical.word_pairs),
        (lexical.rouge_l, lexical.word_pairs),
        (lexical.rouge_l_latin, list),
    ):
        assert metric(prepare([good])) == pytest.approx(100)
        assert metric(prepare([good, empty])) == pytest.approx(50)
    assert lexical.corpus_bleu_zh([empty]) == (0, 0)


# --- one context scored ---


def prediction(strategy, response, reference_strategy=7, reference="手续费是12元。"):
    return Prediction("d1", 0, "reference", "hash", "", strategy, response, reference_strategy, reference)


FOUR_TURNS = [
    prediction(7, "手续费是12元。"),
    prediction(5, "非常抱歉。"),
    prediction(None, "手续费"),
    prediction(7, ""),
]


def test_score_has_every_column_in_order():
    result = score(FOUR_TURNS, MetricsConfig(), strategies_apply=True)
    assert list(result["profiles"]) == ["paper", "zh"]
    assert list(result["profiles"]["paper"]) == ["B-2", "B-4", "R-L", "BS", "BR", "ACC"]
    assert list(result["profiles"]["zh"]) == ["B-2", "B-4", "R-L char", "R-L word", "BS", "ACC"]
    for profile in result["profiles"].values():
        for cell in profile.values():
            assert cell.unit and cell.signature and (cell.value is None) == (cell.reason is not None)


def test_score_puts_each_metric_into_its_column():
    paper, zh = score(FOUR_TURNS, MetricsConfig(), strategies_apply=True)["profiles"].values()
    pairs = [(turn.response, turn.reference_response) for turn in FOUR_TURNS]
    words = lexical.word_pairs(pairs)
    assert (paper["B-2"].value, paper["B-4"].value) == lexical.sentence_bleu(words)
    assert paper["R-L"].value == 25  # the one reply that has the 12
    assert (zh["B-2"].value, zh["B-4"].value) == lexical.corpus_bleu_zh(pairs)
    assert zh["R-L char"].value == lexical.rouge_l(pairs)
    assert zh["R-L word"].value == lexical.rouge_l(words)
    assert len({paper["B-2"].value, paper["B-4"].value, zh["B-2"].value, zh["R-L char"].value}) == 4


def test_unparsed_strategies_count_as_wrong_and_are_counted():
    result = score(FOUR_TURNS, MetricsConfig(), strategies_apply=True)
    assert result["profiles"]["paper"]["ACC"].value == result["profiles"]["zh"]["ACC"].value == 50
    assert result["counts"] == {"turns": 4, "unparsed": 1, "empty_replies": 1}


def test_accuracy_is_not_applicable_where_no_strategy_is_predicted():
    result = score([prediction(None, "好的")], MetricsConfig(), strategies_apply=False)
    assert result["profiles"]["paper"]["ACC"].value is None
    assert result["profiles"]["paper"]["ACC"].reason == "this mode predicts no strategy"
    assert result["counts"] == {"turns": 1, "unparsed": None, "empty_replies": 0}


def test_missing_metric_models_are_reasons():
    paper = score(FOUR_TURNS, MetricsConfig(profiles=["paper"]), strategies_apply=True)["profiles"]["paper"]
    assert (paper["BS"].value, paper["BS"].reason) == (None, "no BERTScore model directory given")
    assert (paper["BR"].value, paper["BR"].reason) == (None, "no BLEURT model directory given")
    assert "unverified on real weights" in paper["BR"].signature


def test_no_turns_give_reasons_not_numbers():
    result = score([], MetricsConfig(), strategies_apply=True)
    assert {cell.value for profile in result["profiles"].values() for cell in profile.values()} == {None}
    assert result["profiles"]["paper"]["ACC"].reason == "no turns to score"


def test_scores_serialise():
    result = score(FOUR_TURNS, MetricsConfig(), strategies_apply=True)
    plain = json.loads(json.dumps(result, default=dataclasses.asdict))
    assert Score(**plain["profiles"]["zh"]["R-L char"]) == result["profiles"]["zh"]["R-L char"]


def test_config_is_a_structured_config_and_checks_itself(tmp_path):
    schema = OmegaConf.structured(MetricsConfig)
    assert list(OmegaConf.to_object(schema).profiles) == list(PROFILES)
    for change, message in (
        ({"profiles": ["papr"]}, "metrics.profiles=papr: choose one of paper, zh"),
        ({"batch_size": 0}, "metrics.batch_size=0"),
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


def test_bertscore_equals_the_package(bert):
    scorable = [pair for pair in LONG_PAIRS if pair[0]]
    expected = package_f1(scorable, bert, layers=2)
    assert expected.max() - expected.min() > 0.2  # the random model tells these pairs apart
    assert learned.bertscore(scorable, bert, 2, batch_size=3) == pytest.approx(100 * expected.mean().item(), abs=1e-4)
    assert learned.bertscore(scorable[:1], bert, 2) == pytest.approx(100 * expected[0].item(), abs=1e-4)
    assert abs(learned.bertscore(scorable, bert, 1) - learned.bertscore(scorable, bert, 2)) > 0.1


def test_bertscore_counts_an_empty_reply_as_zero(bert):
    pair = ("您好，请问", "您好，请进")
    assert learned.bertscore([pair, (" ", "您好")], bert, 2) == pytest.approx(learned.bertscore([pair], bert, 2) / 2)


def test_bertscore_survives_a_tokenizer_without_a_maximum_length(bert, tmp_path):
    unlimited = shutil.copytree(bert, tmp_path / "unlimited")
    edit_json(unlimited / "tokenizer_config.json", model_max_length=None)
    with pytest.raises(OverflowError):
        package_f1(LONG_PAIRS[:1], unlimited, layers=2)
    assert learned.bertscore(LONG_PAIRS, unlimited, 2) == pytest.approx(learned.bertscore(LONG_PAIRS, bert, 2))


def test_bertscore_reaches_the_table(bert):
    config = MetricsConfig(bertscore_model=str(bert), bertscore_layers=2)
    cell = score(FOUR_TURNS, config, strategies_apply=True)["profiles"]["paper"]["BS"]
    pairs = [(turn.response, turn.reference_response) for turn in FOUR_TURNS]
    assert cell.value == pytest.approx(learned.bertscore(pairs, bert, 2)) and cell.reason is None
    assert f"layer 2 of {bert.name}, not rescaled" in cell.signature


def test_bertscore_refuses_models_that_it_cannot_score_with(bert, tmp_path):
    with pytest.raises(InputError, match="layer 8 is wanted for BERTScore, but the model has 3 layers"):
        learned.bertscore(ODD_PAIRS, bert, 8)
    with pytest.raises(InputError, match="cannot load the BERTScore model"):
        learned.bertscore(ODD_PAIRS, tmp_path / "none", 2)
    partial = shutil.copytree(bert, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights missing.*encoder\.layer\.1\.output\.dense\.weight"):
        learned.bertscore(ODD_PAIRS, partial, 2)


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
        assert learned.bleurt([(reply, reference)], bleurt_directory) == pytest.approx(expected, abs=1e-3)


def test_bleurt_batches_do_not_change_scores(bleurt_directory):
    expected = sum(bleurt_by_hand(*pair) for pair in BLEURT_PAIRS) / 4  # the empty fourth counts as 0
    pairs = [*BLEURT_PAIRS, ("", "您好")]
    for batch_size in (1, 2, 64):
        assert learned.bleurt(pairs, bleurt_directory, batch_size) == pytest.approx(expected, abs=1e-3)


def test_bleurt_truncates_long_pairs(bleurt_directory):
    long = learned.bleurt([("手" * 90, "费" * 200)], bleurt_directory)
    assert long == pytest.approx(bleurt_by_hand("手" * 30, "费" * 31), abs=1e-3)  # 64 positions less 3 markers


def test_bleurt_reads_pytorch_files(bleurt_directory):
    expected = learned.bleurt(BLEURT_PAIRS, bleurt_directory)
    other = shutil.copytree(bleurt_directory, bleurt_directory / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    assert learned.bleurt(BLEURT_PAIRS, other) == pytest.approx(expected)


def test_bleurt_refuses_weights_that_are_not_its_own(bleurt_directory):
    file = bleurt_directory / "model.safetensors"
    weights = load_file(file)
    headless = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(headless, file)
    with pytest.raises(InputError, match=r"missing classifier\.bias, classifier\.weight; unexpected none"):
        learned.bleurt(BLEURT_PAIRS, bleurt_directory)
    save_file(weights | {"bleurt.encoder.layer.2.output.dense.bias": torch.zeros(HIDDEN)}, file)
    with pytest.raises(InputError, match=r"missing none; unexpected encoder\.layer\.2\.output\.dense\.bias"):
        learned.bleurt(BLEURT_PAIRS, bleurt_directory)
    save_file(weights | {"classifier.weight": torch.zeros(2, HIDDEN)}, file)
    with pytest.raises(InputError, match=r"weights do not fit config\.json"):
        learned.bleurt(BLEURT_PAIRS, bleurt_directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_bleurt_names_the_file_that_is_missing(bleurt_directory, name):
    (bleurt_directory / name).unlink()
    with pytest.raises(InputError, match=name):
        learned.bleurt(BLEURT_PAIRS, bleurt_directory)
