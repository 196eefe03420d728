"""Run directories: one per run, written by the main process, with the configuration, the code and the status."""

import contextlib
import fnmatch
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csc_train.errors import InputError, ResumableError
from csc_train.files import (
    digest,
    file_digest,
    files_below,
    free_name,
    os_errors,
    read_json,
    remove_empty_folders,
    write_json,
    write_text,
)
from csc_train.overrides import escape, hint, resume_hint
from csc_train.runs.claim import LOCK_FILE, Claim, claim, claim_new
from csc_train.runs.config import RESOLVED_FILE, may_change
from csc_train.runs.distributed import distributed_state, on_main
from csc_train.runs.provenance import code_digest, provenance, uncommitted_diff
from csc_train.templates import ExactDumper

RECORD_FILE = "run.json"
CODE_DIFF_FILE = "code.diff"
"""In a run directory: the code's difference from the commit that `run.json` names."""
EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and saved a training checkpoint: sysexits' EX_TEMPFAIL."""
END_FACTS = ("error", "stopped", "files", "removed")
"""Facts in `run.json` of an end that a resume takes back."""
EARLY_FILES = (
    f"{LOCK_FILE}*", RESOLVED_FILE, CODE_DIFF_FILE, "launch.yaml", "job.sbatch", "job.yaml", "task.yaml",
    "output.log", "slurm-*.out", "rejected-*.jsonl", "synthesis.db*", ".*.writing-*",
)  # fmt: skip
"""Patterns of the files that may be in a run directory before its `run.json`."""
PROGRESS_FILES = (
    "checkpoints/checkpoint-*", "predictions/*", "general/*", "answers.jsonl", "judgements.jsonl", "synthesis.db"
)  # fmt: skip
"""Patterns of the files in a run directory that a resume continues from."""
logger = logging.getLogger(__name__)


class Run:
    """A run directory, claimed by this run until the end of its processes (see `runs.claim`).

    Attributes:
        directory: its path; the same on all ranks.
        is_main: whether this process is the one that writes there.
        checkpoints: the directory of the training checkpoints.
    """

    def __init__(self, recipe: str, config: dict[str, Any], outputs: Sequence[str] = ()):
        """Claim the run directory; a default name that is taken gets a number.

        Args:
            recipe: name of the recipe, such as `sft`.
            config: the resolved configuration, with its `run` section.
            outputs: glob patterns of the files and folders that the recipe writes there. A new run moves those of the
                run that it replaces aside, and deletes them when it has finished.

        Raises:
            InputError: another process works there, or the directory holds a run and `run.if_exists` is error, a run
                of another recipe, files without a `run.json`, or something that a run that replaces it would read.
        """
        self.recipe = recipe
        self.config = config
        self.outputs = (*outputs, CODE_DIFF_FILE)
        self.is_main = distributed_state().is_main_process
        self.claim: Claim | None = None
        self._begun = time.monotonic()
        self.directory = Path(on_main(self._claim))
        self.checkpoints = self.directory / "checkpoints"

    def _claim(self) -> str:
        given = self.config["run"]["directory"]
        if given is None:
            self.claim = claim_new(Path(default_directory(self.recipe)), self.recipe)
            return str(self.claim.directory)
        self.directory = Path(given)
        self._refuse_foreign()  # before anything is written there
        self.claim = claim(self.directory, self.recipe)
        self._refuse_foreign()
        return given

    def _refuse_foreign(self) -> None:
        """Refuse a directory that this recipe must not write to."""
        if_exists = self.config["run"]["if_exists"]
        if refuse_foreign(self.directory, self.recipe, if_exists) and if_exists == "replace":
            self._refuse_replacing_inputs()

    def _refuse_replacing_inputs(self) -> None:
        outputs = {path.resolve() for path in self._found_outputs(self.directory)}
        for key, value in flatten_keys(self.config).items():
            for text in value if isinstance(value, list) else [value]:
                read = Path(text).resolve() if isinstance(text, str) and text else self.directory
                if outputs & {read, *read.parents}:
                    raise InputError(f"{self.directory} holds {key}={text}, an input: choose another run.directory")

    def _found_outputs(self, directory: Path) -> list[Path]:
        return [path for pattern in self.outputs for path in sorted(directory.glob(pattern))]

    def start(self, inputs: dict[str, str]) -> str:
        """Record the run.

        Args:
            inputs: hashes of the run's inputs. Two runs are the same if configuration, inputs and code are equal.

        Returns:
            "finished" or "unfinished" if the directory holds this run (under `reuse` and `resume`), "unfinished" if it
            holds any run under `extend`, else "new".

        Raises:
            InputError: the directory holds another run under `reuse` or `resume`; names what differs.
        """
        return on_main(lambda: self._start(inputs))

    def _start(self, inputs: dict[str, str]) -> str:
        config, if_exists = self.config, self.config["run"]["if_exists"]
        plugins = [file_digest(name) for name in config.get("plugins") or () if Path(name).is_file()]
        code = {"code": digest([code_digest(), *plugins])} | provenance()["versions"]
        earlier = read_run_record(self.directory)
        if earlier.get("status") == "replaced" and if_exists != "replace":
            raise InputError(
                f"{self.directory}: a start with run.if_exists=replace was interrupted; the run is partly in "
                f"{earlier['replaces'][-1]}: repeat the start, or move those files back"
            )
        if earlier and if_exists == "extend":
            write_text(self.directory / RESOLVED_FILE, as_yaml(config))
            return self._resume(earlier | {"finished": None})
        if earlier and if_exists in ("resume", "reuse"):
            self._check_same(earlier, inputs, code)
            return self._resume(earlier)
        replaces = self._set_aside(earlier) if earlier else []
        write_text(self.directory / RESOLVED_FILE, as_yaml(config))
        if diff := uncommitted_diff():
            write_text(self.directory / CODE_DIFF_FILE, diff)
        record = {"recipe": self.recipe, "inputs": inputs, "code": code, "provenance": provenance()}
        record["outputs"] = list(self.outputs)
        record |= {"replaces": replaces} if replaces else {}
        self._record_start(record | {"started": _now(), "finished": None})
        return "new"

    def _check_same(self, earlier: dict[str, Any], inputs: dict[str, str], code: dict[str, str]) -> None:
        """Raise an InputError if the recorded run differs; under `resume`, other code is only noted."""
        place, reuse = self.directory, self.config["run"]["if_exists"] == "reuse"
        recorded = flatten_keys(read_config(place / RESOLVED_FILE))
        now = flatten_keys(self.config)
        # Sharding does not change the results. A setting that only one of them has belongs to other code.
        same = {key for key in now if key in recorded and not (may_change(key) or key.startswith("zero."))}
        settings = [
            f"{key}={recorded[key]}, not {now[key]}" for key in recorded if key in same and recorded[key] != now[key]
        ]
        before = earlier.get("inputs", {})
        data = [name for name in inputs | before if before.get(name) != inputs.get(name)]
        before = earlier.get("code", code | {"code": None})
        changed = [
            name if name == "code" else f"{name} {before.get(name)}, not {code[name]}"
            for name in code
            if before.get(name) != code[name]
        ]
        if reuse and (differing := [*settings, *(f"input {name}" for name in data), *changed]):
            raise InputError(
                f"{place} holds a run that differs ({'; '.join(differing)}): choose another run.directory, "
                f"resume it as it was by {resume_hint(place)}, or start over by run.if_exists=replace"
            )
        if settings:
            raise InputError(
                f"{place}: the run started with other settings: {'; '.join(settings)}; resume it as it was by "
                f"{resume_hint(place)}, or start a new run by {hint({'from': place})}"
            )
        if data:
            raise InputError(f"{place}: the run started with other data ({', '.join(data)}); start a new run")
        if changed:
            what = "; ".join(changed)
            logger.info("note: code or package versions differ from those that the run started with: %s", what)

    def _set_aside(self, earlier: dict[str, Any]) -> list[str]:
        """Move an earlier run to a directory beside, until the new one has finished.

        Returns:
            The directories of all runs that the new one replaces.
        """
        if earlier.get("status") != "replaced":  # else a killed process has begun to move it
            replaces = [*earlier.get("replaces", []), str(free_name(f"{self.directory}.replaced-{{}}"))]
            earlier = earlier | {"status": "replaced", "replaces": replaces}
            write_json(self.directory / RECORD_FILE, earlier)
        replaces, aside = earlier["replaces"], Path(earlier["replaces"][-1])
        with os_errors(aside, "cannot write"):
            for path in [*self._found_outputs(self.directory), self.directory / RESOLVED_FILE]:
                moved = aside / path.relative_to(self.directory)
                if os.path.lexists(path) and not os.path.lexists(moved):
                    moved.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(moved)
        write_json(aside / RECORD_FILE, {**earlier, "status": "finished" if earlier.get("finished") else "unfinished"})
        logger.info("note: moved the earlier run to %s until this one has finished", aside)
        return replaces

    def _delete_replaced(self, record: dict[str, Any]) -> None:
        """Delete the runs that this one has replaced, except for files that they did not write."""
        for aside in map(Path, record.pop("replaces", [])):
            if read_run_record(aside).get("recipe") != self.recipe:
                continue
            places = run_places(aside)
            locks = [file for place in places for file in place.glob(f"{LOCK_FILE}*")]  # of killed runs inside
            for file in [*locks, *(file for place in places for file in written_files(place))]:
                with contextlib.suppress(OSError):
                    file.unlink()
            remove_empty_folders(aside)
            if aside.exists():
                logger.info("note: kept %s: it holds files that the replaced run did not write", aside)

    def _resume(self, earlier: dict[str, Any]) -> str:
        """Record that a run is running again, unless it is finished; a status of "running" means that it crashed."""
        if earlier.get("finished"):
            if reason := earlier.get("removed"):
                raise InputError(
                    f"{self.directory}: its model was removed by {reason}: start over by run.if_exists=replace"
                )
            _note_end()
            return "finished"
        if earlier.get("status") == "running":
            logger.info("note: %s crashed: the process was killed before it recorded its end", self.directory)
            earlier = earlier | {"crashed": [*earlier.get("crashed", []), {"noticed": _now()}]}
        self._record_start({key: value for key, value in earlier.items() if key not in END_FACTS})
        return "unfinished"

    def _record_start(self, record: dict[str, Any]) -> None:
        global _running
        commands = record.get("commands", [])
        commands = commands if sys.argv in commands else [*commands, sys.argv]
        write_json(self.directory / RECORD_FILE, record | {"commands": commands, "status": "running"})
        _running = self

    def _record_end(self, status: str, **facts: str) -> None:
        _note_end()
        if self.is_main:
            # A run that was moved while it worked records its end where it is now.
            directory = self.claim.place or self.directory
            record: dict[str, Any] = read_json(directory / RECORD_FILE) | {"status": status} | facts
            # Of all processes but killed ones; what a run waits for between its starts does not count.
            record["seconds"] = round(record.get("seconds", 0) + time.monotonic() - self._begun, 1)
            if status == "finished":
                self._delete_replaced(record)
            elif "replaces" in record:
                logger.info("note: the replaced run is kept in %s", record["replaces"][-1])
            found = self._found_outputs(directory)
            files = (file for path in found for file in ([path] if path.is_file() else files_below(path)))
            record["files"] = sorted({str(file.relative_to(directory)) for file in files})
            write_json(directory / RECORD_FILE, record)

    def finish(self) -> None:
        """Mark the run as finished."""
        self._record_end("finished", finished=_now())

    def stop(self, needs: str = "") -> NoReturn:
        """Mark the run as stopped, after it saved what it has, and end every process with `EXIT_STOPPED`.

        Args:
            needs: the overrides that the resumed run needs, if any.
        """
        self._record_end("stopped", stopped=_now())
        logger.info("stopped; to resume: %s", resume_hint(self.directory, needs))
        distributed_state().wait_for_everyone()  # the first to end makes torchrun end the others
        sys.exit(EXIT_STOPPED)

    def fail(self, reason: str, status: str = "failed", needs: str = "") -> NoReturn:
        """Mark the run as failed, print the reason and end with status 1; the outputs are kept for a resume.

        Args:
            status: what `run.json` says instead of "failed".
            needs: the overrides that the resumed run needs, if any.
        """
        self._record_end(status, error=reason)
        logger.info("%s; to retry the failed part: %s", reason, resume_hint(self.directory, needs))
        sys.exit(1)


_running: Run | None = None
"""The run that this process has started and not ended, on the main process."""
_ended = False
"""Whether this process has ended a run, or found it finished."""


def _note_end() -> None:
    global _running, _ended
    _running, _ended = None, True


def mark_interrupted(error: KeyboardInterrupt) -> str:
    """Mark the run that this process has started, if any, as failed.

    Returns:
        What a resume can continue from, as the end of a line.
    """
    run, ended = _running, _ended
    mark_failed(error)
    if run and any(True for pattern in PROGRESS_FILES for _ in run.directory.glob(pattern)):
        return f"; to resume: {resume_hint(run.directory)}"
    return "" if ended else ": nothing was saved"


def mark_failed(error: BaseException) -> str:
    """Mark the run that this process has started, if any, as failed.

    Returns:
        How to resume it after a `ResumableError` or an error of the operating system, such as a full disk; else empty.
    """
    if (run := _running) is None:
        return ""
    with contextlib.suppress(InputError):  # on a full disk this cannot be written either
        run._record_end("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
    if isinstance(error, ResumableError):
        return f"; to go on: {resume_hint(run.directory, error.needs)}"
    advised = not isinstance(error.__cause__, OSError) or "resume=true" in str(error)
    return "" if advised else f"; when that is mended: {resume_hint(run.directory)}"


def claim_run(recipe: str, directory: Path) -> Claim:
    """Claim the directory of an earlier run of a recipe, to write there without running it again.

    Raises:
        InputError: the directory holds no such run, or another process works there.
    """
    if read_run_record(directory).get("recipe") != recipe:
        raise InputError(f"{directory} holds no run of {recipe}: give the directory of one")
    return claim(directory, recipe)


def default_directory(recipe: str) -> str:
    """The run directory if `run.directory` is not set, named by this process's clock."""
    return time.strftime(f"runs/{recipe}-%Y%m%d-%H%M%S")


def refuse_foreign(directory: Path, recipe: str, if_exists: str) -> dict[str, Any]:
    """Refuse a directory that a recipe must not write to.

    Args:
        if_exists: a `RunConfig.if_exists`.

    Returns:
        The run record of the earlier run there; empty without one.

    Raises:
        InputError: it holds a run and `if_exists` is error, a run of another recipe, or files without a `run.json`.
    """
    if not (earlier := read_run_record(directory)):
        refuse_other_files(directory, "no run.json")
    elif earlier.get("recipe") != recipe:
        raise InputError(f"{directory} holds a run of {earlier.get('recipe')}: choose another run.directory")
    elif if_exists == "error":
        raise InputError(
            f"{directory} holds a run: choose another run.directory, keep it as it is by run.if_exists=reuse, or start "
            "over by run.if_exists=replace"
        )
    return earlier


def refuse_other_files(directory: Path, missing: str) -> None:
    """Raise an InputError if a directory holds anything but files that are there before a run begins.

    Args:
        missing: what would show that an earlier run wrote the files, for the message.
    """
    if not directory.is_dir():
        return
    with os_errors(directory, "cannot read"):
        names = sorted(path.name for path in directory.iterdir())
    if other := [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in EARLY_FILES)]:
        raise InputError(f"{directory} holds {other[0]} but {missing}: choose another directory, or an empty one")


def add_to_record(directory: Path, **facts: Any) -> None:
    """Add facts to the `run.json` of a run that has begun, on its main process.

    Raises:
        InputError: the file cannot be written.
    """
    if record := read_run_record(directory):
        write_json(directory / RECORD_FILE, record | facts)


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
    """A resolved configuration as the text of a YAML file, from which `read_config` and Hydra read the same values."""
    return yaml.dump(escape(config), Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def read_config(path: Path) -> dict[str, Any]:
    """The values in a file of `as_yaml`.

    Raises:
        InputError: it cannot be read, or is broken.
    """
    with os_errors(path, "cannot read"):
        text = path.read_text(encoding="utf-8")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        return values
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: broken YAML: {' '.join(str(error).split())}") from error


class _Dumper(ExactDumper):
    """Also quotes the texts that only OmegaConf reads as numbers, such as 82e4718."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.\d][-+.\d_e:]*", re.I), list("-+.0123456789"))


def run_places(directory: Path) -> list[Path]:
    """The directory of a run, and those of the runs inside it."""
    return [Path(place) for place, _, files in os.walk(directory) if RECORD_FILE in files]


def recorded_files(record: dict[str, Any]) -> Any:
    """What a run record says that the run wrote: its files, or before its end the patterns of its outputs."""
    return record.get("files", record.get("outputs"))


def written_files(directory: Path) -> list[Path]:
    """The files of a run: those that it listed at its end; of a killed one, its outputs. Its record is the last."""
    record = read_run_record(directory)
    listed = set(recorded_files(record) if "files" in record else ())
    patterns = [*EARLY_FILES, RESOLVED_FILE, *(() if "files" in record else recorded_files(record) or ["*"])]
    found = []
    for path in files_below(directory):
        name = path.relative_to(directory)
        parts = [str(each) for each in (name, *name.parents)]
        ours = str(name) in listed or any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns)
        found += [path] * (ours and name.name != RECORD_FILE and not name.name.startswith(LOCK_FILE))
    return [*found, directory / RECORD_FILE]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
