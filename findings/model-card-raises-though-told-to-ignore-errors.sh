#!/usr/bin/env bash
# huggingface_hub 2.4.0 with PyYAML 6.0.4, 2026-11-30. By its docstring, ignore_metadata_errors=True of ModelCard.load
# ignores errors while parsing the metadata. It drops a model-index that is not valid, but raises for a header that is no
# YAML, and for one that is no mapping, as it does with False; the first error is PyYAML's own and no ValueError.
# Seen: a model-index without results is dropped; "license: [mit" raises yaml.parser.ParserError, "a: b: c" raises
# yaml.scanner.ScannerError, and a list raises ValueError.
# Why it matters: a program that reads other people's cards, and relies on the option, ends with one bad card.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet huggingface_hub==2.4.0 pyyaml==6.0.4
cd "$place"
cat > try.py <<'PYTHON'
from huggingface_hub import ModelCard


def loaded(header: str, ignore: bool) -> str:
    open("README.md", "w").write(f"---\n{header}\n---\nText\n")
    try:
        return f"loaded {ModelCard.load('README.md', ignore_metadata_errors=ignore).data.to_dict()}"
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}, ValueError: {isinstance(error, ValueError)}"


seen = {}
for header in ("license: mit\nmodel-index:\n- name: m", "license: [mit", "a: b: c", "- mit"):
    seen[header] = loaded(header, ignore=False), loaded(header, ignore=True)
    print(f"{header!r}: False: {seen[header][0]}; True: {seen[header][1]}")
results, flow, colons, listed = seen.values()
assert results == ("builtins.ValueError, ValueError: True", "loaded {'license': 'mit'}")
assert flow == ("yaml.parser.ParserError, ValueError: False",) * 2
assert colons == ("yaml.scanner.ScannerError, ValueError: False",) * 2
assert listed == ("builtins.ValueError, ValueError: True",) * 2
PYTHON
"$place/venv/bin/python" try.py
