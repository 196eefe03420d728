"""Libraries are imported without the optional packages that they would load at once."""

import importlib.metadata
import subprocess
import sys

import pytest

from csc_train.runs import imports


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "heavy_extra.py").touch()
    (tmp_path / "some_library.py").write_text(
        "import importlib.metadata\n"
        "read = [importlib.metadata.packages_distributions() for _ in range(2)]\n"
        "try:\n    import heavy_extra\nexcept ImportError:\n    heavy_extra = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "UNUSED", {"heavy_extra": "some_library"})
    yield "some_library"
    for name in ("heavy_extra", "some_library"):
        sys.modules.pop(name, None)


def test_a_library_finds_no_unused_package_and_others_do(library):
    listed = importlib.metadata.packages_distributions
    imports.import_lean(library)
    assert sys.modules[library].heavy_extra is None
    first, second = sys.modules[library].read
    assert first is second
    assert importlib.metadata.packages_distributions is listed
    assert importlib.import_module("heavy_extra").__name__ == "heavy_extra"


def test_what_is_loaded_already_is_found(library):
    importlib.import_module("heavy_extra")
    imports.import_lean(library)
    assert sys.modules[library].heavy_extra is sys.modules["heavy_extra"]


@pytest.mark.slow
def test_a_library_that_is_loaded_goes_on_finding_what_it_found(library, tmp_path):
    (tmp_path / "late.py").write_text("import heavy_extra\n")
    importlib.import_module(library)
    del sys.modules["heavy_extra"]
    imports.import_lean("late")
    assert sys.modules.pop("late").heavy_extra is sys.modules["heavy_extra"]


def test_a_library_that_fails_leaves_nothing_hidden(library):
    with pytest.raises(ModuleNotFoundError):
        imports.import_lean("no_such_library")
    assert importlib.import_module("heavy_extra").__name__ == "heavy_extra"


@pytest.mark.slow
def test_a_training_loads_none_of_them():
    code = (
        "import sys; from csc_train.runs.distributed import distributed_state\n"
        "from csc_train.runs.imports import UNUSED, import_lean\n"
        "distributed_state()\n"
        "import_lean('trl.trainer.sft_trainer', 'peft')\n"
        "import csc_train.training.trainer, csc_train.training.validation, csc_train.checkpoints.export\n"
        "print(sorted({*UNUSED} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
