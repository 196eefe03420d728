"""TensorBoard and MLflow beside W&B: what accelerate's tracker of each needs, and a thread in which it is called."""

import importlib
import importlib.util
import logging
import os
import re
import textwrap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csc_train.errors import InputError
from csc_train.runs.directory import as_yaml, flatten_keys
from csc_train.tracking.config import TrackingConfig
from csc_train.tracking.wandb import one_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # so a server that hangs delays the end of a process by minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


@dataclass(frozen=True)
class ReporterKind:
    """How accelerate's tracker of a kind is used.

    Attributes:
        title: its name in messages.
        package: to import; our extra of the same name installs it.
        check: raises an InputError if it cannot work; gets the seconds to wait for a server.
        start: begins or continues a run; returns the tracker, the run's `id` and what else finds it. Gets the settings
            of the trackers, the run directory, the id of the run to continue or None, the first step that will be
            logged, and the configuration to record.
        finish: ends the run; gets the error that ended the training.
        clean: makes the name of a metric or setting one that it takes.
    """

    title: str
    package: str
    check: Callable[[float], None]
    start: Callable[[TrackingConfig, Path, str | None, int, dict[str, Any]], tuple["GeneralTracker", dict[str, str]]]
    finish: Callable[["GeneralTracker", BaseException | None], None]
    clean: Callable[[str], str]


def _start_tensorboard(config, directory, run_id, first_step, settings):
    from accelerate.tracking import TensorBoardTracker

    # A resumed training repeats the steps from the first one on: their earlier events are purged.
    tracker = TensorBoardTracker("tensorboard", directory, purge_step=first_step)
    tracker.start()
    tracker.log({"settings": textwrap.indent(as_yaml(settings), " " * 4)}, step=first_step)
    return tracker, {"id": "tensorboard"}


def _mlflow() -> Any:
    """MLflow, as `MLFLOW_DEFAULTS` say; the user's environment goes first."""
    os.environ.update(MLFLOW_DEFAULTS | os.environ)
    return importlib.import_module("mlflow")


def _start_mlflow(config, directory, run_id, first_step, settings):
    mlflow = _mlflow()
    from accelerate.tracking import MLflowTracker

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.absolute()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    tracker = MLflowTracker("csc-train", run_name=directory.name)  # MLflow's variables come first there
    tracker.experiment_name = config.project or tracker.experiment_name
    tracker.run_id = run_id or tracker.run_id
    tracker.start()
    if tracker.run_id is None:  # parameters of a run never change
        limit = mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
        flat = {_mlflow_name(name): str(value)[:limit] for name, value in flatten_keys(settings).items()}
        tracker.store_init_configuration(flat)
    return tracker, {"id": tracker.tracker.info.run_id, "url": _without_password(uri)}


def _finish_mlflow(tracker: "GeneralTracker", error: BaseException | None) -> None:
    if error is not None:
        _mlflow().end_run("FAILED" if isinstance(error, Exception) else "KILLED")
    tracker.finish()


def _check_mlflow(timeout: float) -> None:
    from accelerate.utils import patch_environment

    client, uri = _mlflow().MlflowClient, os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and importlib.util.find_spec("mlflow.store.tracking.sqlalchemy_store") is None:
        raise InputError("no server: set MLFLOW_TRACKING_URI, or let it keep a store by `pip install --no-deps mlflow`")
    if not uri:
        return
    try:
        with patch_environment(mlflow_http_request_max_retries=0, mlflow_http_request_timeout=int(timeout)):
            client(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, and those of requests and SQLAlchemy
        raise InputError(f"{_without_password(uri)}: {_reason(error)}") from error


def _without_password(text: str) -> str:
    return re.sub(r"(?<=//)[^/\s]*@|(?<=\w)\?\w+=\S*", "", text)


def _reason(error: Exception) -> str:
    """The message of a tracker's error, which may hold the address of its server."""
    return _without_password(one_line(error))[:300]


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


REPORTERS = {
    "tensorboard": ReporterKind(
        "TensorBoard", "tensorboard", lambda _: None, _start_tensorboard, lambda tracker, _: tracker.finish(), str
    ),
    "mlflow": ReporterKind("MLflow", "mlflow", _check_mlflow, _start_mlflow, _finish_mlflow, _mlflow_name),
}
"""By their name in `TrackingConfig.to`."""


class Reporter:
    """One of accelerate's trackers, in a thread of its own.

    A slow server does not hold up the training, and MLflow's run belongs to the thread that began it. What fails is
    said once, and nothing more is sent: the training goes on, and its history is whole.

    Attributes:
        identity: what finds the run again, with its `id`; empty if it could not start.
        failed: whether it has.
    """

    def __init__(self, name: str, config: TrackingConfig, directory: Path, *rest: Any):
        """Start it.

        Args:
            rest: what else `ReporterKind.start` gets.
        """
        self.kind, self.directory = REPORTERS[name], directory
        self.identity: dict[str, str] = {}
        self.failed = False
        self._tracker: Any = None
        self._thread = ThreadPoolExecutor(1, f"tracking-{name}")
        self._submit(self._start, config, directory, *rest).result()

    def _start(self, *arguments: Any) -> None:
        self._tracker, self.identity = self.kind.start(*arguments)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[None]:
        return self._thread.submit(self._call, function, *arguments)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        if not self.failed:
            try:
                function(*arguments)
            except Exception as error:  # of any kind: those of files, databases, servers and checks of values
                self.failed = True
                logger.info(f"{self.kind.title} failed, training goes on without it: {_reason(error)}")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Log metrics of an optimizer step."""
        metrics = {self.kind.clean(name): value for name, value in metrics.items() if value is not None}
        self._submit(lambda: self._tracker.log(metrics, step=step))

    def close(self, error: BaseException | None, timeout: float) -> str:
        """End the run as the training ended.

        Args:
            timeout: seconds to wait for what is not yet sent.

        Returns:
            Where it is.
        """
        done = self._submit(lambda: self.kind.finish(self._tracker, error))
        self._thread.shutdown(wait=False)
        late = bool(wait([done], timeout).not_done)
        self.failed |= late  # else the end of the process would wait for the rest
        where = self.identity.get("url") or f"{self.directory}/{self.identity.get('id')}"
        return f"{self.kind.title}: {'incomplete' if self.failed else where}"
