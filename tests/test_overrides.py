"""Text stays text: what is quoted, printed or frozen is read back as it was."""

import math
import random
import re
import shlex
import struct
from pathlib import Path

import pytest
from conftest import ROOT, sampled
from omegaconf import OmegaConf

from csc_train.config.compose import compose, path_of, to_container
from csc_train.config.recipes.evaluation import EvaluateRecipe
from csc_train.config.recipes.training import SftRecipe
from csc_train.errors import InputError
from csc_train.launching.job import plan_job
from csc_train.launching.on_finish import on_finish_arguments
from csc_train.overrides import argument, escape, hint, parse_override, quote, resume_hint, type_at, unescape
from csc_train.runs.directory import as_yaml, read_config

AWKWARD = (
    "实验/客服", "lr=1e-4,bs=8", "a b", " a", "it's", 'say "x"', "a(1)", "a#1", "~x", "a~b", "82e4718", "1e5", "007",
    "1_0", "null", "true", "off", "nan", "-1", "[x]", "{x:1}", "[x", "'x", "'x'y", "a\\b", "a\\", "a\\,b", "a\\'b",
    "${data.seed}", "\\${a}", "$HOME", "a:b", "a&b", "a;b", "a|b", "choice(1,2)", "str(1)x", "a\nb", "😀",
    "a@b", "+x", "a%b",
)  # fmt: skip
"""Names of files and folders that a shell, Hydra, YAML or OmegaConf may read as something else."""
LETTERS = "ab1e. \\'\"${}[](),=#~:对\n\t-+_%&|/?!*<>@`0Ny"


def texts(count, letters=LETTERS, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(0, 9))) for _ in range(count)]


def resolved(value):
    return OmegaConf.create({"value": value}).value


@pytest.mark.slow
@pytest.mark.parametrize("annotation", [str | None, object], ids=["text", "any"])
def test_a_quoted_text_is_read_back(annotation):
    for text in [*AWKWARD, *texts(500)]:
        read = parse_override(f"key={quote(text)}", annotation)
        assert resolved(read.value) == resolved(parse_override(read.argument).value) == text
        assert unescape(escape(text)) == text
    items = texts(50)
    assert resolved(parse_override(f"key={quote(items)}", list[str]).value) == items


@pytest.mark.parametrize("name", sampled(AWKWARD, 14))
def test_a_text_is_taken_as_it_is(name):
    """Without quotes; but null, an interpolation and what Hydra itself escapes mean what they do elsewhere."""
    if name not in ("null", "${data.seed}", "\\${a}", "a\\,b", " a", "a\\'b"):
        given = ["data=files", f"data.train.path={name}", f"model.revision={name}", argument("run.directory", name)]
        config = compose("sft", given)
        assert {config.data.train.path, config.model.revision, config.run.directory} == {name}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_a_printed_hint_is_read_back(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, resume = shlex.split(resume_hint(name))
    assert resume == "resume=true" and path_of(parse_override(run, str)) == Path(name)
    (start,) = shlex.split(hint({"from": Path(name)}))
    assert path_of(parse_override(start, str)) == Path(name)
    # Through the recipes: a run of this name is found.
    Path(name).mkdir(parents=True)
    config = compose("compare", [argument("a", name), "b=x"])
    (Path(name) / "resolved.yaml").write_text(as_yaml(to_container(config)), encoding="utf-8")
    assert compose("compare", [start]).a == name
    assert compose("compare", [run, resume]).run.directory == name


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_arguments_of_the_next_recipe_are_read_back(name, tmp_path, monkeypatch):
    nested = [f"on_finish.data.evaluation.path={quote(name)}", "on_finish.data=files", "on_finish.data.train.path=x"]
    config = compose("sft", ["on_finish=evaluate", *nested])
    evaluation = compose("evaluate", on_finish_arguments(config.on_finish, Path(name)))
    assert evaluation.checkpoint == str(Path(name) / "model")
    assert evaluation.run.directory == str(Path(name) / "evaluation")
    assert evaluation.data.evaluation.path == name


@pytest.mark.slow
def test_the_command_of_a_launch_is_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = plan_job(["debug=cpu_tiny", "cluster=cpu1", "run.directory=x"])
    for name in AWKWARD:
        job.config.run.directory = name
        *_, run, resume = shlex.split(job.launcher().describe())
        assert path_of(parse_override(run, str)) == Path(name) and resume == "resume=true"


@pytest.mark.slow
def test_a_frozen_configuration_is_read_back(tmp_path):
    """Random texts and numbers, by our reader and by OmegaConf's own."""
    file, draw = tmp_path / "resolved.yaml", random.Random(0)
    numbers = [struct.unpack("d", draw.randbytes(8))[0] for _ in range(400)]
    numbers = [number for number in numbers if not math.isnan(number)] + [10 ** draw.randint(1, 30) for _ in range(50)]
    words = [*AWKWARD, *texts(1500), *texts(1500, "1e_.+-:0x"), "yes", "2026-11-28", "1__0e5", ".inf", "0x1F", "~"]
    values = {
        "texts": words,
        "numbers": [*numbers, math.inf, -math.inf],
        "none": None,
        "map": {"82e4718": [True, "???"]},
    }
    file.write_text(as_yaml(values), encoding="utf-8")
    assert read_config(file) == values
    assert OmegaConf.to_container(OmegaConf.load(file), resolve=True) == values


@pytest.mark.slow
def test_the_revision_of_a_model_stays_a_text(tmp_path):
    config = compose("sft", ["model.revision=82e4718"])
    (tmp_path / "resolved.yaml").write_text(as_yaml(OmegaConf.to_container(OmegaConf.structured(config))))
    again = compose("sft", [f"from={tmp_path}"])
    assert again.model.revision == config.model.revision == "82e4718"


@pytest.mark.slow
def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/x.jsonl", "'~/x.jsonl'"):
        config = compose("sft", ["data=files", f"data.train.path={path}", "run.directory=~/runs/a", "plugins=[]"])
        assert (config.data.train.path, config.run.directory) == (f"{tmp_path}/x.jsonl", f"{tmp_path}/runs/a")
    assert compose("compare", ["~/a", "b=~/b"]).b == f"{tmp_path}/b"
    assert path_of(parse_override("run=~/a", str)) == tmp_path / "a"


def test_bare_words_are_paths_also_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=1e-4,bs=8/evaluation").mkdir(parents=True)
    config = compose("compare", ["lr=1e-4,bs=8/evaluation", "实验,客服/evaluation", "permutations=2000"])
    assert (config.a, config.b) == ("lr=1e-4,bs=8/evaluation", "实验,客服/evaluation")
    assert compose("human_eval", ["export", "lr=1e-4,bs=8/evaluation", "a b"]).inputs[0] == "lr=1e-4,bs=8/evaluation"
    with pytest.raises(InputError, match=r"^unknown key 'lr'"):
        compose("compare", ["lr=2/evaluation", "b=x"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("q_proj", ["q_proj"]),
        (r".*\.(q|v)_proj", [r".*\.(q|v)_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("[~/a.py,插件.py]", ["~/a.py", "插件.py"]),
        ("['a','b,c']", ["a", "b,c"]),
        ("[data=rolecs,a.b='x,y']", ["data=rolecs", "a.b='x,y'"]),
        ("[82e1,007]", ["82e1", "007"]),
        ("[]", []),
    ],
)
def test_a_list_of_texts(text, value):
    read = parse_override(f"key={text}", list[str])
    assert read.value == value == parse_override(read.argument).value


def test_types_are_those_of_the_fields():
    assert type_at(SftRecipe, ["model", "revision"]) == str | None
    assert type_at(EvaluateRecipe, ["data", "train", "path"]) == str | None
    assert parse_override("evaluation.base=false", type_at(EvaluateRecipe, ["evaluation", "base"])).value is False
    assert parse_override("evaluation.base=0", type_at(EvaluateRecipe, ["evaluation", "base"])).value == "0"
    assert parse_override("trainer.epochs=0.5", type_at(SftRecipe, ["trainer", "epochs"])).value == 0.5


@pytest.mark.parametrize("recipe", ["evaluate"])
@pytest.mark.parametrize(
    ("group", "key"), [("template", "language=en"), ("llm", "model=x"), ("data", "train.path=x"), ("llm", "nope=x")]
)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_key_of_an_absent_group_names_the_group(recipe, group, key, prefix):
    with pytest.raises(InputError, match=f"^[+]*{group}\\.\\w+.*: there is no {group} to change: .* {group}=\\w+"):
        compose(recipe, ["checkpoint=x", f"{prefix}{group}.{key}"])


def test_an_override_that_cannot_be_read_is_named():
    for broken in ("key", "=1", "对话.jsonl", "trainer.epochs=[1", "trainer.epochs='1"):
        with pytest.raises(InputError, match=f"^{re.escape(broken)}: "):
            compose("sft", [broken])
    for name in ("7", "Qwen/Qwen3-8B"):
        with pytest.raises(InputError, match=rf"^model={name}: not in conf/model.* model=own model.path={name}$"):
            compose("sft", [f"model={name}"])
    with pytest.raises(InputError, match=r"^trainer.epochs: "):
        compose("sft", ["trainer.epochs=1,2"])


def test_hints_are_made_by_one_function():
    """No message puts a directory behind `run=` or `from=` by itself."""
    for folder in ("csc_train", "recipes", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.findall(r"\b(?:run|from|checkpoint)=(?:\{|%s)", file.read_text(encoding="utf-8")), file
