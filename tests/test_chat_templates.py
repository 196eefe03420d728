"""Chat templates are found by their files, a user's own included."""

import pytest
from conftest import small_tokenizer

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.template.chat_templates import chat_template_names, load_chat_template
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

OWN = r"""{%- for message in messages %}
{%- set label = '[' + message.strategy + ']' if message.strategy else '' %}
{{- '<|im_start|>' + message.role + '\n\n' + label + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{% endif %}"""


def test_the_files_are_the_templates():
    assert chat_template_names() == ["llama3_1", "qwen2_5", "qwen3", "qwen3_5"]
    assert all("messages" in load_chat_template(name) for name in chat_template_names())


def test_a_template_from_outside_renders_and_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "own.jinja").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "own.jinja", TemplateConfig())
    turns = (Turn(Speaker.SUPPORTER, "您好", STRATEGIES[0]), Turn(Speaker.CUSTOMER, "你好"))
    ids = template.encode(Dialogue("d", turns)).input_ids
    text = template.tokenizer.decode(ids)
    assert text.endswith("<|im_start|>assistant\n\n[礼貌问候]您好<|im_end|><|im_start|>user\n\n你好<|im_end|>")
    assert template.chat_template_name == str(tmp_path / "own.jinja")
    stock = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    assert template.fingerprint != stock.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "qwen2.5",
            r"^model\.chat_template=qwen2\.5: choose auto, llama3_1, .*\.jinja file\. Did you mean 'qwen2_5'\?$",
        ),
        ("absent.jinja", r"^model\.chat_template=absent\.jinja: cannot read: No such file or directory$"),
        ("latin.jinja", r"^model\.chat_template=latin\.jinja: cannot read: not UTF-8"),
    ],
)
def test_a_template_that_is_not_there_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=message):
        load_chat_template(name)
