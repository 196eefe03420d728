"""The tracker of a training: the history in its run directory, its Weights & Biases (W&B) run, and its reporters.

A resumed training continues its runs, whose ids its training checkpoints hold. Steps after the checkpoint are trained
again: the history and TensorBoard drop the earlier rows, MLflow keeps both, and W&B the earlier, since it takes no step
twice.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError
from csc_train.files import write_json
from csc_train.runs.comparison import HISTORY_FILE
from csc_train.runs.directory import CODE_DIFF_FILE
from csc_train.runs.distributed import distributed_state
from csc_train.tracking.config import FORK, TrackingConfig
from csc_train.tracking.history import CSV_FILE, CURVES_FILE, History
from csc_train.tracking.reporters import REPORTERS, Reporter
from csc_train.tracking.wandb import (
    TRACKING_FILE,
    exit_code,
    fork_source,
    kept_at,
    one_line,
    open_run,
    resolve_mode,
    run_place,
    tracking_record,
)  # fmt: skip

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


def check_trackers(config: TrackingConfig) -> None:
    """Check that each tracker can work, before anything is written.

    Raises:
        InputError: a package is not installed, a server does not answer, W&B has no key for mode wandb, or no run to
            fork from.
    """
    if "wandb" in config.to and config.mode == "wandb":
        resolve_mode(config)
    if config.fork_from:
        fork_source(config.fork_from)
    for name, kind in REPORTERS.items():
        if name not in config.to:
            continue
        if importlib.util.find_spec(kind.package) is None:
            raise InputError(
                f"tracking.to={name}: {kind.title} is not installed: pip install 'csc-train[{name}]', or leave it out"
            )
        try:
            kind.check(config.init_timeout or 30)
        except InputError as error:
            raise InputError(f"tracking.to={name}: {error}") from error


class Tracker:
    """Keeps the metrics of a training until the end of its `with` block; only the main process writes.

    What fails in W&B (no place to write, a dead service) is said once; the training goes on, and its history is whole.

    Attributes:
        history: of the run directory.
        run_ids: the id of the run, by tracker.
    """

    def __init__(self, config: TrackingConfig, directory: Path):
        self.config = config
        self.history = History(directory)
        self.run_ids: dict[str, str] = {}
        self._is_main = distributed_state().is_main_process
        self._wandb: wandb.Run | None = None
        self._failed = False
        self._fork_step = 0  # steps of the W&B run before those of the training
        self._reporters: list[Reporter] = []

    def _tell_wandb(self, tell: Callable[["wandb.Run"], object]) -> None:
        """Call a function with the W&B run, if there is one."""
        if self._wandb is not None:
            with self._wandb_errors():
                tell(self._wandb)

    @contextlib.contextmanager
    def _wandb_errors(self) -> Iterator[None]:
        """Say the first error of W&B; a training is worth more than its copy there."""
        try:
            yield
        except Exception as error:  # of any kind: W&B's, those of sockets, files and checks of values
            if not self._failed:
                logger.info(f"W&B failed, training goes on without it: {one_line(error)}")
            self._failed = True

    def open(self, settings: dict[str, Any], run_ids: dict[str, str] | None = None, first_step: int = 0) -> None:
        """Open the run of each tracker.

        Args:
            settings: their configuration.
            run_ids: the runs to continue, by tracker; default to those of the run directory, or new ones.
            first_step: the first optimizer step of the training, or 0.

        Raises:
            InputError: as `resolve_mode`.
        """
        if not self._is_main:
            return
        record = tracking_record(self.history.directory)
        ids = {name: kept["id"] for name, kept in record.items()} | (run_ids or {})
        if "wandb" in self.config.to and (mode := resolve_mode(self.config)) != "off":
            with self._wandb_errors():
                record["wandb"] = self._open_wandb(mode, ids.get("wandb"), record.get("wandb", {}), settings)
        for name in REPORTERS:
            if name in self.config.to:
                reporter = Reporter(name, self.config, self.history.directory, ids.get(name), first_step, settings)
                self._reporters.append(reporter)
                record |= {name: reporter.identity} if reporter.identity else {}
        if record:
            with self._wandb_errors():
                write_json(self.history.directory / TRACKING_FILE, record)
        self.run_ids = {name: kept["id"] for name, kept in record.items()}

    def _open_wandb(
        self, mode: str, run_id: str | None, record: dict[str, Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Open the W&B run; returns its record."""
        directory = self.history.directory
        fork = record.get("fork_from") if run_id else self.config.fork_from
        self._wandb = run = open_run(self.config, directory, mode, run_id, settings)
        self._fork_step = int(FORK.fullmatch(fork)["step"]) if fork else 0
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        if (diff := directory / CODE_DIFF_FILE).exists():
            run.log_artifact(diff, f"code-{run.id}", "code")
        return record | run_place(run) | ({"fork_from": fork} if fork else {})

    @property
    def identity(self) -> dict[str, Any]:
        """What finds the W&B run again, for the manifest of the model: id, project, entity, mode, last step."""
        found: dict[str, Any] = {}
        self._tell_wandb(
            lambda run: found.update(
                id=run.id, project=run.project, entity=run.entity, mode=run_place(run)["mode"], step=run.step
            )
        )
        return found

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
        self._log(row | {"train/global_step": step + self._fork_step}, step)
        for reporter in self._reporters:  # last: their threads then work during the next step
            reporter.log(row, step)

    def commit(self, step: int) -> None:
        """Send W&B the row of a step, before a training checkpoint that would not repeat the step."""
        self._log({}, step, commit=True)

    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Log metrics of the whole training to W&B."""
        self._tell_wandb(lambda run: run.summary.update(metrics))

    def alert(self, title: str, text: str) -> None:
        """Send an alert to W&B, which mails it or passes it to Slack as its user chose."""
        self._tell_wandb(lambda run: run.alert(title, text, level="WARN"))

    def log_table(self, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Log a table of a step: to `<name>.jsonl` in the run directory, and to W&B."""
        if self._is_main:
            self.history.log_table(name, rows, step)

        def log(run: "wandb.Run") -> None:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self._log({name: table}, max(step, run.step - self._fork_step))  # the step's row may be closed

        self._tell_wandb(log)

    def _log(self, row: dict[str, Any], step: int, commit: bool | None = None) -> None:
        self._tell_wandb(lambda run: run.log(row, step=step + self._fork_step, commit=commit))

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
        places: list[str] = []
        try:
            # A second error, such as of the same full disk, would hide the first.
            with contextlib.suppress(InputError) if isinstance(error, Exception) else contextlib.nullcontext():
                self.history.close()
        finally:
            if self._wandb is not None:
                with self._wandb_errors():
                    self._wandb.finish(exit_code=exit_code(error))
                    places = [kept_at(self._wandb)]
            timeout = self.config.finish_timeout or 300
            closed = [reporter.close(error, timeout) for reporter in self._reporters]
        if self._failed:
            places = ["W&B: incomplete"]
            with self._wandb_errors():
                import wandb

                wandb.teardown()  # else its end of the process prints a traceback
        where = "; ".join([*places, *closed]) or "no tracker"
        logger.info(f"metrics: {self.history.directory}/{HISTORY_FILE}, {CSV_FILE}, {CURVES_FILE}; {where}")
