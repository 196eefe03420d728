"""The tracker of a training: the history in its run directory, and its Weights & Biases (W&B) run.

A resumed training continues its W&B run, whose id its training checkpoints hold. Steps after the checkpoint are trained
again: the history drops the earlier rows, W&B keeps them, since it takes no step twice.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.runs.comparison import HISTORY_FILE
from csc_train.runs.directory import CODE_DIFF_FILE
from csc_train.runs.distributed import distributed_state
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.history import CSV_FILE, CURVES_FILE, History
from csc_train.tracking.wandb import TRACKING_FILE, exit_code, kept_at, one_line, open_run, resolve_mode, wandb_record

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


class Tracker:
    """Keeps the metrics of a training until the end of its `with` block; only the main process writes.

    What fails in W&B (no place to write, a dead service) is said once; the training goes on, and its history is whole.

    Attributes:
        history: of the run directory.
        wandb_run_id: the id of the W&B run; None without one.
    """

    def __init__(self, config: TrackingConfig, directory: Path):
        self.config = config
        self.history = History(directory)
        self.wandb_run_id: str | None = None
        self._is_main = distributed_state().is_main_process
        self._wandb: wandb.Run | None = None
        self._failed = False

    @contextlib.contextmanager
    def _wandb_errors(self) -> Iterator[None]:
        """Say the first error of W&B; a training is worth more than its copy there."""
        try:
            yield
        except Exception as error:  # of any kind: W&B's, those of sockets, files and checks of values
            if not self._failed:
                logger.info(f"W&B failed, training goes on without it: {one_line(error)}")
            self._failed = True

    def open(self, settings: dict[str, Any], wandb_run_id: str | None = None) -> None:
        """Open the W&B run.

        Args:
            settings: its configuration.
            wandb_run_id: the run to continue; defaults to that of the run directory, or a new one.

        Raises:
            InputError: as `resolve_mode`.
        """
        if not self._is_main or (mode := resolve_mode(self.config)) == "off":
            return
        directory = self.history.directory
        with self._wandb_errors():
            record = wandb_record(directory)
            self._wandb = run = open_run(self.config, directory, mode, wandb_run_id or record.get("id"), settings)
            self.wandb_run_id = run.id
            where = {"mode": "offline", "url": None} if run.offline else {"mode": "wandb", "url": run.url}
            write_json(directory / TRACKING_FILE, record | {"id": run.id} | where)
            run.define_metric("train/global_step")
            run.define_metric("*", step_metric="train/global_step", step_sync=True)
            if (diff := directory / CODE_DIFF_FILE).exists():
                run.log_artifact(diff, f"code-{run.id}", "code")

    @property
    def identity(self) -> dict[str, Any]:
        """What finds the W&B run again, for the manifest of the model: id, project, entity, mode, last step."""
        if (run := self._wandb) is not None:
            with self._wandb_errors():
                mode = "offline" if run.offline else "wandb"
                return {"id": run.id, "project": run.project, "entity": run.entity, "mode": mode, "step": run.step}
        return {}

    def truncate_after(self, step: int) -> None:
        """Drop the history after a step, since training repeats it."""
        if self._is_main:
            self.history.truncate_after(step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Log metrics of an optimizer step; those of several calls become one row in W&B.

        Args:
            metrics: those of the validation are named `eval_*`.
        """
        if self._is_main:
            self.history.log(step, metrics)
        row = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in metrics.items()
        }
        self._log(row | {"train/global_step": step}, step)

    def commit(self, step: int) -> None:
        """Send W&B the row of a step, before a training checkpoint that would not repeat the step."""
        self._log({}, step, commit=True)

    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Log metrics of the whole training to W&B."""
        if self._wandb is not None:
            with self._wandb_errors():
                self._wandb.summary.update(metrics)

    def alert(self, title: str, text: str) -> None:
        """Send an alert to W&B, which mails it or passes it to Slack as its user chose."""
        if self._wandb is not None:
            with self._wandb_errors():
                self._wandb.alert(title, text, level="WARN")

    def log_table(self, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Log a table of a step: to `<name>.jsonl` in the run directory, and to W&B."""
        if self._is_main:
            self.history.log_table(name, rows, step)
        if self._wandb is not None:
            import wandb

            with self._wandb_errors():
                table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
                self._log({name: table}, max(step, self._wandb.step))  # the step's row may be closed

    def _log(self, row: dict[str, Any], step: int, commit: bool | None = None) -> None:
        if self._wandb is not None:
            with self._wandb_errors():
                self._wandb.log(row, step=step, commit=commit)

    def log_model(self, directory: Path, hashes: dict[str, str], data_config: dict[str, Any]) -> None:
        """Log references to the final model and its training data to W&B; no weights are uploaded.

        Args:
            directory: of the final model.
            hashes: of its manifest, by name.
            data_config: the `data` group of the run's configuration.
        """
        if self._wandb is None:
            return
        import wandb

        with self._wandb_errors():
            dataset = wandb.Artifact(f"data-{hashes['data_hash'][:12]}", "dataset", metadata=data_config)
            for source in (data_config["train"], *data_config.get("mix", ())):
                for path in filter(None, (source["path"], *source.get("also", ()))):
                    if Path(path).is_file():
                        dataset.add_reference(Path(path).absolute().as_uri(), checksum=False)
            if not self._wandb.offline:  # W&B declares inputs online only
                self._wandb.use_artifact(dataset)
            model = wandb.Artifact(f"model-{self._wandb.id}", "model", metadata={"data": dataset.name} | hashes)
            model.add_reference(directory.absolute().as_uri(), checksum=False)
            self._wandb.log_artifact(model)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        try:
            if self._is_main:
                self._close(error)
        finally:
            # If all processes get here, the others wait: the first to end makes torchrun end the main one.
            if error is None or isinstance(error, SystemExit):
                distributed_state().wait_for_everyone()

    def _close(self, error: BaseException | None) -> None:
        where = "no tracker"
        try:
            # A second error, such as of the same full disk, would hide the first.
            with contextlib.suppress(InputError) if isinstance(error, Exception) else contextlib.nullcontext():
                self.history.close()
        finally:
            if self._wandb is not None:
                with self._wandb_errors():
                    self._wandb.finish(exit_code=exit_code(error))
                    where = kept_at(self._wandb)
        if self._failed:
            where = "W&B: incomplete"
            with self._wandb_errors():
                import wandb

                wandb.teardown()  # else its end of the process prints a traceback
        logger.info(f"metrics: {self.history.directory}/{HISTORY_FILE}, {CSV_FILE}, {CURVES_FILE}; {where}")
