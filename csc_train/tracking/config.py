"""Settings of the tracker, the `tracking` group."""

from dataclasses import dataclass

from csc_train.errors import check_fields


@dataclass
class TrackingConfig:
    """Where the metrics of a run go besides the history in its run directory."""

    mode: str = "auto"
    """wandb: log to Weights & Biases (W&B). offline: write W&B files in the run directory, which `wandb sync` uploads.
    off: use no W&B. auto: wandb with a key or login, else offline. WANDB_MODE=offline and WANDB_MODE=disabled are
    obeyed."""
    project: str = "csc-train"
    """The W&B project."""
    entity: str | None = None
    """The W&B user or team; defaults to the login's."""
    init_timeout: float = 30.0
    """Seconds to wait for W&B at the start; then the run is kept offline."""
    finish_timeout: float = 300.0
    """Seconds for W&B's upload at the end; the rest stays in the run directory."""

    def __post_init__(self):
        check_fields("tracking.", self, "mode", choices=("auto", "wandb", "offline", "off"))
        check_fields("tracking.", self, "init_timeout", "finish_timeout", low=1)
