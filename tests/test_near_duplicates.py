"""Texts that nearly repeat one that is remembered; sets of dialogues are compared in test_splits.py."""

import random

import pytest

from csc_train.data.near_duplicates import SHINGLE_LENGTH, NearDuplicateIndex, shingles


def text_of(seed, length=400):
    rng = random.Random(seed)
    return "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(length))


def remembering(texts, threshold):
    seen = NearDuplicateIndex(threshold)
    for text in texts:
        seen.add(seen.minhash(text))
    return seen


def test_matches_have_their_position_and_true_similarity():
    texts = [text_of(seed) for seed in range(200)]
    seen = remembering(texts, 0.7)
    nearly = texts[150][:-20] + text_of(999, 20)
    ((place, similarity),) = seen.matches(seen.minhash(nearly))
    one, other = shingles(texts[150]), shingles(nearly)
    assert (place, similarity) == (150, len(one & other) / len(one | other))
    assert 0.7 < similarity < 1
    assert list(seen.matches(seen.minhash(text_of(1000)))) == []


def test_the_threshold_is_kept_to():
    text = text_of(0)
    nearly = text[:-20] + text_of(999, 20)
    one, other = shingles(text), shingles(nearly)
    exact = len(one & other) / len(one | other)
    for threshold, found in ((exact, 1), (exact + 1e-9, 0)):
        seen = remembering([text], threshold)
        assert len(list(seen.matches(seen.minhash(nearly)))) == found


@pytest.mark.parametrize("text", ["", "好", "您好，请问", text_of(1)])
def test_equal_texts_are_found_at_any_threshold(text):
    for threshold in (0.05, 0.5, 1.0):
        seen = remembering([text_of(0), text, text_of(2), text], threshold)
        assert [match for match in seen.matches(seen.minhash(text)) if match[1] == 1.0] == [(1, 1.0), (3, 1.0)]


def test_shingles_of_a_text_and_of_one_that_is_shorter():
    assert shingles("一二三四五六") == {"一二三四五", "二三四五六"}
    assert shingles("一二三四五"[: SHINGLE_LENGTH - 1]) == {"一二三四"}
    assert shingles("") == {""}
