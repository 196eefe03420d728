"""What the fork server imports before tests fork scripts from it (see `processes`)."""

import functools
import gc
import importlib
import inspect
from typing import Any

from wandb.sdk.data_types._private import MEDIA_TMP

for name in (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "hydra", "jieba",
    "matplotlib.backends.backend_agg", "matplotlib.figure", "nltk", "openai", "optuna", "pandas", "peft",
    "PIL.JpegImagePlugin", "rouge_score.rouge_scorer", "sacrebleu", "scipy.stats", "torch.distributed.tensor",
    "torch.utils.data", "transformers", "trl", "wandb",
):  # fmt: skip
    importlib.import_module(name)
# These libraries import a class when it is first asked for.
for name, attributes in {
    "transformers": ("AutoModelForCausalLM", "AutoTokenizer", "Qwen2ForCausalLM", "Trainer"),
    "trl": ("SFTConfig", "SFTTrainer"),
}.items():
    for attribute in attributes:
        getattr(importlib.import_module(name), attribute)
# It is unpacked by each process that detects a language.
langid: Any = importlib.import_module("py3langid.langid")
langid._load_model_file = functools.cache(langid._load_model_file)
langid._load_model_file(langid.MODEL_DIR / langid.MODEL_FILE)
# torch asks for the source of each operator that a script registers; inspect then looks at all modules that it does not
# know.
inspect.getmodule(compile("", "nowhere", "exec"))
MEDIA_TMP.cleanup()  # that of the server
gc.freeze()  # a collection would copy the pages that a fork shares with the server


def own_directories() -> None:
    """Give a forked script a directory for W&B's files: W&B makes it when it is imported, and a script removes it."""
    MEDIA_TMP.__init__("wandb-media")
