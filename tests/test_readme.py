"""What the README says: its commands compose, its files exist, its make targets are there."""

import re
import shlex

import pytest
from conftest import ROOT

from csc_train.config.compose import compose
from csc_train.launching.job import launch

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
RECIPE_COMMANDS = [command for command in COMMANDS if "recipes/" in command]


def test_the_readme_has_commands_for_every_recipe():
    named = {re.search(r"recipes/(\w+)\.py", command).group(1) for command in RECIPE_COMMANDS}
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert {command.split()[1] for command in COMMANDS if command.startswith("make ")} == {"demo", "test"}
    starts = ("make ", "python recipes/", "python launch/launch.py ", "torchrun ")
    assert all(command.startswith(starts) for command in COMMANDS)


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_a_recipe_command_composes(command):
    words = shlex.split(command)
    (recipe,) = [word for word in words if word.startswith("recipes/")]
    assert (ROOT / recipe).is_file()
    compose(recipe.removeprefix("recipes/").removesuffix(".py"), words[words.index(recipe) + 1 :])


@pytest.mark.parametrize("command", [command for command in COMMANDS if "launch/" in command])
def test_a_launch_command_runs_dry(command, capsys):
    assert launch([*shlex.split(command)[2:], "dry_run=true"]) == 0, capsys.readouterr().err


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_names_what_is_there():
    (tree,) = re.findall(r"```\n(recipes/ .*?)```", README, re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r"( *)((?:[\w.]+/? )+)", line + " ")
        indented, paths = names.group(1), names.group(2).split()
        if not indented:
            folder = ROOT / paths[0]
            assert folder.is_dir(), line
        else:
            for path in paths:
                assert (folder / path).exists(), line
    packages = {path.name for path in (ROOT / "csc_train").iterdir() if not path.name.startswith("__")}
    assert {name for name in packages if name.split(".")[0] not in tree} == set()
