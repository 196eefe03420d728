"""What the pages say: their commands compose or run dry, their links and files exist, the README is short."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, sampled

from csc_train.config.compose import compose
from csc_train.launching.job import launch
from csc_train.launching.sweep import sweep
from csc_train.suites.reproduce import reproduce

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "examples" / "README.md",
    ]
)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
PROGRAMS = (
    "python",
    "torchrun",
    "accelerate",
    "make",
    "csc-train",
    "pip",
    "wandb",
    "transformers",
    "vllm",
    "lm_eval",
    "git",
    "source",
    "docker",
    "apptainer",
    "enroot",
)
"""What a command on a page may start with. Those from `wandb` on are other projects' and are not run by a test."""


def commands_of(text):
    """The commands of bash blocks, and those between backticks that start a recipe, a launcher or make."""
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:python (?:recipes|launch)/|torchrun |accelerate launch |make )[^`\n]+)`", text)
    return [line for line in lines if line and not line.startswith("#")] + inline


EXTENSION = re.compile(r"plugins=|my_template")
"""Commands that need a file of docs/extending.md are run by tests/test_extending.py."""
COMMANDS = sorted({command for text in TEXTS.values() for command in commands_of(text)})
RECIPE_COMMANDS = [command for command in COMMANDS if "recipes/" in command and not EXTENSION.search(command)]


def test_every_command_is_of_a_known_program():
    assert {command.split()[0] for command in COMMANDS} <= set(PROGRAMS)


def test_the_readme_has_a_command_for_every_recipe():
    readme = commands_of(TEXTS[ROOT / "README.md"])
    named = {found.group(1) for command in readme if (found := re.search(r"recipes/(\w+)\.py", command))}
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.py")}


@pytest.mark.parametrize("command", sampled([command for command in RECIPE_COMMANDS if " run=" not in command], 12))
def test_a_recipe_command_composes(command):
    words = shlex.split(command)
    (recipe,) = [word for word in words if word.startswith("recipes/")]
    assert (ROOT / recipe).is_file()
    compose(recipe.removeprefix("recipes/").removesuffix(".py"), words[words.index(recipe) + 1 :])


def starts_of(script):
    return [
        command for command in COMMANDS if f"launch/{script}" in command and not re.search(r" (run|from)=|my_", command)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", starts_of("launch.py"))
def test_a_launch_command_runs_dry(command, capsys):
    assert launch([*shlex.split(command)[2:], "dry_run=true"]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(starts_of("sweep.py"), key=len))
def test_a_sweep_command_runs_dry(command, capsys):
    assert sweep([*shlex.split(command)[2:], "dry_run=true"]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(starts_of("reproduce.py"), key=len))
def test_a_suite_command_runs_dry(command, capsys):
    assert reproduce([*shlex.split(command)[2:], "dry_run=true"]) == 0, capsys.readouterr().err


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


@pytest.mark.parametrize(("setting", "language"), sampled([([], "zh"), (["LANGUAGE=en"], "en")], 2))
def test_make_demo_takes_a_language(setting, language):
    """The variable of the command line alone: shells use the name for the language of their messages."""
    asked = ["make", "--dry-run", "--always-make", "demo", *setting]
    said = subprocess.run(asked, cwd=ROOT, env=os.environ | {"LANGUAGE": "fr_FR"}, capture_output=True, text=True)
    commands = [shlex.split(line) for line in said.stdout.replace("\\\n", "").splitlines() if "recipes/" in line]
    configs = {Path(words[1]).stem: compose(Path(words[1]).stem, words[2:]) for words in commands}
    assert list(configs) == ["write_sample", "sft", "evaluate"]
    sample = f"runs/sample/dialogues-{language}-700-0.jsonl"
    assert configs["write_sample"].data.train.path == configs["sft"].data.train.path == sample
    assert configs["sft"].template.language == language
    assert configs["evaluate"].checkpoint == f"{configs['sft'].run.directory}/model"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"https?:", target):
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


def test_the_readme_is_short_and_names_every_room():
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    folders = {f"`{path.name}/`" for path in (ROOT / "csc_train").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert {folder for folder in folders if folder not in readme} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_on_pages_exist(page):
    """Files and folders of the repository that stand between backticks."""
    roots = "recipes|launch|conf|csc_train|tests|benchmarks|docs|examples|findings"
    for path in re.findall(rf"`((?:{roots})/[\w./-]*)`", TEXTS[page]):
        assert (ROOT / path).exists(), path
