"""Settings of the tracker, the `tracking` group."""

from dataclasses import dataclass

from csc_train.errors import check_fields


@dataclass
class TrackingConfig:
    """Where the metrics of a run go besides the history in its run directory."""

    mode: str = "auto"
    """wandb: log to Weights & Biases (W&B). offline: write W&B files in the run directory, which `wandb sync` uploads.
    off: use no W&B. auto: as WANDB_MODE or WANDB_DISABLED say, else wandb with a key or login, else offline."""
    project: str | None = None
    """The W&B project; defaults to WANDB_PROJECT, else csc-train."""
    entity: str | None = None
    """The W&B user or team; defaults to WANDB_ENTITY, else the login's."""
    init_timeout: float | None = None
    """Seconds to wait for W&B at the start; then the run is kept offline. Defaults to WANDB_INIT_TIMEOUT, else 30."""
    finish_timeout: float | None = None
    """Seconds for W&B's upload at the end; the rest stays in the run directory. Defaults to WANDB_FINISH_TIMEOUT, else
    300."""

    def __post_init__(self):
        check_fields("tracking.", self, "mode", choices=("auto", "wandb", "offline", "off"))
        check_fields("tracking.", self, "init_timeout", "finish_timeout", low=1)
