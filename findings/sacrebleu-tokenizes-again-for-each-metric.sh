#!/usr/bin/env bash
# sacrebleu 2.6.0, 2026-11-30. The tokenizers' __call__ is under functools.lru_cache, whose key has the tokenizer itself.
# Each BLEU object makes a tokenizer, so a second object finds no text of the first, and corpus_bleu, which makes a BLEU
# for each call, never does. The cache belongs to the class: it keeps the tokenizers of BLEU objects that are gone.
# Seen: 1000 misses for each of three objects and each of two calls of corpus_bleu, on the same 1000 texts; afterwards
# 5000 entries, no BLEU object alive, and all three of their tokenizers alive.
# Why it matters: each score of the same references tokenizes them again, and a long process keeps up to 65,536 texts of
# scores that it made before, as they came and as tokens.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet sacrebleu==2.6.0
cd "$place"
cat > try.py <<'PYTHON'
import gc
import weakref
from sacrebleu import corpus_bleu
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

texts = [f"请问订单{number}什么时候发货" for number in range(1000)]
metrics, tokenizers, misses = [], [], []
for _ in range(3):
    bleu = BLEU(tokenize="zh")
    bleu.corpus_score(texts, [texts])
    metrics.append(weakref.ref(bleu))
    tokenizers.append(weakref.ref(bleu.tokenizer))
    misses.append(TokenizerZh.__call__.cache_info().misses)
for _ in range(2):
    corpus_bleu(texts, [texts], tokenize="zh")
    misses.append(TokenizerZh.__call__.cache_info().misses)
del bleu
gc.collect()
kept = [sum(each() is not None for each in group) for group in (metrics, tokenizers)]
print("misses after each score of the same texts:", misses, TokenizerZh.__call__.cache_info())
print(f"alive: {kept[0]} of 3 BLEU objects, {kept[1]} of their 3 tokenizers")
assert misses == [1000, 2000, 3000, 4000, 5000] and kept == [0, 3]
assert TokenizerZh.__call__.cache_info().currsize == 5000
PYTHON
"$place/venv/bin/python" try.py
