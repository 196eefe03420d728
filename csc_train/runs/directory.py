"""Run directories: one per run, written by the main process, with the configuration, the code and the status."""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from csc_train.errors import InputError
from csc_train.files import digest, file_digest, read_json, write_json, write_text
from csc_train.runs.config import IGNORED_GROUPS, RESOLVED_FILE
from csc_train.runs.distributed import broadcast_object, distributed_state
from csc_train.runs.provenance import code_digest, provenance, uncommitted_diff

RECORD_FILE = "run.json"
CODE_DIFF_FILE = "code.diff"
"""In a run directory: the code's difference from the commit that `run.json` names."""
EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and saved a training checkpoint: sysexits' EX_TEMPFAIL."""
logger = logging.getLogger(__name__)


class Run:
    """A run directory.

    Attributes:
        directory: its path; the same on all ranks.
        is_main: whether this process is the one that writes there.
        checkpoints: the directory of the training checkpoints.
    """

    def __init__(self, recipe: str, config: dict[str, Any], outputs: Sequence[str] = ()):
        """Name the run directory; nothing is written yet.

        Args:
            recipe: name of the recipe, such as `sft`.
            config: the resolved configuration, with its `run` section.
            outputs: glob patterns of the files and folders that the recipe writes there. A new run deletes those of
                the run that it replaces.

        Raises:
            InputError: the directory holds a run and `run.if_exists` is error, a run of another recipe, or outputs
                without a `run.json`.
        """
        self.recipe = recipe
        self.config = config
        self.outputs = (*outputs, CODE_DIFF_FILE)
        self.is_main = distributed_state().is_main_process
        # Clocks of processes differ; the main one's counts.
        self.directory = Path(config["run"]["directory"] or broadcast_object(default_directory(recipe)))
        self.checkpoints = self.directory / "checkpoints"
        self._record_path = self.directory / RECORD_FILE
        self._refuse_foreign(config["run"]["if_exists"])

    def _refuse_foreign(self, if_exists: str) -> None:
        """Refuse a directory that this recipe must not replace."""
        earlier = read_run_record(self.directory)
        if not earlier:
            if found := self._found_outputs():
                raise InputError(
                    f"{self.directory} holds {found[0].name} but no run.json: choose another run.directory"
                )
            return
        if earlier.get("recipe") != self.recipe:
            raise InputError(f"{self.directory} holds a run of {earlier.get('recipe')}: choose another run.directory")
        if if_exists == "error":
            raise InputError(
                f"{self.directory} holds a run: choose another run.directory, or run.if_exists=reuse|replace"
            )

    def _found_outputs(self) -> list[Path]:
        return [path for pattern in self.outputs for path in self.directory.glob(pattern)]

    def start(self, inputs: dict[str, str]) -> str:
        """Open the directory for writing and record the run.

        Args:
            inputs: hashes of the run's inputs. Two runs are the same if configuration, inputs and code are equal.

        Returns:
            "finished" or "unfinished" if the directory holds this run (under `reuse` and `resume`; nothing is
            deleted), "unfinished" if it holds any run under `extend`, else "new".
        """
        return broadcast_object(self._start(inputs) if self.is_main else None)

    def _start(self, inputs: dict[str, str]) -> str:
        ignored_groups = (*IGNORED_GROUPS, "zero")  # sharding does not change the results
        config = {group: values for group, values in self.config.items() if group not in ignored_groups}
        plugins = [file_digest(name) for name in config.get("plugins") or () if Path(name).is_file()]
        key = digest([self.recipe, config, inputs, code_digest(), provenance()["versions"], *plugins])
        if_exists = self.config["run"]["if_exists"]
        earlier = read_run_record(self.directory)
        if earlier and if_exists == "extend":
            write_text(self.directory / RESOLVED_FILE, as_yaml(self.config))
            return self._resume(earlier | {"finished": None})
        if earlier and if_exists == "resume":
            if differing := self._differences(ignored_groups):
                raise InputError(
                    f"{self.directory}: the run started with other settings: {'; '.join(differing)}; resume it as it "
                    f"was by run={self.directory} resume=true, or start a new run by from={self.directory}"
                )
            if earlier["inputs"] != inputs:
                raise InputError(f"{self.directory}: the run started with other data; start a new run")
            if earlier.get("key") != key:
                logger.info("note: code or package versions differ from those that the run started with")
            return self._resume(earlier)
        if earlier and if_exists == "reuse" and earlier.get("key") == key:
            return self._resume(earlier)
        for path in self._found_outputs():  # those of an earlier run would pass for this run's
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        write_text(self.directory / RESOLVED_FILE, as_yaml(self.config))
        if diff := uncommitted_diff():
            write_text(self.directory / CODE_DIFF_FILE, diff)
        record = {"recipe": self.recipe, "key": key, "command": sys.argv, "inputs": inputs, "provenance": provenance()}
        self._record_start(record | {"started": _now(), "finished": None})
        return "new"

    def _differences(self, ignored_groups: Iterable[str]) -> list[str]:
        """Settings that differ from the recorded ones, except those of `ignored_groups` and those unknown then."""
        recorded = flatten_keys(yaml.safe_load((self.directory / RESOLVED_FILE).read_text(encoding="utf-8")))
        now = flatten_keys(self.config)
        return [
            f"{key}={value}, not {now[key]}"
            for key, value in recorded.items()
            if key in now and now[key] != value and key.split(".")[0] not in ignored_groups
        ]

    def _resume(self, earlier: dict[str, Any]) -> str:
        """Record that a run is running again, unless it is finished; a status of "running" means that it crashed."""
        if earlier.get("finished"):
            return "finished"
        if earlier.get("status") == "running":
            logger.info("note: %s crashed: the process was killed before it recorded its end", self.directory)
            earlier = earlier | {"crashed": [*earlier.get("crashed", []), {"noticed": _now()}]}
        self._record_start(earlier)
        return "unfinished"

    def _record_start(self, record: dict[str, Any]) -> None:
        global _running
        write_json(self._record_path, record | {"status": "running"})
        _running = self

    def _record_end(self, status: str, **facts: str) -> None:
        global _running
        _running = None
        if self.is_main:
            write_json(self._record_path, read_json(self._record_path) | {"status": status} | facts)

    def finish(self) -> None:
        """Mark the run as finished."""
        self._record_end("finished", finished=_now())

    def stop(self, needs: str = "") -> NoReturn:
        """Mark the run as stopped, after it saved what it has, and end every process with `EXIT_STOPPED`.

        Args:
            needs: the overrides that the resumed run needs, if any.
        """
        self._record_end("stopped", stopped=_now())
        logger.info("stopped; to resume: %s", " ".join(filter(None, [f"run={self.directory} resume=true", needs])))
        distributed_state().wait_for_everyone()  # the first to end makes torchrun end the others
        sys.exit(EXIT_STOPPED)

    def fail(self, reason: str) -> NoReturn:
        """Mark the run as failed, print the reason and end with status 1; the outputs are kept for a resume."""
        self._record_end("failed", error=reason)
        logger.info("%s; to retry the failed part: run=%s resume=true", reason, self.directory)
        sys.exit(1)


_running: Run | None = None
"""The run that this process has started and not ended, on the main process."""


def mark_failed(error: BaseException) -> str:
    """Mark the run that this process has started, if any, as failed.

    Returns:
        How to resume it after an error of the operating system, such as a full disk; else empty.
    """
    if (run := _running) is None:
        return ""
    with contextlib.suppress(InputError):  # on a full disk this cannot be written either
        run._record_end("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
    advised = not isinstance(error.__cause__, OSError) or "resume=true" in str(error)
    return "" if advised else f"; when that is mended: run={run.directory} resume=true"


def default_directory(recipe: str) -> str:
    """The run directory if `run.directory` is not set, named by this process's clock."""
    return time.strftime(f"runs/{recipe}-%Y%m%d-%H%M%S")


def read_run_record(directory: Path) -> dict[str, Any]:
    """The run record (`run.json`) of a run directory; empty if the run has not begun."""
    return read_json(directory / RECORD_FILE) if (directory / RECORD_FILE).is_file() else {}


def flatten_keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    values = {}
    for key, value in config.items():
        values |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def as_yaml(config: dict[str, Any]) -> str:
    """A resolved configuration as the text of a YAML file."""
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
