#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers 0.23.3, 2026-11-29. A tokenizer.json may say of an added token that it takes the
# white space around it (lstrip, rstrip). Qwen2Tokenizer, which AutoTokenizer builds for such a file, drops the flags of
# the end and padding tokens and keeps those of others.
# Seen: "A <|im_end|> b" has a space behind the end token by AutoTokenizer, and none by the file.
# Why it matters: a chat is trained and served with other ids than its file's own rules give.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cd "$place"
cat > try.py <<'PYTHON'
import json
import os

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.normalizer = normalizers.NFC()
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(["hello"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
tokenizer.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in names])
os.mkdir("model")
tokenizer.save("model/tokenizer.json")
settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
json.dump(settings, open("model/tokenizer_config.json", "w"))
by_file, loaded = Tokenizer.from_file("model/tokenizer.json"), AutoTokenizer.from_pretrained("model")
for name in names:
    text = f"A {name} b"
    ids = by_file.encode(text).ids, loaded.encode(text, add_special_tokens=False)
    print(name, "file:", ids[0], type(loaded).__name__, ids[1])
    assert (ids[0] == ids[1]) == (name == "<|im_start|>"), name
PYTHON
"$place/venv/bin/python" try.py
