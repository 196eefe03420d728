"""docs/your_own.md: a model directory, chats, a language and a template of the user's own, followed to the letter."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_tokenizer, tiny_config
from processes import TIMEOUT_S, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE, EXTENDING = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("your_own.md", "extending.md"))
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for command in block.replace("\\\n", " ").strip().splitlines()
]
CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
CHATS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page asks for: those of docs/extending.md, chats like the page's row, two models."""
    folder = tmp_path_factory.mktemp("own")
    for indented in re.findall(r"^ *```(?:python|jinja)\n(.*?)```", EXTENDING, re.DOTALL | re.MULTILINE):
        block = textwrap.dedent(indented)
        (folder / re.match(r"\W*(my_\w+\.\w+)", block).group(1)).write_text(block, encoding="utf-8")
    row = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL).group(1))
    rows = []
    for number in range(CHATS):
        turns = [each | {"text": f"{each['text']} ({number})"} for each in row["dialogue"]]
        # The customer opens one chat, the supporter the next.
        rows.append(json.dumps({"id": f"chat-{number}", "dialogue": turns[number % 2 :]}, ensure_ascii=False))
    (folder / "my_chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tokenizer = small_tokenizer("qwen2_5")
    tokenizer.chat_template = CHATML
    for name, architecture in (("my_model", "smollm3"), ("other_model", "llama")):
        torch.manual_seed(0)
        config = tiny_config(architecture, tokenizer, 0.1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_works_in_its_order(folder):
    said = {}
    for words in COMMANDS:
        assert words[0] == "python", words
        if "chat.py" in words[1]:  # the customer opens, asks once more and leaves
            command, lines = [sys.executable, ROOT / words[1], *words[2:]], "Halo, paket saya hilang.\nJadi?\n"
            done = subprocess.run(
                command, cwd=folder, input=lines, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        else:
            done = run_script(ROOT / words[1], *words[2:], cwd=folder)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        said[Path(words[1]).stem] = done.stdout
    assert f"{CHATS} accepted" in said["sft"] and f"{CHATS}  rows: {CHATS} turns joined" in said["sft"]
    assert "Pelanggan> Jadi?" in said["chat"] and "Petugas" in said["chat"]
    results = json.loads((folder / "runs/mine/evaluation/results.json").read_text(encoding="utf-8"))["results"]
    assert {"reference", "generated"} == results["trained"].keys()
    assert "B-2" in results["trained"]["reference"]["profiles"]["en"]
    report = (folder / "runs/mine/evaluation/report.html").read_text(encoding="utf-8")
    assert 'lang="id"' in report
    # The exported directory talks without this project, by its own template.
    exported = folder / "exported" / "mine"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "system", "content": "-"}, {"role": "user", "content": "Halo"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    AutoModelForCausalLM.from_pretrained(exported).generate(ids, max_new_tokens=2)
    assert not list((folder / "exported" / "mine_adapter").glob("model*.safetensors"))
