"""Chinese words are jieba's, and finding them leaves nothing behind."""

import os
import random
import subprocess
import sys
from collections import Counter

import jieba
import pytest
from conftest import ROOT, random_dialogue

from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.segmentation import segment_words
from csc_train.evaluation import scoring, table
from csc_train.evaluation.config import MetricsConfig
from csc_train.inference.config import CONTEXTS
from csc_train.inference.predictions import FailedTurn, Prediction, write_predictions


def test_words_keep_odd_text_and_drop_white_space():
    assert segment_words("转账５００元 to PayPal账户😀") == [
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
    assert segment_words("") == segment_words(" \n　") == []


@pytest.mark.slow
def test_words_equal_jieba_as_it_comes(tmp_path):
    stock = jieba.Tokenizer()
    stock.tmp_dir = str(tmp_path)
    rng = random.Random(0)
    for text in ["账户余额不足，请先转账500元。", *(random_dialogue(rng).text for _ in range(20))]:
        assert segment_words(text) == [word for word in stock.lcut(text) if word.strip()]


@pytest.mark.slow
def test_segmenter_is_silent_and_leaves_no_file(tmp_path):
    code = "from csc_train.data.segmentation import segment_words; print(len(segment_words('账户余额')))"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr, list(tmp_path.iterdir())) == ("2\n", "", [])


def write_run(directory, language="zh", changed=""):
    """Predictions of two systems in both contexts, with a failed turn; `changed` is added to one reply."""
    dialogues = generate_sample(12, 1, language)
    write_dialogues(directory / "dialogues.jsonl", dialogues)
    for name in ("one", "other"):
        for context in CONTEXTS:
            rng, rows = random.Random(f"{name} {context}"), []
            for dialogue in dialogues:
                for turn in dialogue.supporter_turns:
                    gold = dialogue.turns[turn]
                    reply = rng.choice(dialogue.turns).text + f" {rng.randrange(9)}"
                    reply += changed if (name, context, len(rows)) == ("other", "generated", 5) else ""
                    rows.append(Prediction(dialogue.id, turn, context, "", reply, rng.randint(1, 12), reply,
                                           gold.strategy.number, gold.text))  # fmt: skip
            if (name, context) == ("one", "generated"):
                rows[3] = FailedTurn(rows[3].dialogue_id, rows[3].turn, context, "timeout", "-")
            write_predictions(directory / "predictions" / f"{name}-{context}.jsonl", rows)
    (directory / "evaluated_model.json").write_text(f'{{"language": "{language}"}}')


@pytest.mark.slow
@pytest.mark.parametrize(("language", "function"), [("zh", "segment_words"), ("en", "split_words")])
def test_a_run_segments_each_distinct_text_once(tmp_path, monkeypatch, language, function):
    write_run(tmp_path, language)
    calls, segment = Counter(), getattr(table, function)

    def counted(text):
        calls[text] += 1
        return segment(text)

    monkeypatch.setattr(table, function, counted)
    config = MetricsConfig(bootstrap_resamples=100)
    scored = scoring.score_run(tmp_path, config)
    predictions = [each for contexts in scored.run.predictions.values() for rows in contexts.values() for each in rows]
    assert calls == Counter({text for each in predictions for text in (each.response, each.reference_response)})
    assert len(calls) < 2 * len(predictions)
    scoring.score_run(tmp_path, config)
    assert set(calls.values()) == {2}  # nothing is kept for another run


@pytest.mark.slow
def test_scores_of_a_run_are_those_of_each_table_alone(tmp_path, monkeypatch):
    config = MetricsConfig(bootstrap_resamples=100)
    write_run(tmp_path / "run")
    write_run(tmp_path / "changed", changed="嗯")
    shared = scoring.score_run(tmp_path / "run", config)
    changed = scoring.score_run(tmp_path / "changed", config)
    assert changed.results["other"]["generated"] != shared.results["other"]["generated"]
    assert changed.results["other"]["reference"] == shared.results["other"]["reference"]

    def rows(_, function, pairs, prepare=None):
        return function([tuple(map(prepare, pair)) for pair in pairs] if prepare else pairs)

    monkeypatch.setattr(table.TextCache, "rows", rows)
    monkeypatch.setattr(table.TextCache, "of", lambda _, function: function)
    alone = scoring.score_run(tmp_path / "run", config)
    assert (alone.results, alone.drifts) == (shared.results, shared.drifts)
