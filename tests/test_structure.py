"""The shape of the source: who imports whom, how long recipes are, what every public name says about itself."""

import ast
import os
import re
import subprocess

import pytest
from conftest import ROOT

PACKAGE = ROOT / "csc_train"
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = {"recipes", *(path.stem for path in BENCHMARKS.glob("*.py"))}
"""What runs the package and is never imported by it."""

# What a module may import from csc_train, by the longest matching prefix of its name, its own package aside.
LEAVES = {"errors", "files"}
BASE = LEAVES | {"strategies", "dialogue"}
RULES = {
    "": set(),
    "errors": set(),
    "files": {"errors"},
    "hub": LEAVES,
    "checkpoint": LEAVES,
    "run": LEAVES,
    "llm": LEAVES,
    "run_comparison": LEAVES | {"run"},
    "strategies": set(),
    "dialogue": LEAVES | {"strategies"},
    "words": set(),
    "near_duplicates": set(),
    "splits": BASE | {"near_duplicates"},
    "synthesis": BASE | {"llm", "near_duplicates", "words"},
    "template": BASE,
    "template.prepared": BASE | {"template", "checkpoint"},
    "packing": BASE | {"template"},
    "training": BASE | {"template", "packing", "checkpoint", "hub", "run"},
    "evaluation": BASE | {"template", "checkpoint", "hub", "llm", "words"},
    "evaluation.contamination": BASE | {"splits", "near_duplicates"},
    "chat": BASE | {"template", "evaluation.config", "evaluation.hf_policy"},
    "launching": BASE | {
        "template", "packing", "training", "checkpoint", "hub", "run", "run_comparison", "splits", "config"
    },
    # The root configuration is made of its owners' schemas.
    "config": {
        "chat.config", "errors", "evaluation.config", "evaluation.metrics", "launching.config", "llm.config",
        "packing.config", "run", "splits", "synthesis.config", "synthesis.filters", "synthesis.llm_filters",
        "template.config", "training.config",
    },
}  # fmt: skip


def modules(root=PACKAGE):
    """{name within the package: path}; the package itself is the empty name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """The modules of the package that a module imports, wherever in its body it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
            parts = inside.split(".") if inside else []
            parts = parts[: len(parts) - node.level + 1] + ([node.module] if node.module else [])
            targets = [".".join(["csc_train", *parts, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, inner = target.partition(".")
            if top in SCRIPTS:
                yield top
            elif top == "csc_train":
                # `from csc_train.x import y`: y is a module, or a name in the module x.
                while inner and inner not in known:
                    inner = inner.rpartition(".")[0]
                yield inner


def rule_of(name):
    """The longest prefix of a module's name that has a rule, or None."""
    fitting = [prefix for prefix in RULES if prefix and (name == prefix or name.startswith(f"{prefix}."))]
    return max(fitting, key=len, default="" if name == "" else None)


def breaches(root):
    """(module, what it must not import) pairs."""
    known = modules(root)
    for name, path in known.items():
        rule = rule_of(name)
        for target in imported(name, path, known):
            own = rule and (target == rule or target.startswith(f"{rule}."))
            allowed = any(target == prefix or target.startswith(f"{prefix}.") for prefix in RULES.get(rule, ()))
            if not own and not allowed:
                yield name, target


def test_every_module_has_a_rule_and_every_rule_a_module():
    names = modules()
    assert [name for name in names if rule_of(name) is None] == []
    assert set(RULES) == {rule_of(name) for name in names}
    for permitted in RULES.values():
        assert permitted <= set(names)


def test_imports_keep_their_direction():
    assert list(breaches(PACKAGE)) == []


def test_the_rules_say_what_the_plan_says():
    """The plan's own sentences, so that a loosened rule table is noticed."""
    assert not RULES["evaluation"] & {"training", "packing", "run", "synthesis"}
    assert not RULES["synthesis"] & {"template", "packing", "training", "evaluation"}
    assert not RULES["template"] & {"packing", "training", "evaluation", "synthesis"}
    assert not RULES["packing"] & {"training", "evaluation"}
    for leaf in ("checkpoint", "run", "files", "errors", "hub", "llm"):
        assert RULES[leaf] <= {"files", "errors"}


@pytest.mark.parametrize(
    ("place", "statement", "breach"),
    [
        ("evaluation/report.py", "from csc_train.training.model import load_model", "training.model"),
        ("evaluation/report.py", "from csc_train.packing import best_fit", "packing.best_fit"),
        ("evaluation/deep/new.py", "import csc_train.models.loading", "training.model"),
        ("synthesis/sample.py", "from csc_train import template", "template"),
        ("template/reply.py", "from ..packing.best_fit import best_fit_decreasing", "packing.best_fit"),
        ("files.py", "from csc_train.dialogue import Dialogue", "dialogue"),
        ("run.py", "def late():\n    from csc_train.checkpoint import Manifest", "checkpoint"),
        ("strategies.py", "from recipes import sft", "recipes"),
        ("packing/best_fit.py", "from measure import spread", "measure"),
        ("strategies.py", "import csc_train", ""),
        ("config.py", "from csc_train.training.model import load_model", "training.model"),
        ("novel.py", "from csc_train.errors import InputError", "errors"),
    ],
)
def test_a_planted_import_is_found(tmp_path, place, statement, breach):
    root = tmp_path / "csc_train"
    for path in modules().values():
        copy = root / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("", encoding="utf-8")
    assert list(breaches(root)) == []
    planted = root / place
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(statement + "\n", encoding="utf-8")
    assert list(breaches(root)) == [(place.removesuffix(".py").replace("/", "."), breach)]


def test_recipes_are_short_and_import_each_other_never():
    recipes = sorted((ROOT / "recipes").glob("*.py"))
    assert recipes
    assert not (ROOT / "recipes" / "__init__.py").exists()
    for path in recipes:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 150, path.name
        assert ast.get_docstring(ast.parse(source)), path.name
        names = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
        assert not names & {other.stem for other in recipes}, path.name


def test_no_module_is_named_after_nothing():
    catch_alls = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert [name for name in modules() if catch_alls & set(name.split("."))] == []


def undocumented(tree):
    """Public classes, functions and methods without a docstring, and the module itself unless it is empty."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    scopes = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    scopes.append((f"{prefix}{node.name}.", node))


def test_every_public_name_has_a_docstring():
    everything = modules() | modules(BENCHMARKS)
    missing = {
        name: list(undocumented(ast.parse(path.read_text(encoding="utf-8")))) for name, path in everything.items()
    }
    assert {name: names for name, names in missing.items() if names} == {}
    sample = "class A:\n    '''.'''\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\n"
    assert sorted(undocumented(ast.parse(sample))) == ["A.b", "d", "the module"]


# Written so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.~<>*/-])/(?:wor[k]|hom[e]|User[s]|roo[t]|mn[t]|dat[a])/\w")
REGISTRY_HOSTS = re.compile(
    r"pypi[.]|pythonhosted[.]|registry[.]npm|conda[.]anaconda|/simpl[e]/|--(?:extra-)?index-ur[l]"
)


def tracked_texts():
    """(path, text) of every tracked file that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        try:
            yield name, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # binary, or deleted but not yet committed


def test_no_machine_of_ours_is_baked_in():
    found = [
        (name, match.group())
        for name, text in tracked_texts()
        for pattern in (MACHINE_PATHS, REGISTRY_HOSTS)
        for match in pattern.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["/wor" + "k/x", "path: /hom" + "e/me", '"/Use' + 'rs/me"', "=/mn" + "t/disk"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATHS.search(text)
    assert not MACHINE_PATHS.search(text.replace("/", "../shared/", 1))
