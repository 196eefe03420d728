#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers 0.23.3, 2026-11-29. In a directory whose config.json says model_type qwen2,
# AutoTokenizer builds Qwen2Tokenizer, which puts its own normalizer and pre-tokenizer in the place of those in
# tokenizer.json, also where tokenizer_config.json asks for PreTrainedTokenizerFast.
# Seen: a file without normalizer gives NFC; "e" with a combining accent gets other ids than by the file.
# Why it matters: a model that was trained with its file's ids is silently asked with others.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cd "$place"
cat > try.py <<'PYTHON'
import json
import os
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(["hello"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
os.mkdir("model")
tokenizer.save("model/tokenizer.json")
json.dump({"model_type": "qwen2"}, open("model/config.json", "w"))
json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, open("model/tokenizer_config.json", "w"))
text = "e\u0301"
by_file, loaded = Tokenizer.from_file("model/tokenizer.json"), AutoTokenizer.from_pretrained("model")
print("file:", json.load(open("model/tokenizer.json"))["normalizer"], by_file.encode(text).ids)
print(type(loaded).__name__, loaded.backend_tokenizer.normalizer, loaded(text)["input_ids"])
assert by_file.normalizer is None and loaded.backend_tokenizer.normalizer is not None
assert by_file.encode(text).ids != loaded(text)["input_ids"]
PYTHON
"$place/venv/bin/python" try.py
