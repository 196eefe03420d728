"""Tokenize the dialogues before training, and print the statistics of their packs: dialogues -> template -> packs.

python recipes/prepare.py experiment=qwen2_5_7b_lora
"""

import tempfile
from pathlib import Path

try:
    from csc_train.config.cli import run_recipe
    from csc_train.config.recipes.training import PrepareRecipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: run `pip install .` in the checkout of CSC Train") from None


def main(config: PrepareRecipe) -> None:
    # After the configuration is checked: these imports take seconds.
    from csc_train.data.sample_grammar import provide_sample
    from csc_train.data.splits import read_and_check_splits
    from csc_train.models.hub import base_model_type
    from csc_train.packing.dataset import pack_dialogues
    from csc_train.runs.distributed import distributed_state, require_single_process
    from csc_train.template.chat_templates import chat_template_name
    from csc_train.template.dialogue_template import DialogueTemplate
    from csc_train.template.tokenizer_training import get_tokenizer
    from csc_train.tokenized_cache import tokenize

    require_single_process("prepare")

    # Dialogues
    provide_sample(config.data)
    splits = read_and_check_splits(config.data)

    # Template
    with tempfile.TemporaryDirectory() as directory:  # the training trains the same tokenizer again
        tokenizer = get_tokenizer(config.model, config.template, splits.train, Path(directory), distributed_state())
    name = chat_template_name(config.model.chat_template, tokenizer, base_model_type(config.model))
    template = DialogueTemplate(tokenizer, name, config.template)

    # Packs
    examples = tokenize(splits.train, template, config.tokenization)
    if config.validation.interval(config.trainer):
        tokenize(splits.validation_dialogues, template, config.tokenization)
    mixture = splits.mixture
    del splits  # of many dialogues, most of the memory
    _, report = pack_dialogues(examples, config.packing, config.loss, config.template.language, mixture)
    print(f"packs of the training: {report}")


if __name__ == "__main__":
    run_recipe("prepare", main)
