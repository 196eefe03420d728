"""The command line: `csc-train` from a real wheel, help and docs/settings.md, a user's own configuration folder."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from conftest import ROOT, sampled
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import TIMEOUT_S, run_script

from csc_train.config.cli import join_config_dir, main
from csc_train.config.compose import compose
from csc_train.config.explain import all_settings, help_text, known_keys, settings_page
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.errors import InputError
from csc_train.launching.job import launch, split_arguments

HEAVY = ("torch", "transformers", "nltk", "scipy", "sacrebleu")


# Start-up


@pytest.mark.parametrize("recipe", sampled(SCHEMAS, 10))
def test_a_schema_and_the_command_line_import_nothing_heavy(recipe):
    script = (
        "import sys, csc_train.config, csc_train.config.cli, csc_train.config.compose as compose\n"
        f"from csc_train.config.explain import help_text\nhelp_text({recipe!r})\ncompose.register_schemas({recipe!r})\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("sft", ["experiment=demo", "trainer.packs_per_step=3"], "trainer.packs_per_step=3 is not a multiple"),
        ("sft", ["model.path=nobody/nothing"], "nobody/nothing: cannot load the model"),
        ("sft", ["model.path=./nothing"], "./nothing: no such model directory"),
        ("evaluate", ["checkpoint=nothing"], "nothing: no such directory"),
        ("evaluate", ["checkpoint=."], ".: neither a model, nor a training checkpoint"),
        ("chat", ["checkpoint=nothing"], "nothing: no such directory"),
        ("export", ["source=nothing", "output=x"], "nothing: no such directory"),
    ],
)  # fmt: skip
def test_what_needs_no_model_is_refused_before_any_heavy_import(recipe, arguments, message, tmp_path):
    script = (
        f"import runpy, sys\nsys.argv = {['x', *arguments]}\n"
        f"try:\n    runpy.run_path({str(ROOT / 'recipes' / recipe)!r} + '.py', run_name='__main__')\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith(f"error: {message}")


# Help and the page of settings


def test_every_setting_has_a_docstring_of_whole_sentences():
    missing = {
        setting.key
        for recipe in SCHEMAS
        for setting in all_settings(schema_of(recipe))
        if not re.match(r"^\S.*[.:)]$", setting.doc)
    }
    assert sorted(missing) == []


def test_help_explains_type_default_and_allowed_values():
    text = help_text("sft")
    keys = [setting.key for setting in all_settings(schema_of("sft"))]
    assert len(keys) > 80 and [key for key in keys if f"  {key}:" not in text] == []
    assert "run.if_exists: str = error" in text
    words = " ".join(text.split())
    assert "Allowed: error, reuse, resume, extend, replace." in words
    assert "on_finish: evaluate" in words and "(default: qwen2_5_7b)" in words
    settings = {setting.key: setting for setting in all_settings(schema_of("sweep"))}
    assert settings["sweep"].schema is not None and settings["sweep.kind"].allowed == "optuna, grid, list"
    assert settings["sweep.trials"].allowed == "at least 1"  # checked in a loop over several fields
    assert settings["sweep.space.<name>.type"].allowed == "float, int, categorical"
    assert settings["cluster.port"].allowed == "1024 to 64535"
    required = {setting.key for setting in all_settings(schema_of("compare")) if setting.default == "required"}
    assert required == {"a", "b"}


def test_the_launcher_has_help(capsys):
    assert launch(["--help"]) == 0
    assert "cluster.nodes: int = " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_every_recipe_has_help(recipe):
    assert f"csc-train {recipe}" in help_text(recipe)
    assert set(schema_of(recipe).__dataclass_fields__) <= set(known_keys(recipe))


def test_the_page_of_settings_is_current():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "write it again: python -m csc_train.config.explain > docs/settings.md"
    targets = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in page.splitlines() if line[:3] == "## "
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= targets


# A folder of the user's own


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "slow.yaml").write_text("learning_rate: 1.0e-7\n")
    return tmp_path / "mine"


@pytest.mark.slow
def test_choices_in_the_users_folder_are_found(own):
    config = compose("sft", ["experiment=demo", "trainer=slow", f"--config-dir={own}"])
    assert config.trainer.learning_rate == 1e-7
    with pytest.raises(InputError, match=r"^trainer=slwo: not in conf/trainer\. Did you mean 'slow'\?"):
        compose("sft", ["trainer=slwo", f"--config-dir={own}"])
    with pytest.raises(InputError, match=r"^trainer=slow: not in conf/trainer\."):
        compose("sft", ["trainer=slow"])
    launch, recipe = split_arguments(["cluster=cpu1", "trainer=slow", "--config-dir", str(own)], schema_of("launch"))
    assert launch == ["cluster=cpu1", f"--config-dir={own}"]
    assert compose("launch", launch).cluster.name == "cpu1" and compose("sft", recipe).trainer.learning_rate == 1e-7
    assert join_config_dir(["a=1", "--config-dir", "x", "b=2"]) == ["a=1", "--config-dir=x", "b=2"]


def test_a_file_in_the_users_folder_with_the_name_of_ours_is_refused(own):
    path = own / "trainer" / "full.yaml"
    path.write_text("learning_rate: 1.0e-7\n")
    with pytest.raises(InputError, match=r"^\S+/mine/trainer/full\.yaml: conf/trainer/full\.yaml has the same name"):
        compose("sft", [f"--config-dir={own}"])
    path.unlink()
    (own / "trainer" / "slow.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(InputError, match=r"lerning_rate.*Did you mean 'trainer\.learning_rate'"):
        compose("sft", ["trainer=slow", f"--config-dir={own}"])
    with pytest.raises(InputError, match=r"^--config-dir=\S+/none: no such folder$"):
        compose("sft", [f"--config-dir={own.parent}/none"])
    with pytest.raises(InputError, match=r"^--config-dir: name a folder$"):
        join_config_dir(["a=1", "--config-dir"])


@pytest.mark.slow
def test_a_recipe_takes_the_users_folder_as_two_words(own):
    done = run_script(
        ROOT / "recipes" / "sft.py", "--cfg", "job", "trainer=slow", "--config-dir", "mine", cwd=own.parent
    )
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 1.0e-07" in done.stdout


# The console script


def test_the_console_script_lists_and_refuses_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["csc-train"])
    main()
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == sorted(SCHEMAS)
    monkeypatch.setattr(sys, "argv", ["csc-train", "evalaute"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: evalaute: unknown command. Did you mean 'evaluate'?\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs `csc-train` of an installed wheel in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info", "benchmarks")
    shutil.copytree(ROOT, folder / "source", ignore=lambda path, names: skipped(path, names) - (
        {"runs"} if Path(path).name == "csc_train" else set()
    ))  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder, folder / "source"], check=True, timeout=TIMEOUT_S)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, timeout=TIMEOUT_S
    )
    # The other packages are those of this environment, whose csc-train comes after the wheel's.
    paths = [path for path in sys.path if Path(path).name == "site-packages"] or [sysconfig.get_path("purelib")]
    (site / "others.pth").write_text("\n".join(paths) + "\n")
    shutil.rmtree(folder / "source")
    empty = folder / "empty"
    empty.mkdir()

    def run(*arguments):
        return subprocess.run(
            [folder / "venv" / "bin" / "csc-train", *arguments],
            cwd=empty, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_an_installed_wheel_composes_and_refuses(installed):
    done = installed("sft", "--cfg", "job", "experiment=demo")
    assert done.returncode == 0 and "synthetic-sample" in done.stdout, done.stderr
    done = installed("sft", "trainr.epochs=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'trainr.epochs' for recipe sft. Did you mean 'trainer.epochs'?\n"
    done = installed("stf")
    assert (done.returncode, done.stderr) == (2, "error: stf: unknown command. Did you mean 'sft'?\n")
    done = installed("launch", "experiment=demo", "cluster=cpu1", "dry_run=true")
    (package,) = {Path(each) for each in re.findall(r"(\S+/site-packages/csc_train)/recipes/sft\.py", done.stdout)}
    assert done.returncode == 0, done.stderr
    data = {path.relative_to(ROOT) for path in (ROOT / "csc_train").rglob("*.*") if "__pycache__" not in path.parts}
    assert Path("csc_train/suites/paper.csv") in data
    assert [str(path) for path in data if not (package.parent / path).exists()] == []


@pytest.mark.slow
def test_an_installed_wheel_trains_in_an_empty_folder(installed):
    done = installed("sft", "experiment=demo", "debug=cpu_tiny", "trainer.max_steps=1", "run.directory=run")
    assert done.returncode == 0, done.stderr
    assert "run/model" in done.stdout


def test_a_recipe_without_the_package_says_so(tmp_path):
    for script in ("recipes/sft.py", "launch/launch.py"):
        copy = Path(shutil.copy(ROOT / script, tmp_path))
        done = subprocess.run(
            [sys.executable, "-I", "-S", copy], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        expected = "error: No module named 'csc_train': run `pip install .` in the checkout of CSC Train\n"
        assert (done.returncode, done.stderr) == (1, expected)


# Requirements


def test_the_lock_satisfies_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines[1:] if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []
    locked = dict(line.split("==") for line in lines[1:])
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    assert groups.pop("fp8") == ["torchao==0.18.0"]  # pinned there, since only a GPU needs it
    assert groups.pop("mlflow") == ["mlflow-skinny>=3.17,<4"]  # TRL would import it in every process
    assert {"dependencies", "serve", "web", "compressed", "gguf", "tensorboard", "dev"} == set(groups)
    for requirement in (Requirement(text) for group in groups.values() for text in group):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_lock_holds_what_its_packages_require():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {line.split("==")[0] for line in lines[1:]}
    for name in locked:
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in locked, (name, text)
