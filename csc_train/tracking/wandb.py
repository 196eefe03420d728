"""Where the figures of a run go: a history in the run directory whatever the tracker, and Weights & Biases.

Steps are optimizer steps. A run that goes on from a saved state of training goes on in the same W&B run, by the id that
the state keeps. Steps that a killed run did after its last state are done again: our history forgets them first; W&B
keeps the values that it got first, since it takes no step twice.
"""

import csv
import dataclasses
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import TrainerCallback
from transformers.integrations import WandbCallback, rewrite_logs

from csc_train.checkpoints.manifest import Manifest
from csc_train.checkpoints.training_checkpoint import read_record
from csc_train.errors import InputError
from csc_train.files import atomic_path, read_json, write_json
from csc_train.jsonl import JsonlLog, keep_table
from csc_train.packing.dataset import PackingReport
from csc_train.runs.config import RESOLVED_FILE
from csc_train.runs.directory import CODE_DIFF_FILE, Run
from csc_train.runs.distributed import distributed_state
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.curves import plot_curves
from csc_train.training.trainer import PackTrainer

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
HISTORY, CURVES = "history.jsonl", "curves.png"
REPORTS = ("results.json", "table.md", "report.html", "resolved.yaml")
"""Of an evaluation's run directory: what is attached to the W&B run of the training."""
SCORE_COLUMNS = ["system", "context", "profile", "metric", "value", "low", "high", "unit"]
RECORD = "tracking.json"
"""In a run directory: which W&B run is its own, and where."""
ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""What the Trainer logs once, of a training as a whole."""
HASHES = ("data_hash", "template_hash", "tokenizer_hash")
"""What a manifest says that a checkpoint was made of."""


class WandbSteps(WandbCallback):
    """The Trainer's own W&B integration, with optimizer steps as W&B's steps, so that none is there twice."""

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Log under the optimizer step; what is logged several times in a step becomes one row."""
        if once := {name: logs[name] for name in ONCE if name in logs}:
            self._wandb.run.summary.update(once)
        else:
            row = rewrite_logs(logs) | {"train/global_step": state.global_step}
            self._wandb.log(row, step=state.global_step)

    def on_save(self, args, state, control, **_) -> None:
        """Close the row: a state that has been saved is gone on from, so the step's values must not be lost."""
        self._wandb.log({}, step=state.global_step, commit=True)


class Tracking(TrainerCallback):
    """The history of a training, and its W&B run, from `with` to the end of the block however it ends.

    All of it happens on the main process; on the others nothing does.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run: Run,
        trainer: PackTrainer,
        manifest: Manifest,
        packing: PackingReport,
        state: str | None,
    ):
        """Nothing is opened yet.

        Args:
            run: whose directory holds it all.
            manifest: that of the checkpoint to be.
            packing: what became of the dialogues.
            state: the state of training to go on from.
        """
        self.config, self.run, self.trainer, self.manifest, self.state = config, run, trainer, manifest, state
        self.packing = packing
        self.history = JsonlLog(run.directory / HISTORY)
        if trainer.validator is not None:
            trainer.validator.log_table = self.log_table
        self._wandb: wandb.Run | None = None

    def __enter__(self) -> "Tracking":
        if self.run.is_main:
            self.trainer.add_callback(self)
            mode = resolve_mode(self.config)
            if mode != "off":
                self._open(mode)
        return self

    def _open(self, mode: str) -> None:
        saved = read_record(Path(self.state)).tracked if self.state else None
        earlier = _read(self.run.directory)
        self.trainer.tracked = saved or earlier.get("id") or secrets.token_hex(4)
        self._wandb = open_run(self.config, self.run.directory, mode, self.trainer.tracked, self._settings())
        self.trainer.tracked = self._wandb.id  # in a sweep of W&B's it is the sweep's
        offline = self._wandb.offline
        where = {"mode": "offline", "url": None} if offline else {"mode": "wandb", "url": self._wandb.url}
        write_json(self.run.directory / RECORD, earlier | {"id": self._wandb.id} | where)
        if (changes := self.run.directory / CODE_DIFF_FILE).exists():
            self._wandb.log_artifact(changes, f"code-{self._wandb.id}", "code")
        self.trainer.add_callback(WandbSteps())

    def _settings(self) -> dict[str, Any]:
        """The W&B run's configuration: what was asked for, made of what, and run on what."""
        device = self.trainer.args.device
        cluster = {
            "world_size": self.trainer.args.world_size,
            "nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "cpus_per_node": os.cpu_count(),
        }
        origin = {name: getattr(self.manifest, name) for name in ("base_model", "base_revision", *HASHES, "provenance")}
        packing = dataclasses.asdict(self.packing) | {"token_ratio": self.packing.tokens / self.packing.separate_tokens}
        made = {"overrides": sys.argv[1:], "origin": origin, "packing_report": packing, "cluster": cluster}
        return self.run.config | made

    def on_train_begin(self, args, state, control, **_) -> None:
        """Forget what is going to be trained again."""
        self.history.truncate_after(state.global_step if state.global_step else -1)

    def on_log(self, args, state, control, logs: dict[str, Any], **_) -> None:
        """Add a line to the history."""
        if not any(name in logs for name in ONCE):
            self.history.append({"step": state.global_step, "time": time.time()} | logs)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Keep a table of a step: as lines of `<name>.jsonl` in the run directory, and in W&B.

        Called on any process; the main one's table counts.
        """
        if not self.run.is_main:
            return
        keep_table(self.run.directory, name, columns, rows, step)
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._wandb.log({name: table}, step=max(step, self._wandb.step))  # the step's row may be closed

    def keep_checkpoint(self, checkpoint: Path) -> None:
        """Record in W&B where the checkpoint is and what data it was trained on; no weights are uploaded."""
        if self._wandb is None:
            return
        import wandb

        data = wandb.Artifact(f"data-{self.manifest.data_hash[:12]}", "dataset", metadata=self.run.config["data"])
        source = Path(self.run.config["data"]["train"]["path"])
        if source.is_file():
            data.add_reference(source.absolute().as_uri(), checksum=False)
        if not self._wandb.offline:  # an input cannot be declared offline
            self._wandb.use_artifact(data)
        facts = {"data": data.name} | {name: getattr(self.manifest, name) for name in HASHES}
        model = wandb.Artifact(f"checkpoint-{self._wandb.id}", "model", metadata=facts)
        model.add_reference(checkpoint.absolute().as_uri(), checksum=False)
        self._wandb.log_artifact(model)

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        try:
            if self.run.is_main:
                self._close(error)
        finally:
            # Where all processes come here, the others wait: the first to end makes torchrun end the main one.
            if error is None or isinstance(error, SystemExit):
                distributed_state().wait_for_everyone()

    def _close(self, error: BaseException | None) -> None:
        try:
            if self.history.path.exists():
                lines = self.history.read()
                write_csv(self.run.directory / "history.csv", lines)
                plot_curves(self.run.directory / CURVES, lines)
        finally:
            if self._wandb is not None:
                self._wandb.finish(exit_code=exit_code(error))
        logger.info(f"figures: {self.run.directory}/{HISTORY}, history.csv, {CURVES}; {_tracker(self._wandb)}")


def resolve_mode(config: TrackingConfig) -> str:
    """wandb, offline or off: what a `TrackingConfig.mode` stands for here.

    Raises:
        InputError: W&B is asked for and there is no key.
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
    except wandb.Error as error:  # a key that can be none
        reason = str(error).splitlines()[0]
    if config.mode == "wandb":
        raise InputError(f"tracking=wandb: {reason}; run `wandb login`, set WANDB_API_KEY, or use tracking=offline")
    return "offline"


def open_run(
    config: TrackingConfig, directory: Path, mode: str, run_id: str, settings: dict[str, Any] | None = None
) -> "wandb.Run":
    """Open the W&B run `run_id` of a run directory, or go on with it; offline where nobody answers in time."""
    # What artifacts hold until they are uploaded; in the home directory where not said.
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
                x_transaction_log_flush_interval=1.0,  # seconds; a kill costs what was not written out
            ),
        )

    if mode == "wandb":
        try:
            return start("online", init_timeout=config.init_timeout)
        except wandb.Error as error:
            wandb.teardown()  # else the id stays in use
            print(f"W&B does not answer ({str(error).splitlines()[0]}): the run is kept offline", flush=True)
    return start("offline")


def exit_code(error: BaseException | None) -> int:
    """The status that a process ends with after `error`."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, InputError) else 1


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a history as a table: a row for each step, a column for each figure."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())


def attach_evaluation(trained: Path, evaluation: Path) -> None:
    """Attach an evaluation to the W&B run that trained the checkpoint; nothing where that was not tracked.

    Its results become a table of the run, and they and the reports an artifact that names the checkpoint's.

    Args:
        trained: the run directory of the training.
        evaluation: the run directory of the evaluation.
    """
    record = _read(trained)
    if not record:
        return
    import wandb

    settings = yaml.safe_load((trained / RESOLVED_FILE).read_text(encoding="utf-8"))["tracking"]
    run = open_run(TrackingConfig(**settings), trained, record["mode"], record["id"])
    artifact = wandb.Artifact(f"evaluation-{run.id}", "evaluation", metadata={"checkpoint": f"checkpoint-{run.id}"})
    for path in (evaluation / name for name in REPORTS):
        if path.exists():
            artifact.add_file(path)
    table = wandb.Table(SCORE_COLUMNS, scores(read_json(evaluation / "results.json")["results"]))
    artifact.add(table, "results")
    run.log_artifact(artifact)
    # A step of its own, behind those of the training and of earlier evaluations: W&B takes none twice.
    attached = record.get("evaluations", 0) + 1
    last = max((line["step"] for line in JsonlLog(trained / HISTORY).read()), default=0)
    run.log({"evaluation/results": table}, step=last + attached)
    run.finish()
    write_json(trained / RECORD, record | {"evaluations": attached})


def scores(results: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Rows of `SCORE_COLUMNS` from the results of an evaluation, by system and context."""
    return [
        [system, context, profile, metric, *(score[name] for name in ("value", "low", "high", "unit"))]
        for system, contexts in results.items()
        for context, result in contexts.items()
        for profile, metrics in result["profiles"].items()
        for metric, score in metrics.items()
    ]


def _read(directory: Path) -> dict[str, Any]:
    return read_json(directory / RECORD) if (directory / RECORD).exists() else {}


def _tracker(run: "wandb.Run | None") -> str:
    if run is None:
        return "no tracker"
    if not run.offline:
        return f"W&B: {run.url}"
    return f"W&B, offline: {run.settings.sync_dir} (to upload: wandb sync {run.settings.wandb_dir}/offline-run-*)"
