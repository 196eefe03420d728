#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, 2026-11-29. TRL's copies of the chat templates of Qwen3.5, 3.6 and 3.8 raise
# where a chat has no user message. Those of Qwen3 and of other models that TRL has render it.
# Seen: TemplateError "No user query found in messages." for a system message, and for one with a reply of the assistant.
# Why it matters: an agent that speaks first, as in customer support or telephony, can be neither trained nor served.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$place"
cat > try.py <<'PYTHON'
import importlib.util
import pathlib

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

folder = pathlib.Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
chat = [{"role": "system", "content": "You are support."}, {"role": "assistant", "content": "How may I help?"}]
refused = {}
for file in sorted(folder.glob("qwen3_*.jinja")):
    for messages, prompt in ((chat[:1], True), (chat, False)):
        try:
            render_jinja_template(
                conversations=[messages], chat_template=file.read_text(), add_generation_prompt=prompt
            )
        except TemplateError as error:
            refused.setdefault(file.stem, set()).add(str(error))
for name, errors in refused.items():
    print(name, errors)
assert {"qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"} <= refused.keys()
assert all(name.startswith(("qwen3_5", "qwen3_6", "qwen3_8")) for name in refused)
PYTHON
"$place/venv/bin/python" try.py
