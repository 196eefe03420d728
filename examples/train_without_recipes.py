"""Train without recipes: sample dialogues -> tokenizer -> template -> packs -> trainer -> final model.

python examples/train_without_recipes.py my_run

It takes about a minute on a CPU. Chat with the result: python examples/serve_and_chat.py my_run/model
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from csc_train.checkpoints.manifest import Manifest, save_final_model
from csc_train.data.dialogue import data_digest
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.models.attention.select import select_attention
from csc_train.models.config import AdapterConfig, ArchitectureConfig, ModelConfig
from csc_train.models.loading import load_model
from csc_train.models.tokenizer import tokenizer_hash
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.runs.distributed import distributed_state
from csc_train.template.chat_templates import chat_template_name
from csc_train.template.config import TemplateConfig, TokenizationConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.tokenizer_training import get_tokenizer
from csc_train.tokenized_cache import tokenize
from csc_train.training.config import TrainerConfig
from csc_train.training.trainer import build_trainer, training_arguments


def train(directory: Path, steps: int = 200, dialogues: int = 300) -> float:
    """Train a small Qwen2 from random weights, save it in `directory/model`, and return the last loss."""
    # Settings: each class documents its fields, as docs/settings.md does.
    model_config = ModelConfig(
        init="random",
        tokenizer="train",
        architecture=ArchitectureConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2),
    )
    template_config = TemplateConfig()
    packing = PackingConfig(max_length=768)
    trainer_config = TrainerConfig(
        learning_rate=3e-3,
        max_steps=steps,
        packs_per_step=2,
        micro_batch_size=2,
        logging_steps=20,
        precision="fp32",
    )

    # Dialogues and tokenizer. `data.readers.read_dialogues` reads files of your own.
    training = generate_sample(dialogues, seed=0)
    job = distributed_state()
    tokenizer = get_tokenizer(model_config, template_config, training, directory / "tokenizer", job)

    # Template and packs
    name = chat_template_name(model_config.chat_template, tokenizer, model_config.architecture.model_type)
    template = DialogueTemplate(tokenizer, name, template_config)
    tokenized = tokenize(training, template, TokenizationConfig(cache_dir=str(directory / "tokenized")))
    packs, report = pack_dialogues(tokenized, packing, LossConfig())
    print(f"training on {report}")

    # Model and trainer
    arguments = training_arguments(trainer_config, directory / "checkpoints", job.num_processes)
    attention = select_attention(model_config.attn_implementation, packing.strategy, trainer_config.precision)
    model = load_model(model_config, tokenizer, torch.float32, trainer_config.seed, attention)
    trainer = build_trainer(model, tokenizer, packs, arguments, packing.strategy, AdapterConfig())
    trainer.train()

    # Final model: a plain Hugging Face directory, and the manifest that recipes read
    manifest = Manifest(
        base_model="random",
        base_revision=None,
        chat_template=template.chat_template_name,
        mode=template_config.mode,
        language=template_config.language,
        template_hash=template.fingerprint,
        tokenizer_hash=tokenizer_hash(tokenizer),
        strategies=[strategy.label for strategy in STRATEGIES],
        data_hash=data_digest(training),
        config={"model": asdict(model_config), "trainer": asdict(trainer_config), "adapter": asdict(AdapterConfig())},
    )
    save_final_model(directory / "model", trainer.model, tokenizer, template.chat_template, manifest)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder of the run")
    folder = parser.parse_args().directory
    print(f"loss {train(folder):.3f}; model: {folder}/model")
