"""Train a model on packs: trainer, loss, validation, DeepSpeed, memory estimate."""
