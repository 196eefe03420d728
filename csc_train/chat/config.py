"""What a user may choose about talking to a model."""

from dataclasses import dataclass

from omegaconf import MISSING

from csc_train.errors import InputError, check_choice, check_range
from csc_train.inference.config import DTYPES

USER_INTERFACES = ("terminal", "web")


@dataclass
class ChatConfig:
    """Configuration of recipes/chat.py."""

    checkpoint: str = MISSING
    """The directory of a checkpoint, as recipes/sft.py or recipes/export.py wrote it."""
    ui: str = "terminal"
    """terminal, or web: a page that this machine alone can open (see `host`)."""
    temperature: float = 0.0
    """0 takes the likeliest token, as recipes/evaluate.py does; above it tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this share of the probability together."""
    max_new_tokens: int = 256
    """The longest reply, strategy included."""
    dtype: str = "auto"
    """auto: as the checkpoint is stored. Or bf16, fp32."""
    save: str | None = None
    """Terminal: a new dialogue file that is kept up to date from turn to turn."""
    host: str = "127.0.0.1"
    """Web: the address to listen on. Anyone who reaches it can use the page."""
    port: int = 7860
    """Web: the first port to try; the next free one is taken."""

    def __post_init__(self):
        check_choice("ui", self.ui, USER_INTERFACES)
        check_range("temperature", self.temperature, 0, 10)
        check_range("top_p", self.top_p, 0.01, 1)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        check_choice("dtype", self.dtype, DTYPES)
        check_range("port", self.port, 1, 65535)
        if self.save is not None and self.ui == "web":
            raise InputError(f"save={self.save}: the page has a button to save; leave it out with ui=web")
