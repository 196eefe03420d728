"""Weights & Biases (W&B): open or continue a run, offline if W&B does not answer; attach an evaluation to a run."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError
from csc_train.files import read_json, write_json
from csc_train.tracking.config import TrackingConfig

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
TRACKING_FILE = "tracking.json"
"""In a run directory: the id, mode and address of its W&B run; of an evaluation, that of the training."""
REPORTS = ("results.json", "table.md", "report.html", "resolved.yaml")
"""Files of an evaluation that are attached to the W&B run of the training."""
RESULT_COLUMNS = ["system", "context", "profile", "metric", "value", "low", "high", "unit", "direction"]


def resolve_mode(config: TrackingConfig) -> str:
    """Resolve a `TrackingConfig.mode` to wandb, offline or off.

    Raises:
        InputError: mode wandb without a key.
    """
    if config.mode in ("offline", "off"):
        return config.mode
    if config.mode == "auto" and (asked := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        return {"offline": "offline", "disabled": "off"}[asked]
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return "wandb"
        reason = "no key"
    except wandb.Error as error:  # malformed key
        reason = str(error).splitlines()[0]
    if config.mode == "wandb":
        raise InputError(f"tracking=wandb: {reason}; run `wandb login`, set WANDB_API_KEY, or use tracking=offline")
    return "offline"


def open_run(
    config: TrackingConfig, directory: Path, mode: str, run_id: str, settings: dict[str, Any] | None = None
) -> "wandb.Run":
    """Open or continue the W&B run `run_id` of a run directory; offline if W&B does not answer in time.

    Args:
        mode: wandb or offline.
        settings: the configuration to record.
    """
    # Artifacts until they are uploaded; W&B would keep them in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory.absolute() / "wandb"))
    import wandb

    def start(mode: str, **limits: float) -> wandb.Run:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=directory.name,
            id=run_id,
            dir=directory,
            mode=mode,
            resume="allow",
            config=settings,
            settings=wandb.Settings(
                **limits,
                finish_timeout=config.finish_timeout,
                silent=True,
                console="off",
                x_transaction_log_flush_interval=1.0,  # seconds; a kill loses unwritten rows
            ),
        )

    if mode == "wandb":
        try:
            return start("online", init_timeout=config.init_timeout)
        except wandb.Error as error:
            wandb.teardown()  # else the id stays in use
            logger.info(f"W&B does not answer ({str(error).splitlines()[0]}): the run is kept offline")
    return start("offline")


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.info(f"note: the results are not attached to the training's W&B run {training['id']}: {reason}")


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
        attached = wandb_record(directory).get("evaluations", 0) + 1
        run.log({"evaluation/results": table}, step=max(run.step, training.get("step", 0)) + attached)
        where = {"mode": "offline", "url": None} if run.offline else {"mode": "wandb", "url": run.url}
    write_json(directory / TRACKING_FILE, {"id": run.id, **where, "evaluations": attached})


def result_rows(results: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Rows of `RESULT_COLUMNS` from the results of an evaluation, by system and context."""
    return [
        [system, context, profile, metric, *(score[name] for name in RESULT_COLUMNS[4:])]
        for system, contexts in results.items()
        for context, result in contexts.items()
        for profile, metrics in result["profiles"].items()
        for metric, score in metrics.items()
    ]


def wandb_record(directory: Path) -> dict[str, Any]:
    """The id, mode and address of a run directory's W&B run; empty if it was not tracked."""
    return read_json(directory / TRACKING_FILE) if (directory / TRACKING_FILE).exists() else {}
