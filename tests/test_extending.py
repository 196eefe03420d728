"""docs/extending.md: its code blocks, written to files as a user would, work from outside the package."""

import io
import json
import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sampled, small_tokenizer
from processes import run_script

from csc_train.chat.config import ChatConfig
from csc_train.chat.terminal import run_terminal
from csc_train.config.compose import compose
from csc_train.conversion.config import FORMAT_NAMES
from csc_train.conversion.formats import FORMATS, dialogue_format
from csc_train.data.config import LANGUAGE_CODES
from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import LANGUAGES
from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.evaluated_model import read_language
from csc_train.evaluation.metrics import registry
from csc_train.evaluation.scoring import score_predictions
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import load_final_model
from csc_train.jsonl import read_jsonl
from csc_train.launching.job import launch
from csc_train.launching.launchers.base import LAUNCHERS
from csc_train.models.config import ArchitectureConfig
from csc_train.models.families import MODEL_FAMILIES, model_dims
from csc_train.models.loading import load_model
from csc_train.packing import loss_weights
from csc_train.packing.config import WEIGHTINGS
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.system_prompt import language_note

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"^ *```bash\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    for command in block.replace("\\\n", " ").strip().splitlines()
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with the page's code blocks as files; what they register is forgotten."""
    for indented in re.findall(r"^ *```(?:python|jinja|yaml)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE):
        block = textwrap.dedent(indented)
        (tmp_path / re.match(r"\W*(my_\w+\.\w+)", block).group(1)).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    registries = (MODEL_FAMILIES, loss_weights._REGISTRY, LAUNCHERS, LANGUAGES, FORMATS)
    lists = (registry.METRICS, WEIGHTINGS, LANGUAGE_CODES, FORMAT_NAMES)
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


def test_the_page_has_a_file_for_each_of_its_places(folder):
    names = [
        "family.py",
        "format.py",
        "language.py",
        "launcher.py",
        "loss.py",
        "metrics.py",
        "table.yaml",
        "template.jinja",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [f"my_{name}" for name in names]
    titles = ["A model family", "A chat template", "A language", "A data format", "A metric", "A loss", "A launcher"]
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == titles


@pytest.mark.parametrize("words", sampled([words for words in COMMANDS if "recipes/" in words[1]], 3), ids=" ".join)
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


SAID = {  # by strategy
    1: "Selamat siang, terima kasih telah menghubungi kami. Ada yang bisa saya bantu?",
    2: "Boleh saya minta nama lengkap dan nomor pesanan Anda?",
    3: "Jadi paket yang Anda pesan minggu lalu belum sampai, benar begitu?",
    4: "Kapan terakhir kali Anda memeriksa status pengiriman?",
    5: "Saya mengerti Anda kecewa karena harus menunggu selama ini.",
    6: "Anda dapat menunggu sampai besok atau meminta pengembalian dana.",
    7: "Pengiriman ke luar pulau biasanya memerlukan waktu lima hari kerja.",
    8: "Permintaan Anda sudah saya proses, dan paket baru akan segera dikirim.",
    9: "Apakah Anda puas dengan penyelesaian ini?",
    10: "Silakan hubungi kami kapan saja melalui aplikasi.",
    11: "Terima kasih banyak, semoga hari Anda menyenangkan.",
    12: "Mohon tunggu sebentar.",
}
ANSWERS = ("Paket saya belum sampai juga.", "Baik, tolong segera diperiksa.", "Ya, saya sudah menunggu terlalu lama.")


NAMES = dict(re.findall(r'^ +(\d+): \("([^"]+)"', PAGE, re.MULTILINE))
"""The strategies' names on the page."""


def write_indonesian(path):
    """Dialogues with the strategies of sample dialogues, all texts in Indonesian; also as `Dialogue`."""
    made = []
    for sample in generate_sample(40, seed=5):
        turns = [
            replace(turn, text=SAID[turn.strategy.number] if turn.strategy else ANSWERS[index % 3])
            for index, turn in enumerate(sample.turns)
        ]
        made.append(Dialogue(sample.id, tuple(turns), sample.source))
    rows = [each.row() for each in made]
    for row, dialogue in zip(rows, made, strict=True):  # named as the page says
        for said, turn in zip(row["dialogue"], dialogue.turns, strict=True):
            said["speaker"] = "Petugas" if turn.strategy else "Pelanggan"
            said["strategy"] = NAMES[str(turn.strategy.number)] if turn.strategy else ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


@pytest.mark.slow
def test_the_language_reads_dialogues_and_renders_them():
    with pytest.raises(InputError, match=r"^template\.language=id: choose one of zh, en"):
        TemplateConfig(language="id")
    config = compose("sft", command_of("my_language"))
    dialogues = write_indonesian(Path("my_dialogues.jsonl"))
    assert read_dialogues(config.data.train.path) == dialogues
    assert language_note(dialogues, "id") is None
    assert "template.language=en: choose template.language=id" in language_note(dialogues, "en")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", config.template)
    text = template.tokenizer.decode(template.encode(dialogues[0]).input_ids)
    for strategy in STRATEGIES:
        assert f"\n{strategy.number}. {strategy.name('id')}: {strategy.definition('id')}\n" in text
    assert "melalui tahap menyapa, mengenali masalah, mencari solusi," in text
    assert f"<|im_start|>assistant\n[Sapaan]{SAID[1]}<|im_end|>" in text


TICKET = [
    {"by": "client", "body": "My parcel is lost."},
    {"by": "clerk", "body": "Since when?", "tag": "ask"},
    {"by": "client", "body": "Monday."},
    {"by": "clerk", "body": "We sent another. Goodbye.", "tag": "Close"},
]
"""Entries of the page's format."""


@pytest.mark.slow
def test_the_format_is_converted_by_the_recipe():
    rows = [
        {"number": 7, "queue": "post", "entries": TICKET},
        {"number": 8, "entries": [{"by": "clerk", "body": "Hm.", "tag": "internal"}]},
        {"number": 9, "tickets": TICKET},
    ]
    Path("my_tickets.json").write_text(json.dumps(rows), encoding="utf-8")
    words = [*command_of("my_format"), "+speakers.client=customer"]
    converted = run_script(ROOT / "recipes/convert.py", *words)
    assert converted.returncode == 0, converted.stderr
    (found,) = read_dialogues("data/tickets.jsonl", strict=True)
    assert [turn.strategy and turn.strategy.code for turn in found.turns] == [None, "PR", None, "AC"]
    assert (found.id, found.source, found.extra, found.turns[0].text) == (
        "7",
        "tickets",
        {"queue": "post"},
        TICKET[0]["body"],
    )
    left_out = [row for _, row in read_jsonl("data/_tickets.rejected.jsonl")]
    assert [(row["row"], row["reason"]) for row in left_out] == [
        (2, "turn 1: no label"), (3, "field entries: missing; found number, tickets"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"format=tickets: choose one of sharegpt, openai, esconv, abcd, csv"):
        compose("convert", words[1:])
    compose("convert", words)
    with pytest.raises(InputError, match=r"format=ticket: .* Did you mean 'tickets'\?"):
        compose("convert", [*words, "from=ticket"])
    with pytest.raises(InputError, match="format tickets: the name is taken"):
        dialogue_format("tickets")(len)


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


@pytest.mark.slow
def test_the_loss_weighs_rare_strategies_more():
    config = compose("prepare", command_of("my_loss"))
    turns = torch.tensor([0, 100, 25, 25, *[0] * 9]).numpy()
    factors = loss_weights.LossWeights(config.loss, turns).factors
    assert factors[:5] == pytest.approx([1, 0.5**0.5, 2**0.5, 2**0.5, 1])
    with pytest.raises(InputError, match=r"Did you mean 'square_root'\?"):
        compose("prepare", ["loss.weighting=square_rot"])


@pytest.mark.slow
def test_the_launcher_queues_a_job(capsys):
    arguments = [*command_of("my_launcher"), "run.directory=runs/x"]
    assert launch(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("Submitted batch job x\n")
    assert Path("queue/x.sh").read_text(encoding="utf-8").endswith("recipes/sft.py run=runs/x resume=true\n")
    assert launch([each for each in arguments if "options.queue=" not in each and "run.d" not in each]) == 2
    assert "cluster.launcher_options.queue is required" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_records_its_plugins_and_its_evaluation_finds_them(monkeypatch, capsys):
    """A model of the page's family, trained with its loss in its language, is evaluated with its metric.

    The evaluation names neither the family nor the language; nor does the chat.
    """
    with_own = "plugins=[my_family.py,my_loss.py,my_language.py]"
    asked = {each.partition("=")[0]: each for name in ("my_family", "my_language") for each in command_of(name)}
    asked |= {"plugins": with_own, "loss": "loss.weighting=square_root", "run.directory": "run.directory=runs/x"}
    write_indonesian(Path("my_dialogues.jsonl"))
    trained = run_script(ROOT / "recipes/sft.py", *asked.values())
    assert trained.returncode == 0, trained.stderr
    assert "Verifikasi Identitas" in trained.stdout and "are in the language" not in trained.stdout
    limits = ["data=sample", "data.sample_dialogues=60", "data.limit=20", "evaluation.max_new_tokens=4"]
    chinese = ["plugins=[my_metrics.py]", "metrics.profiles=[zh]"]
    command = ["checkpoint=runs/x", "run.directory=runs/e", *chinese, *limits]
    evaluated = run_script(ROOT / "recipes/evaluate.py", *command)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    results = json.loads(Path("runs/e/results.json").read_text(encoding="utf-8"))["results"]
    assert "questions" in results["trained"]["reference"]["profiles"]["zh"]
    assert "are in the language zh, but template.language=id: choose template.language=zh" in evaluated.stdout
    Path("my_loss.py").unlink()  # no longer needed: the evaluation notes that it is gone
    again = run_script(ROOT / "recipes/evaluate.py", *command[:2], "run.if_exists=replace", limits[-1])
    assert again.returncode == 0 and "note: skipped a plugin of the training: plugins=" in again.stdout
    results = json.loads(Path("runs/e/results.json").read_text(encoding="utf-8"))["results"]
    for context in ("reference", "generated"):
        assert list(results["trained"][context]["profiles"]) == ["en"]
        assert list(results["trained"][context]["by_strategy"])[4] == "5 Pengelolaan Emosi"
    page = Path("runs/e/report.html").read_text(encoding="utf-8")
    assert 'id="talk" lang="id"' in page and '"name": "Sapaan", "both": "Sapaan Greeting"' in page
    overlaps = json.loads(Path("runs/e/contamination.json").read_text(encoding="utf-8"))
    assert "13-grams (of words, within turns" in overlaps["definition"]
    assert read_language("runs/e") == "id"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANSWERS[0]}\n/strategy 5\n"))
    run_terminal(load_final_model("runs/x/model", InferenceConfig(max_new_tokens=4)), ChatConfig("runs/x"))
    said = capsys.readouterr().out
    assert "Petugas" in said and f"Pelanggan> {ANSWERS[0]}" in said
    assert "strategy of the next reply: 5 Pengelolaan Emosi" in said
