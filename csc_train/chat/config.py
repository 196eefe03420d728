"""Settings of recipes/chat.py."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from csc_train.errors import InputError, check_fields
from csc_train.inference.config import DTYPES
from csc_train.models.config import DELTA_KERNELS
from csc_train.template.config import TemplateConfig

USER_INTERFACES = ("terminal", "web")
OPENINGS = ("supporter", "customer")


@dataclass
class ChatConfig:
    """Settings of a chat with a trained model."""

    checkpoint: str = MISSING
    """A run directory, a final model, an exported directory or a training checkpoint; with `template`, the directory or
    hub id of any other model, or the directory of a PEFT adapter."""
    template: TemplateConfig | None = None
    """The prompt of a checkpoint that another program wrote. A checkpoint of this project has its own."""
    chat_template: str | None = None
    """With `template`: the chat template of that checkpoint (see `model.chat_template`); null takes that of its
    tokenizer."""
    ui: str = "terminal"
    """User interface: terminal, or web for a page that only this machine can open (see `host`)."""
    opening: str = "supporter"
    """Who opens the conversation: supporter (with a greeting) or customer."""
    temperature: float = 0.0
    """Sampling temperature. 0 selects greedy decoding, as recipes/evaluate.py does."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the likeliest tokens that reach this probability together."""
    max_new_tokens: int = 256
    """Maximum tokens of a reply, strategy included."""
    dtype: str = "auto"
    """Precision of the weights: auto (as saved), bf16 or fp32."""
    delta_kernel: str = "auto"
    """As `model.delta_kernel`: on a GPU, a model with gated delta nets runs by flash-linear-attention, or by torch."""
    save: str | None = None
    """Terminal: a new dialogue file, updated after each turn."""
    host: str = "127.0.0.1"
    """Web: the address to listen on. Anyone who can reach it can use the page."""
    port: int = 7860
    """Web: the first port to try; if it is in use, the next free one."""
    plugins: list[str] = field(default_factory=list)
    """Python files, or modules on PYTHONPATH, that register the language or the model family of a checkpoint that
    another program wrote (docs/extending.md). Others name their own."""

    def __post_init__(self):
        check_fields("", self, "ui", choices=USER_INTERFACES)
        check_fields("", self, "opening", choices=OPENINGS)
        check_fields("", self, "temperature", low=0, high=10)
        check_fields("", self, "top_p", low=0.01, high=1)
        check_fields("", self, "max_new_tokens", low=1)
        check_fields("", self, "dtype", choices=DTYPES)
        check_fields("", self, "delta_kernel", choices=DELTA_KERNELS)
        check_fields("", self, "port", low=1, high=65535)
        if self.chat_template is not None and self.template is None:
            raise InputError(f"chat_template={self.chat_template}: give template=... as well")
        if self.save is not None and self.ui == "web":
            raise InputError(f"save={self.save}: not available with ui=web: use the page's save link")
