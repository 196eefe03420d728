"""What `checkpoint=` may name, and the errors for anything else."""

import pytest

from csc_train.checkpoints.locate import locate_checkpoint
from csc_train.checkpoints.manifest import MANIFEST_FILE
from csc_train.checkpoints.training_checkpoint import CHECKPOINT_FILE
from csc_train.errors import InputError


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    """A finished run with two training checkpoints."""
    make(tmp_path / "run", MANIFEST_FILE, "run.json")
    make(tmp_path / "run/model", MANIFEST_FILE, "config.json")
    for step in (9, 10):
        checkpoint = make(tmp_path / f"run/checkpoints/checkpoint-{step}", "config.json", "trainer_state.json")
        (checkpoint / CHECKPOINT_FILE).write_text('{"packs_per_step": 1, "processes": 1, "stage": null}')
    make(tmp_path / "run/checkpoints/checkpoint-11", "config.json")  # not whole
    return tmp_path / "run"


def test_a_run_its_model_and_its_checkpoints_are_found(run):
    assert locate_checkpoint(str(run)) == locate_checkpoint(str(run / "model")) == run / "model"
    latest = run / "checkpoints" / "checkpoint-10"
    assert locate_checkpoint(str(run), training=True) == locate_checkpoint(str(latest)) == latest
    assert locate_checkpoint(str(run / "model"), training=True) == run / "model"
    (run / "model").rename(run.parent / "exported")
    assert locate_checkpoint(str(run.parent / "exported")) == run.parent / "exported"
    assert locate_checkpoint(str(run)) == latest


def test_what_is_found_instead_is_named(tmp_path):
    none = "neither a model, nor a training checkpoint, nor a run directory with one; it holds"
    cases = {
        "nowhere": "no such directory",
        "plain": f"no {MANIFEST_FILE}: copy that file as well; or, to evaluate or chat with a model that another "
        "program wrote, say how to prompt it, such as template=joint template.language=en",
        "empty": f"{none} nothing",
        "other": f"{none} a, b, c, d, e, ...",
    }
    make(tmp_path / "plain", "config.json", "model.safetensors")
    make(tmp_path / "empty")
    make(tmp_path / "other", *"abcdef")
    for name, message in cases.items():
        with pytest.raises(InputError) as caught:
            locate_checkpoint(str(tmp_path / name))
        assert str(caught.value) == f"{tmp_path / name}: {message}"
