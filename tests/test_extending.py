"""docs/extending.md: its five code blocks, written to files as a user would, work from outside the package."""

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_tokenizer
from processes import run_script

from csc_train.config.compose import compose
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.metrics import registry
from csc_train.evaluation.scoring import score_predictions
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.generator import generate_predictions
from csc_train.launching.job import launch
from csc_train.launching.launchers.base import LAUNCHERS
from csc_train.models.config import ArchitectureConfig
from csc_train.models.families import MODEL_FAMILIES, model_dims
from csc_train.models.loading import load_model
from csc_train.packing import loss_weights
from csc_train.packing.config import WEIGHTINGS
from csc_train.template.dialogue_template import DialogueTemplate

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"^ *```bash\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    for command in block.replace("\\\n", " ").strip().splitlines()
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with the page's code blocks as files; what they register is forgotten."""
    for indented in re.findall(r"^ *```(?:python|jinja)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE):
        block = textwrap.dedent(indented)
        (tmp_path / re.match(r"\W*(my_\w+\.\w+)", block).group(1)).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    registries = (MODEL_FAMILIES, loss_weights._REGISTRY, LAUNCHERS)
    lists = (registry.METRICS, WEIGHTINGS)
    before = [each.copy() for each in (*registries, *lists)]
    yield tmp_path
    for each, kept in zip(registries, before, strict=False):
        each.clear()
        each.update(kept)
    for each, kept in zip(lists, before[len(registries) :], strict=True):
        each[:] = kept


def command_of(part):
    """The arguments of the page's first command with this part."""
    return next(words for words in COMMANDS if any(part in word for word in words))[2:]


def test_the_page_has_a_file_for_each_of_its_five_places(folder):
    names = ["my_family.py", "my_launcher.py", "my_loss.py", "my_metrics.py", "my_template.jinja"]
    assert sorted(path.name for path in folder.iterdir()) == names
    titles = ["A model family", "A chat template", "A metric", "A loss", "A launcher"]
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == titles


@pytest.mark.parametrize("words", [words for words in COMMANDS if "recipes/" in words[1]], ids=" ".join)
def test_every_recipe_command_of_the_page_composes(words):
    compose(Path(words[1]).stem, words[2:])


def test_the_family_is_built_and_measured():
    with pytest.raises(InputError, match="choose one of qwen2, qwen3, llama"):
        model_dims(ArchitectureConfig(model_type="smollm3"))
    config = compose("sft", command_of("my_family"))
    assert config.plugins == [str(Path("my_family.py").resolve())]
    model = load_model(config.model, small_tokenizer("qwen2_5"), torch.float32, 0)
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    assert model_dims(model.config).parameters == sum(each.numel() for each in model.parameters())


def test_the_template_renders_a_dialogue():
    config = compose("prepare", command_of("my_template"))
    template = DialogueTemplate(small_tokenizer("qwen2_5"), config.model.chat_template, config.template)
    dialogue = generate_sample(1, seed=0)[0]
    text = template.tokenizer.decode(template.encode(dialogue).input_ids)
    first = dialogue.turns[0]
    assert f"<|im_start|>assistant\n\n[{first.strategy.zh}]{first.text}<|im_end|>" in text


def test_the_metric_is_computed():
    compose("compare", command_of("compare.py"))
    dialogues = generate_sample(12, seed=1)
    predictions = generate_predictions(dialogues, StrategyBaseline(dialogues, 0), "reference")
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    found = score_predictions(predictions, by_id, MetricsConfig(bootstrap_resamples=100))["profiles"]["zh"]["questions"]
    asked = [100.0 * ("？" in each.response) for each in predictions]
    assert found.value == pytest.approx(sum(asked) / len(asked))
    assert (found.unit, found.direction) == ("turns", "none")
    assert found.signature == "Replies that ask a question, in percent"


def test_the_loss_weighs_rare_strategies_more():
    config = compose("prepare", command_of("my_loss"))
    turns = torch.tensor([0, 100, 25, 25, *[0] * 9]).numpy()
    factors = loss_weights.LossWeights(config.loss, turns).factors
    assert factors[:5] == pytest.approx([1, 0.5**0.5, 2**0.5, 2**0.5, 1])
    with pytest.raises(InputError, match=r"Did you mean 'square_root'\?"):
        compose("prepare", ["loss.weighting=square_rot"])


def test_the_launcher_queues_a_job(capsys):
    arguments = [*command_of("my_launcher"), "run.directory=runs/x"]
    assert launch(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("Submitted batch job x\n")
    assert Path("queue/x.sh").read_text(encoding="utf-8").endswith("recipes/sft.py run=runs/x resume=true\n")
    assert launch([each for each in arguments if "options.queue=" not in each and "run.d" not in each]) == 2
    assert "cluster.launcher_options.queue is required" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_records_its_plugins_and_its_evaluation_finds_them(folder):
    """A model of the page's family, trained with its loss, is evaluated with its metric, without naming the family."""
    family = [each for each in command_of("my_family") if not each.startswith("plugins")]
    asked = ["plugins=[my_family.py,my_loss.py]", "loss.weighting=square_root", "run.directory=runs/x"]
    trained = run_script(ROOT / "recipes/sft.py", *family, *asked)
    assert trained.returncode == 0, trained.stderr
    limits = ["data=sample", "data.sample_dialogues=60", "data.limit=20", "evaluation.max_new_tokens=4"]
    command = ["checkpoint=runs/x", "plugins=[my_metrics.py]", "run.directory=runs/e", *limits]
    evaluated = run_script(ROOT / "recipes/evaluate.py", *command)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    results = json.loads(Path("runs/e/results.json").read_text(encoding="utf-8"))["results"]
    assert "questions" in results["trained"]["reference"]["profiles"]["zh"]
    Path("my_loss.py").unlink()  # no longer needed: the evaluation notes that it is gone
    again = run_script(ROOT / "recipes/evaluate.py", *command[:-4], "run.if_exists=replace", *limits)
    assert again.returncode == 0 and "note: skipped a plugin of the training: plugins=" in again.stdout
