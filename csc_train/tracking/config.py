"""Settings of the trackers, the `tracking` group."""

import re
from dataclasses import dataclass, field

from csc_train.errors import InputError, check_fields

FORK = re.compile(r"(?P<run>.+)\?_step=(?P<step>\d+)")


@dataclass
class TrackingConfig:
    """Where the metrics of a run go besides the history in its run directory."""

    mode: str = "auto"
    """wandb: log to Weights & Biases (W&B). offline: write W&B files in the run directory, which `wandb sync` uploads.
    off: use no W&B. auto: as WANDB_MODE or WANDB_DISABLED say, else wandb with a key or login, else offline."""
    to: list[str] = field(default_factory=lambda: ["wandb"])
    """The trackers. wandb: W&B, as `tracking.mode` says. tensorboard: event files in the run directory. mlflow: the
    server or store that MLFLOW_TRACKING_URI names, else `mlflow.db` in the run directory."""
    project: str | None = None
    """The project of W&B and experiment of MLflow; defaults to WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME, else
    csc-train."""
    fork_from: str | None = None
    """`RUN?_step=N`: a new W&B run begins with the first N steps of RUN, a run directory or the id of a W&B run. Its
    own steps follow. A resumed run keeps what it began with."""
    entity: str | None = None
    """The W&B user or team; defaults to WANDB_ENTITY, else the login's."""
    init_timeout: float | None = None
    """Seconds to wait for W&B at the start; then the run is kept offline. Defaults to WANDB_INIT_TIMEOUT, else 30. An
    MLflow server that does not answer by then ends the start."""
    finish_timeout: float | None = None
    """Seconds for each tracker's upload at the end; W&B keeps the rest in the run directory, others lose it. Defaults
    to WANDB_FINISH_TIMEOUT, else 300."""

    def __post_init__(self):
        check_fields("tracking.", self, "mode", choices=("auto", "wandb", "offline", "off"))
        check_fields("tracking.", self, "to", choices=("wandb", "tensorboard", "mlflow"))
        check_fields("tracking.", self, "init_timeout", "finish_timeout", low=1)
        if self.fork_from is not None and not FORK.fullmatch(self.fork_from):
            raise InputError(f"tracking.fork_from={self.fork_from}: write RUN?_step=N, such as 'runs/first?_step=100'")
        if self.fork_from is not None and "wandb" not in self.to:
            raise InputError("tracking.fork_from: only W&B can fork a run: add wandb to tracking.to")
