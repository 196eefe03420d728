"""Run directories: one per run, written by rank 0, holding all that is needed to tell what was done."""

import ctypes
import datetime
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from csc_train.errors import InputError, check_choice
from csc_train.files import digest, file_digest, read_json, write_json, write_text

if TYPE_CHECKING:
    from accelerate import PartialState

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "hydra-core")
EXISTING = ("refuse", "reuse", "resume", "replace")
RESOLVED = "resolved.yaml"
RECORD = "run.json"
STOPPED = 75
"""Exit status of a run that was asked to stop, and saved a state of training to go on from: sysexits' EX_TEMPFAIL."""
OUTPUTS = (
    "states", "base", "tokenizer", "csc_manifest.json", "checkpoint", "metrics.json", "predictions",
    "dialogues.jsonl", "contamination.json", "results.json", "table.md", "report.html", "comparison.json",
    "comparison.md",
    "judgements.jsonl", "judge.json", "judge.md",
    "answers.jsonl", "dialogues.parquet", "rejected.jsonl", "waterfall.json", "quality.json", "quality.html",
)  # fmt: skip
"""What the recipes write into a run directory besides `run.json`, `resolved.yaml` and refused rows."""


@dataclass
class RunConfig:
    """Where a run is kept."""

    directory: str | None = None
    """The run directory; runs/<recipe>-<time> where not given."""
    existing: str = "refuse"
    """What to do when the directory holds a run. refuse: stop. reuse: keep it if configuration, data and code are the
    same (an unfinished run of the same is continued), else replace it. resume: continue it, under whatever code; with
    other data it is refused. replace: start over."""

    def __post_init__(self):
        check_choice("run.existing", self.existing, EXISTING)


class Run:
    """A run directory.

    Attributes:
        directory: its path; the same on all ranks.
        main: whether this process is the one that writes there.
        states: where states of training are saved.
    """

    def __init__(self, recipe: str, config: dict[str, Any]):
        """Name the run directory; nothing is written yet.

        Args:
            recipe: name of the recipe, such as `sft`.
            config: the resolved configuration, with its `run` section.

        Raises:
            InputError: the directory holds a run and `run.existing` is refuse, a run of another recipe, or files that
                a run would write but that no run of this project left there.
        """
        self.recipe = recipe
        self.config = config
        self.main = processes().is_main_process
        # Each process has its own clock: the main one's counts.
        self.directory = Path(config["run"]["directory"] or shared(default_directory(recipe)))
        self.states = self.directory / "states"
        self._record_path = self.directory / RECORD
        self._refuse_foreign(config["run"]["existing"])

    def _refuse_foreign(self, existing: str) -> None:
        """Refuse a directory whose content is not this recipe's to replace."""
        if not self._record_path.exists():
            if found := [name for name in OUTPUTS if (self.directory / name).exists()]:
                raise InputError(f"{self.directory} holds {found[0]} but no run.json: choose another run.directory")
            return
        earlier = read_json(self._record_path).get("recipe")
        if earlier != self.recipe:
            raise InputError(f"{self.directory} holds a run of {earlier}: choose another run.directory")
        if existing == "refuse":
            raise InputError(
                f"{self.directory} holds a run: choose another run.directory, or run.existing=reuse|replace"
            )

    def begin(self, inputs: dict[str, str]) -> str:
        """Open the directory for writing and record what is run.

        Args:
            inputs: hashes of what the run reads; with configuration and code they decide whether two runs are the same.

        Returns:
            "finished" or "unfinished" where `run.existing` is reuse and the directory holds this very run (then
            nothing is rewritten), else "new".
        """
        return shared(self._begin(inputs) if self.main else None)

    def _begin(self, inputs: dict[str, str]) -> str:
        # Where a run is kept, what is prepared for it and what is sharded do not change its results.
        what = {name: value for name, value in self.config.items() if name not in ("run", "prepare", "zero")}
        key = digest([self.recipe, what, inputs, code_digest(), provenance()["versions"]])
        existing = self.config["run"]["existing"]
        if existing in ("reuse", "resume") and self._record_path.exists():
            earlier = read_json(self._record_path)
            if existing == "resume" and earlier["inputs"] != inputs:
                raise InputError(f"{self.directory}: the data are not those that the run began with")
            if existing == "resume" and earlier.get("key") != key:
                self.say("note: code or package versions are not those that the run began with")
            if existing == "resume" or earlier.get("key") == key:
                return "finished" if earlier.get("finished") else "unfinished"
        for name in OUTPUTS:  # what an earlier run left here would pass for this one's
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).unlink(missing_ok=True)
        write_text(self.directory / RESOLVED, as_yaml(self.config))
        record = {"recipe": self.recipe, "key": key, "command": sys.argv, "inputs": inputs, "provenance": provenance()}
        write_json(self._record_path, record | {"started": _now(), "finished": None})
        return "new"

    def last_state(self) -> str | None:
        """The latest state of training that was saved whole, on every process; None where there is none."""
        # Written last, so its presence says that the rest is there.
        whole = [path.parent for path in self.states.glob("checkpoint-*/trainer_state.json")] if self.main else []
        return shared(str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None)

    def finish(self) -> None:
        """Mark the run as finished."""
        if self.main:
            write_json(self._record_path, read_json(self._record_path) | {"finished": _now()})

    def stop(self) -> NoReturn:
        """Mark the run as stopped, with a state of training to go on from, and end every process with `STOPPED`."""
        if self.main:
            write_json(self._record_path, read_json(self._record_path) | {"stopped": _now()})
        self.say(f"stopped; to go on: run={self.directory} resume=true")
        processes().wait_for_everyone()  # the first to end makes torchrun end the others
        sys.exit(STOPPED)

    def say(self, text: str) -> None:
        """Print on the main process only."""
        if self.main:
            print(text, flush=True)


def default_directory(recipe: str) -> str:
    """The directory of a run that was given none, by this process's clock."""
    return time.strftime(f"runs/{recipe}-%Y%m%d-%H%M%S")


def as_yaml(config: dict[str, Any]) -> str:
    """A resolved configuration as the text of a YAML file."""
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def end_with_parent(signum: int = signal.SIGTERM) -> None:
    """Let the system send this process `signum` when the process that started it ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """Where torchrun started this process: do not outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def record_failure(error: Exception) -> None:
    """Where torchrun started this process: let its last words be the traceback of the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def processes() -> "PartialState":
    """The processes that run this recipe together; the first call starts their process group."""
    import torch
    from accelerate import PartialState

    _quiet_libraries(gpu=torch.cuda.is_available())
    # Without `cpu` on a machine that has no GPU, processes would not find each other and train apart.
    # Hours, not minutes: the main process alone writes what may be hundreds of gigabytes while the others wait.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=2))


def _quiet_libraries(gpu: bool) -> None:
    """Leave out what libraries say on every start and nobody can act on (see also `config.run_recipe`)."""
    from transformers.utils import logging as transformers_logging

    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def single_process(recipe: str) -> None:
    """Refuse to run on several processes.

    Raises:
        InputError: the recipe was started by torchrun or accelerate with more than one process.
    """
    if processes().num_processes > 1:
        raise InputError(f"recipes/{recipe}.py runs as one process: start it with python")


def shared(value: Any) -> Any:
    """The main process's `value`, on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if processes().num_processes > 1 else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def code_digest() -> str:
    """SHA-256 (hex) of the package's source, templates included."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".jinja"))
    return digest([[str(path.relative_to(root)), file_digest(path)] for path in files])


def provenance() -> dict[str, Any]:
    """Commit, whether the tree has uncommitted changes, and package versions; None where they cannot be told."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        commit = changes = None
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
