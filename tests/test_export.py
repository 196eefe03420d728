"""The model card of an export: its front matter and its list stay whole lines."""

from pathlib import Path

import pytest
import yaml
from conftest import manifest_of, small_tokenizer

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import model_card
from csc_train.checkpoints.locate import ModelSource
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("base", "revision"), [("Qwen/Qwen2.5-7B", "abc"), ("Qwen/Qwen2.5-7B", None), ("../base", None)]
)
def test_a_model_card_is_read_as_a_card(finished, base, revision):
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    config = {"adapter": {"kind": "full"}, "model": {"init": "random" if base.startswith("..") else "pretrained"}}
    manifest = manifest_of(template, base_model=base, base_revision=revision, config=config)
    source = ModelSource(Path("runs/x/checkpoints/checkpoint-40"), manifest, finished)
    _, front, body = model_card(source, ExportConfig(output="out/mine"), 1.5e-6).split("---\n", 2)
    facts = {"library_name": "transformers", "language": "zh"}
    assert yaml.safe_load(front) == facts | ({} if base.startswith("..") else {"base_model": base})
    items = [line for line in body.splitlines() if line.startswith("- ")]
    origin = "random weights" if base.startswith("..") else base
    assert items[:2] == [f"- Base: {origin}" + (f" at {revision}" if revision else ""), "- Trained: full"]
    assert ("- Step: 40" in items) is not finished
    assert len(items) == 5 + (not finished) and items[-1].endswith(": 1.5e-06")
    assert "# mine" in body.splitlines()
