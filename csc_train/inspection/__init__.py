"""A look at dialogues before a training."""
