"""Chinese words are jieba's, and finding them leaves nothing behind."""

import os
import random
import subprocess
import sys

import jieba
from conftest import ROOT, random_dialogue

from csc_train.data.segmentation import segment_words


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


def test_words_equal_jieba_as_it_comes(tmp_path):
    stock = jieba.Tokenizer()
    stock.tmp_dir = str(tmp_path)
    rng = random.Random(0)
    for text in ["账户余额不足，请先转账500元。", *(random_dialogue(rng).text for _ in range(20))]:
        assert segment_words(text) == [word for word in stock.lcut(text) if word.strip()]


def test_segmenter_is_silent_and_leaves_no_file(tmp_path):
    code = "from csc_train.data.segmentation import segment_words; print(len(segment_words('账户余额')))"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr, list(tmp_path.iterdir())) == ("2\n", "", [])
