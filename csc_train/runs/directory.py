"""Run directories: one per run, written by rank 0, holding all that is needed to tell what was done."""

import contextlib
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
IF_EXISTS = ("error", "reuse", "resume", "extend", "replace")
RESOLVED_FILE = "resolved.yaml"
RECORD_FILE = "run.json"
CODE_DIFF_FILE = "code.diff"
"""In a run directory: what the code differed in from the commit that `run.json` names."""
EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop, and saved a state of training to go on from: sysexits' EX_TEMPFAIL."""
OUTPUTS = (
    "checkpoints", "base", "tokenizer", "csc_manifest.json", "model", "metrics.json", "samples.jsonl", "predictions",
    "dialogues.jsonl", "contamination.json", "results.json", "table.md", "report.html", "comparison.json",
    "comparison.md",
    "judgements.jsonl", "judge.json", "judge.md",
    "sheet.html", "key.json", "human.json", "human.md",
    "answers.jsonl", "dialogues.parquet", "rejected.jsonl", "waterfall.json", "quality.json", "quality.html",
    "runs.json", "runs.md", "runs.svg",
    "history.jsonl", "history.csv", "curves.png", "tracking.json", "wandb", CODE_DIFF_FILE,
    "synthesis.json", "batch",
)  # fmt: skip
"""What the recipes write into a run directory besides `run.json`, `resolved.yaml` and refused rows."""


@dataclass
class RunConfig:
    """Where a run is kept."""

    directory: str | None = None
    """The run directory; runs/<recipe>-<time> where not given."""
    if_exists: str = "error"
    """What to do when the directory holds a run. error: stop. reuse: keep it if configuration, data and code are the
    same (an unfinished run of the same is continued), else replace it. resume: continue it, under whatever code; with
    other data it is refused. extend: go on with it under this configuration, as far as the recipe lets it differ from
    the one before. replace: start over."""

    def __post_init__(self):
        check_choice("run.if_exists", self.if_exists, IF_EXISTS)


class Run:
    """A run directory.

    Attributes:
        directory: its path; the same on all ranks.
        main: whether this process is the one that writes there.
        checkpoints: where training checkpoints are saved.
    """

    def __init__(self, recipe: str, config: dict[str, Any]):
        """Name the run directory; nothing is written yet.

        Args:
            recipe: name of the recipe, such as `sft`.
            config: the resolved configuration, with its `run` section.

        Raises:
            InputError: the directory holds a run and `run.if_exists` is error, a run of another recipe, or files that
                a run would write but that no run of this project left there.
        """
        self.recipe = recipe
        self.config = config
        self.main = distributed_state().is_main_process
        # Each process has its own clock: the main one's counts.
        self.directory = Path(config["run"]["directory"] or broadcast_object(default_directory(recipe)))
        self.checkpoints = self.directory / "checkpoints"
        self._record_path = self.directory / RECORD_FILE
        self._refuse_foreign(config["run"]["if_exists"])

    def _refuse_foreign(self, if_exists: str) -> None:
        """Refuse a directory whose content is not this recipe's to replace."""
        if not self._record_path.exists():
            if found := [name for name in OUTPUTS if (self.directory / name).exists()]:
                raise InputError(f"{self.directory} holds {found[0]} but no run.json: choose another run.directory")
            return
        earlier = read_json(self._record_path).get("recipe")
        if earlier != self.recipe:
            raise InputError(f"{self.directory} holds a run of {earlier}: choose another run.directory")
        if if_exists == "error":
            raise InputError(
                f"{self.directory} holds a run: choose another run.directory, or run.if_exists=reuse|replace"
            )

    def begin(self, inputs: dict[str, str]) -> str:
        """Open the directory for writing and record what is run.

        Args:
            inputs: hashes of what the run reads; with configuration and code they decide whether two runs are the same.

        Returns:
            "finished" or "unfinished" where `run.if_exists` is reuse and the directory holds this very run (then
            nothing is rewritten), "unfinished" where it is extend and the directory holds any, else "new".
        """
        return broadcast_object(self._begin(inputs) if self.main else None)

    def _begin(self, inputs: dict[str, str]) -> str:
        # Where a run is kept and followed, what is prepared for it and what is sharded do not change its results.
        aside = ("run", "tokenization", "zero", "tracking", "on_finish")
        what = {name: value for name, value in self.config.items() if name not in aside}
        key = digest([self.recipe, what, inputs, code_digest(), provenance()["versions"]])
        if_exists = self.config["run"]["if_exists"]
        if if_exists == "extend" and self._record_path.exists():
            write_text(self.directory / RESOLVED_FILE, as_yaml(self.config))
            self._go_on(read_json(self._record_path) | {"finished": None})
            return "unfinished"
        if if_exists in ("reuse", "resume") and self._record_path.exists():
            earlier = read_json(self._record_path)
            if if_exists == "resume" and (differing := self._differences(aside)):
                raise InputError(
                    f"{self.directory} began otherwise: {'; '.join(differing)}; go on as it began by "
                    f"run={self.directory} resume=true, or start a new run by from={self.directory}"
                )
            if if_exists == "resume" and earlier["inputs"] != inputs:
                raise InputError(f"{self.directory}: the data are not those that the run began with")
            if if_exists == "resume" and earlier.get("key") != key:
                self.say("note: code or package versions are not those that the run began with")
            if if_exists == "resume" or earlier.get("key") == key:
                if earlier.get("finished"):
                    return "finished"
                self._go_on(earlier)
                return "unfinished"
        for name in OUTPUTS:  # what an earlier run left here would pass for this one's
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).unlink(missing_ok=True)
        write_text(self.directory / RESOLVED_FILE, as_yaml(self.config))
        if changed := changes():
            write_text(self.directory / CODE_DIFF_FILE, changed)
        record = {"recipe": self.recipe, "key": key, "command": sys.argv, "inputs": inputs, "provenance": provenance()}
        write_json(self._record_path, record | {"status": "running", "started": _now(), "finished": None})
        self._begun()
        return "new"

    def _differences(self, aside: tuple[str, ...]) -> list[str]:
        """What the run began with and has otherwise now, by key; of keys that it knew, and not of groups in `aside`."""
        began = flatten_keys(yaml.safe_load((self.directory / RESOLVED_FILE).read_text(encoding="utf-8")))
        now = flatten_keys(self.config)
        return [
            f"{key}={value}, not {now[key]}"
            for key, value in began.items()
            if key in now and now[key] != value and key.split(".")[0] not in aside
        ]

    def _go_on(self, earlier: dict[str, Any]) -> None:
        """Record that an unfinished run is running again; one that was still said to be running had crashed."""
        record = earlier | {"status": "running"}
        if earlier.get("status") == "running":
            self.say(f"note: {self.directory} crashed: it was killed before it could say so")
            record["crashed"] = [*earlier.get("crashed", []), {"noticed": _now()}]
        write_json(self._record_path, record)
        self._begun()

    def _begun(self) -> None:
        global _running
        _running = self

    def _end(self, status: str, **facts: str) -> None:
        global _running
        _running = None
        if self.main:
            write_json(self._record_path, read_json(self._record_path) | {"status": status} | facts)

    def latest_checkpoint(self) -> str | None:
        """The latest state of training that can be gone on from, on every process; None where there is none."""
        # A state has its name when it is whole; one that is kept for its weights has no scheduler.
        whole = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json")] if self.main else []
        whole = [state for state in whole if (state / "scheduler.pt").exists()]
        return broadcast_object(str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None)

    def finish(self) -> None:
        """Mark the run as finished."""
        self._end("finished", finished=_now())

    def stop(self) -> NoReturn:
        """Mark the run as stopped, with a state of training to go on from, and end every process with `EXIT_STOPPED`."""
        self._end("stopped", stopped=_now())
        self.say(f"stopped; to go on: run={self.directory} resume=true")
        distributed_state().wait_for_everyone()  # the first to end makes torchrun end the others
        sys.exit(EXIT_STOPPED)

    def incomplete(self, why: str) -> NoReturn:
        """Mark the run as failed, say why, and end with status 1; what it has made is kept, and can be gone on from."""
        self._end("failed", error=why)
        self.say(f"{why}; to try again what failed: run={self.directory} resume=true")
        sys.exit(1)

    def say(self, text: str) -> None:
        """Print on the main process only."""
        if self.main:
            print(text, flush=True)


def default_directory(recipe: str) -> str:
    """The directory of a run that was given none, by this process's clock."""
    return time.strftime(f"runs/{recipe}-%Y%m%d-%H%M%S")


def flatten_keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    values = {}
    for key, value in config.items():
        values |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def as_yaml(config: dict[str, Any]) -> str:
    """A resolved configuration as the text of a YAML file."""
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def set_parent_death_signal(signum: int = signal.SIGTERM) -> None:
    """Let the system send this process `signum` when the process that started it ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


def exit_with_launcher() -> None:
    """Where torchrun started this process: do not outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


_running: Run | None = None
"""The run that this process has begun and not ended, on the main process."""


def mark_failed(error: BaseException) -> None:
    """Mark the run that this process has begun, if any, as failed."""
    if _running is not None:
        with contextlib.suppress(InputError):  # where the disk is full, this cannot be written either
            _running._end("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])


def record_failure(error: Exception) -> None:
    """Where torchrun started this process: let its last words be the traceback of the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def distributed_state() -> "PartialState":
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
    if distributed_state().num_processes > 1:
        raise InputError(f"recipes/{recipe}.py runs as one process: start it with python")


def broadcast_object(value: Any) -> Any:
    """The main process's `value`, on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if distributed_state().num_processes > 1 else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def code_digest() -> str:
    """SHA-256 (hex) of the package's source, templates included."""
    root = Path(__file__).parent.parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".jinja"))
    return digest([[str(path.relative_to(root)), file_digest(path)] for path in files])


def changes() -> str:
    """What the tracked files of the code differ in from the commit, as `git diff` writes it; empty where unknown."""
    return _git("diff", "--binary", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def provenance() -> dict[str, Any]:
    """Commit, whether the tree has uncommitted changes, and package versions; None where they cannot be told."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "commit": commit and commit.strip(),
        "dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
