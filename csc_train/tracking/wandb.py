"""Weights & Biases (W&B): open or continue a run, offline if W&B does not answer; attach an evaluation to a run."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import ENV_VARS_TRUE_VALUES

from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.runs.comparison import history_log
from csc_train.tracking.config import FORK, TrackingConfig

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
TRACKING_FILE = "tracking.json"
"""In a run directory: the id and place of its run, by tracker; of an evaluation, those of the training's W&B run."""
REPORTS = ("results.json", "table.md", "report.html", "report_dialogues.js", "resolved.yaml")
"""Files of an evaluation that are attached to the W&B run of the training."""
RESULT_COLUMNS = ["system", "context", "profile", "metric", "value", "low", "high", "unit", "direction"]


def resolve_mode(config: TrackingConfig) -> str:
    """Resolve a `TrackingConfig.mode` to wandb, offline or off.

    Raises:
        InputError: mode wandb without a key, or with variables that W&B refuses.
    """
    if config.mode in ("offline", "off"):
        return config.mode
    obeyed, variables = config.mode == "auto", os.environ
    disabled = variables.get("WANDB_DISABLED", "").upper() in ENV_VARS_TRUE_VALUES  # as transformers reads it
    if obeyed and (disabled or variables.get("WANDB_MODE") == "disabled"):
        return "off"  # before the import, which takes a second
    if not obeyed:
        variables["WANDB_MODE"] = "online"  # else W&B's login would obey it
    import wandb

    try:
        asked = wandb.setup().settings.mode  # also of W&B's settings files
        if obeyed and asked in ("offline", "dryrun", "disabled"):
            return "off" if asked == "disabled" else "offline"
        if wandb.login(prompt=False, verify=False):
            return "wandb"
        reason = "no key"
    except Exception as error:  # of many kinds: a malformed key or variable, no home directory, an unreadable netrc
        reason = one_line(error)
    if config.mode == "wandb":
        raise InputError(f"tracking=wandb: {reason}; run `wandb login`, set WANDB_API_KEY, or use tracking=offline")
    return "offline"


def open_run(
    config: TrackingConfig, directory: Path, mode: str, run_id: str | None, settings: dict[str, Any] | None = None
) -> "wandb.Run":
    """Open or continue the W&B run of a run directory; offline if W&B does not answer in time.

    What `config` sets comes first, then W&B's own (its environment variables and settings files), then our defaults.

    Args:
        mode: wandb or offline.
        run_id: the run to continue; None for a new one, which begins as `config.fork_from` says.
        settings: the configuration to record.
    """
    # Files of W&B that would lie in the home directory, which may be read-only: artifacts until they are uploaded.
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(Path(os.environ.get("WANDB_DIR") or directory).absolute() / "wandb"))
    import wandb

    own = wandb.setup().settings
    given = {name for name in own.model_fields_set if getattr(own, name) not in (None, "")}
    defaults = {
        "project": "csc-train",
        "root_dir": str(directory),
        "resume": "allow",
        "init_timeout": 30.0,
        "finish_timeout": 300.0,
        "silent": True,
        "console": "off",
        "x_transaction_log_flush_interval": 1.0,  # seconds; a kill loses unwritten rows
    }
    ours = {name: getattr(config, name) for name in ("project", "entity", "init_timeout", "finish_timeout")}
    if run_id:
        ours |= {"run_id": run_id, "resume": "allow"}
    else:
        defaults["run_name"] = directory.name  # a continued run has its name
        if config.fork_from:
            ours["fork_from"] = fork_source(config.fork_from)
            del defaults["resume"]  # W&B takes one of them
    chosen = {name: value for name, value in defaults.items() if name not in given}
    chosen |= {name: value for name, value in ours.items() if value is not None}

    def start(mode: str) -> wandb.Run:
        return wandb.init(mode=mode, config=settings, settings=wandb.Settings(**chosen))

    if mode == "wandb":
        try:
            return start("online")
        except wandb.Error as error:
            wandb.teardown()  # else the id stays in use
            logger.info(f"W&B does not answer ({one_line(error)}): the run is kept offline")
    return start("offline")


def fork_source(fork: str) -> str:
    """A `TrackingConfig.fork_from` as W&B takes it; offline W&B would take any.

    Raises:
        InputError: it names a run directory that does not exist, has no W&B run or has fewer steps.
    """
    named: Any = FORK.fullmatch(fork)
    run_id, directory = named["run"], Path(named["run"])
    if directory.is_dir():
        if not (run_id := tracking_record(directory).get("wandb", {}).get("id")):
            raise InputError(f"tracking.fork_from={fork}: {directory} has no W&B run: name a run that was tracked")
        if int(named["step"]) > (last := max((row["step"] for row in history_log(directory).read()), default=0)):
            raise InputError(f"tracking.fork_from={fork}: {directory} has {last} steps: choose one of them")
    elif "/" in run_id:  # no id has one
        raise InputError(
            f"tracking.fork_from={fork}: {directory}: no such directory: name a run, or the id of a W&B run"
        )
    return f"{run_id}?_step={named['step']}"


def kept_at(run: "wandb.Run") -> str:
    """Where a finished run is.

    Raises:
        OSError: its offline file is incomplete, which W&B's service only writes to its log.
    """
    if not run.offline:
        return f"W&B: {run.url}"
    if "writer: failed" in Path(run.settings.log_internal).read_text(encoding="utf-8", errors="replace"):
        raise OSError(f"{run.settings.sync_file}: cannot write all; see {run.settings.log_internal}")
    return f"W&B, offline: {run.settings.sync_dir} (to upload: wandb sync {run.settings.wandb_dir}/offline-run-*)"


def run_place(run: "wandb.Run") -> dict[str, Any]:
    """The id of a run, its mode, and its address, which it has online only."""
    return {"id": run.id} | ({"mode": "offline", "url": None} if run.offline else {"mode": "wandb", "url": run.url})


def one_line(error: Exception) -> str:
    """The message of an error of W&B or below it as one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def exit_code(error: BaseException | None) -> int:
    """The exit status of a process that ends with `error`."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, InputError) else 1


def attach_evaluation(training: dict[str, Any], tracking: dict[str, Any], directory: Path) -> None:
    """Attach an evaluation to the W&B run of the training: a table of results, and an artifact of reports.

    Does nothing if the training was not tracked. A failure is said and changes nothing. Files are written in the
    directory of the evaluation only.

    Args:
        training: the `wandb` of the model's manifest (see `Tracker.identity`).
        tracking: the tracking settings of the training.
        directory: the run directory of the evaluation.
    """
    if not training:
        return
    try:
        _attach(training, TrackingConfig(**tracking), directory)
    except Exception as error:  # W&B and its service raise many kinds
        logger.info(f"note: the results are not attached to the training's W&B run {training['id']}: {one_line(error)}")


def _attach(training: dict[str, Any], config: TrackingConfig, directory: Path) -> None:
    import wandb

    config = replace(config, **{name: training[name] for name in ("project", "entity") if training.get(name)})
    if (mode := training.get("mode") or resolve_mode(config)) == "off":
        return
    results = result_rows(read_json(directory / "results.json")["results"])
    with open_run(config, directory, mode, training["id"]) as run:  # closes it after a failure, too
        artifact = wandb.Artifact(f"evaluation-{run.id}", "evaluation", metadata={"model": f"model-{run.id}"})
        for path in (directory / name for name in REPORTS):
            if path.exists():
                artifact.add_file(path)
        table = wandb.Table(RESULT_COLUMNS, results)
        artifact.add(table, "results")
        run.log_artifact(artifact)
        # A new step after those of the training and of earlier attachments: W&B takes no step twice.
        attached = tracking_record(directory).get("wandb", {}).get("evaluations", 0) + 1
        run.log({"evaluation/results": table}, step=max(run.step, training.get("step", 0)) + attached)
        place = run_place(run)
    write_json(directory / TRACKING_FILE, {"wandb": place | {"evaluations": attached}})


def result_rows(results: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Rows of `RESULT_COLUMNS` from the results of an evaluation, by system and context."""
    return [
        [system, context, profile, metric, *(score[name] for name in RESULT_COLUMNS[4:])]
        for system, contexts in results.items()
        for context, result in contexts.items()
        for profile, metrics in result["profiles"].items()
        for metric, score in metrics.items()
    ]


def tracking_record(directory: Path) -> dict[str, dict[str, Any]]:
    """The id and place of a run directory's run, by tracker; empty if it was not tracked."""
    record = read_json(directory / TRACKING_FILE) if (directory / TRACKING_FILE).exists() else {}
    return {"wandb": record} if "id" in record else record  # of an earlier version
