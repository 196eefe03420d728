"""The shape of the source: who imports whom, how long recipes are, what every public name says about itself."""

import ast
import functools
import io
import os
import re
import subprocess
import tokenize
from collections import Counter

import pytest
from conftest import ROOT

parse = functools.cache(ast.parse)
"""The tree of a source, made once for all tests: none changes it."""

PACKAGE = ROOT / "csc_train"
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = {"recipes", *(path.stem for path in BENCHMARKS.glob("*.py"))}
"""What runs the package and is never imported by it."""

LEAVES = {
    "errors",
    "files",
    "hub_access",
    "invisible",
    "jsonl",
    "overrides",
    "templates",
    "plugins",
    "progress",
    "stats",
    "terminal_tables",
    "thoughts",
}
# What a room of csc_train (a module or folder right below it) may import, itself aside. A room is below all that import
# it, so this table is the drawing of the house: no circle, no arrow up.
RULES = {
    "": set(),
    "errors": set(),
    "files": {"errors"},
    "hub_access": set(),
    "invisible": set(),
    "jsonl": {"errors", "files"},
    "overrides": {"errors"},
    "templates": {"errors"},
    "plugins": {"errors"},
    "progress": set(),
    "stats": set(),
    "terminal_tables": set(),
    "thoughts": {"invisible"},
    "llm": LEAVES,
    "runs": LEAVES,
    "data": LEAVES,
    "models": LEAVES,
    "template": LEAVES | {"data", "models"},
    "tokenized_cache": LEAVES | {"data", "models", "template", "runs"},
    "packing": LEAVES | {"data", "models", "template", "tokenized_cache"},
    "tracking": LEAVES | {"runs"},
    "checkpoints": LEAVES | {"data", "models", "template", "runs"},
    "inference": LEAVES | {"data", "models", "template", "checkpoints", "llm"},
    "training": LEAVES | {
        "data", "models", "template", "tokenized_cache", "packing", "checkpoints", "tracking", "runs", "inference"
    },
    "evaluation": LEAVES | {"data", "models", "template", "checkpoints", "llm", "inference"},
    "chat": LEAVES | {"data", "template", "inference"},
    "conversion": LEAVES | {"data", "llm"},
    "synthesis": LEAVES | {"data", "llm"},
    # The root configuration is made of its owners' schemas: the modules named `config`, see `CONFIG_RULE`.
    "config": {"errors", "files", "overrides", "templates", "plugins", "runs"},
    "launching": LEAVES | {
        "config", "data", "models", "template", "tokenized_cache", "packing", "checkpoints", "tracking", "training",
        "runs",
    },
    "inspection": LEAVES | {
        "config", "data", "models", "template", "tokenized_cache", "packing", "synthesis", "evaluation",
    },
    "suites": LEAVES | {
        "config", "data", "models", "template", "checkpoints", "llm", "training", "inference", "evaluation", "runs",
        "launching",
    },
}  # fmt: skip
CONFIG_RULE = {"errors"}
"""What a module named `config` may import besides other modules named `config`."""
MAX_MODULES = 14
"""Python modules in one folder, its __init__.py aside."""
MAX_CODE_LINES = 23_615
"""Lines of csc_train without blank lines, comments and docstrings. Only ever lowered; the goal is 12,600."""


def modules(root=PACKAGE):
    """{name within the package: path}; the package itself is the empty name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """The modules of the package that a module imports, wherever in its body it does so."""
    for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
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


def room_of(name):
    """The room that a module belongs to: the first part of its name."""
    return name.partition(".")[0]


def is_config(name):
    return name.rpartition(".")[2] == "config" and "." in name


def breaches(root):
    """(module, what it must not import) pairs."""
    known = modules(root)
    for name, path in known.items():
        for target in imported(name, path, known):
            if is_config(name):
                allowed = is_config(target) or room_of(target) in CONFIG_RULE
            else:
                room = room_of(name)
                permitted = RULES.get(room, set()) | {room}
                allowed = room_of(target) in permitted if target else name == ""
                allowed = allowed or (room == "config" and is_config(target))
            if not allowed:
                yield name, target


def circles(graph):
    """The sets of nodes that reach each other, of {node: the nodes it points to}; each as a sorted list."""
    reached = {}
    for node in graph:
        seen, todo = set(), [node]
        while todo:
            for target in graph.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        reached[node] = seen
    found = {
        frozenset(other for other in seen if node in reached.get(other, ()))
        for node, seen in reached.items()
        if node in seen
    }
    return sorted(map(sorted, found))


def import_graphs(root):
    """The graph of the modules, by "modules", and that of each folder's members, by the folder's name."""
    known = modules(root)
    graphs = {"modules": {}}
    for name, path in known.items():
        targets = set(imported(name, path, known)) & known.keys() - {name, ""}
        graphs["modules"][name] = targets
        for target in targets:
            ours, theirs = name.split("."), target.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if depth is not None:  # else one is the folder that the other is in
                folder = ".".join(ours[:depth]) or "csc_train"
                graphs.setdefault(folder, {}).setdefault(ours[depth], set()).add(theirs[depth])
    return graphs


def test_every_room_has_a_rule_and_every_rule_a_room():
    rooms = set(map(room_of, modules()))
    assert set(RULES) == rooms
    for permitted in RULES.values():
        assert permitted <= rooms


def test_imports_keep_their_direction():
    assert list(breaches(PACKAGE)) == []


def test_the_rules_point_down_only():
    """A room is written below all that it may import, so that no loosened rule can point up."""
    below = {""}
    for room, permitted in RULES.items():
        assert permitted <= below, room
        below.add(room)


def test_the_rules_say_what_the_plan_says():
    """The plan's own sentences, so that a loosened rule table is noticed."""
    assert not RULES["evaluation"] & {"training", "packing", "runs", "synthesis"}
    assert not RULES["inference"] & {"training", "packing", "runs", "evaluation", "chat"}
    assert not RULES["synthesis"] & {"template", "packing", "training", "evaluation"}
    assert not RULES["tracking"] & {"training", "packing", "checkpoints"}
    assert not RULES["chat"] & {"evaluation", "training"}
    for room in ("data", "models", "runs", "llm"):
        assert RULES[room] <= LEAVES


def test_imports_have_no_circle():
    """Neither of modules nor of folders, imports for type checkers and inside functions included."""
    found = {where: rings for where, graph in import_graphs(PACKAGE).items() if (rings := circles(graph))}
    assert found == {}


def test_no_folder_is_crowded():
    counts = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MAX_MODULES} == {}


def code_lines(source):
    """How many lines hold code: blank lines, comments and docstrings aside."""
    strings = {
        line
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    layout = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
    }  # fmt: skip
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in layout for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - strings)


def test_the_package_stays_small():
    assert (
        code_lines('"""Doc."""\n\n# comment\nx = (\n    1\n)\n\n\ndef f():\n    """Doc."""\n    return x  # why\n') == 5
    )
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in modules().values()) <= MAX_CODE_LINES


def test_no_public_name_is_defined_twice():
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    places = {}
    for name, path in modules().items():
        for node in parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(
    ("place", "statement", "breach"),
    [
        ("evaluation/report/tables.py", "from csc_train.training.trainer import x", "training.trainer"),
        ("evaluation/report/tables.py", "from csc_train.packing import bin_packing", "packing.bin_packing"),
        ("evaluation/deep/new.py", "import csc_train.training.trainer", "training.trainer"),
        ("data/sample_grammar.py", "from csc_train import template", "template"),
        ("template/reply.py", "from ..packing.bin_packing import best_fit_decreasing", "packing.bin_packing"),
        ("files.py", "from csc_train.data.dialogue import Dialogue", "data.dialogue"),
        ("runs/directory.py", "def late():\n    from csc_train.checkpoints.manifest import x", "checkpoints.manifest"),
        ("data/strategies.py", "from recipes import sft", "recipes"),
        ("packing/bin_packing.py", "from measure import spread", "measure"),
        ("data/strategies.py", "import csc_train", ""),
        ("config/compose.py", "from csc_train.training.trainer import x", "training.trainer"),
        ("training/config.py", "from csc_train.training.trainer import x", "training.trainer"),
        ("training/config.py", "from csc_train.files import write_text", "files"),
        ("novel.py", "from csc_train.errors import InputError", "errors"),
        ("models/hub.py", "if TYPE_CHECKING:\n    from csc_train.training.trainer import x", "training.trainer"),
    ],
)
def test_a_planted_import_is_found(tmp_path, place, statement, breach):
    root = empty_copy(tmp_path)
    assert list(breaches(root)) == []
    planted = root / place
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(statement + "\n", encoding="utf-8")
    assert list(breaches(root)) == [(place.removesuffix(".py").replace("/", "."), breach)]


def test_a_planted_circle_is_found(tmp_path):
    root = empty_copy(tmp_path)
    (root / "training" / "validation.py").write_text("from csc_train.training.trainer import x\n", encoding="utf-8")
    assert not any(map(circles, import_graphs(root).values()))
    back = "if TYPE_CHECKING:\n    from csc_train.training.validation import x\n"
    (root / "training" / "trainer.py").write_text(back, encoding="utf-8")
    assert circles(import_graphs(root)["modules"]) == [["training.trainer", "training.validation"]]
    (root / "training" / "trainer.py").write_text("from csc_train.packing import dataset\n", encoding="utf-8")
    (root / "packing" / "dataset.py").write_text("from csc_train.training import config\n", encoding="utf-8")
    graphs = import_graphs(root)
    assert (circles(graphs["modules"]), circles(graphs["csc_train"])) == ([], [["packing", "training"]])


def empty_copy(folder):
    """The package's files in `folder`, all empty."""
    root = folder / "csc_train"
    for path in modules().values():
        copy = root / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("", encoding="utf-8")
    return root


def test_recipes_are_short_and_import_each_other_never():
    recipes = sorted((ROOT / "recipes").glob("*.py"))
    assert recipes
    assert not (ROOT / "recipes" / "__init__.py").exists()
    for path in recipes:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 150, path.name
        assert ast.get_docstring(parse(source)), path.name
        names = {node.module for node in ast.walk(parse(source)) if isinstance(node, ast.ImportFrom)}
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
    missing = {name: list(undocumented(parse(path.read_text(encoding="utf-8")))) for name, path in everything.items()}
    assert {name: names for name, names in missing.items() if names} == {}
    sample = "class A:\n    '''.'''\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\n"
    assert sorted(undocumented(parse(sample))) == ["A.b", "d", "the module"]


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
def test_machine_paths_are_recognized(text):
    assert MACHINE_PATHS.search(text)
    assert not MACHINE_PATHS.search(text.replace("/", "../shared/", 1))
