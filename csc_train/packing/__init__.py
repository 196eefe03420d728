"""Packing: tokenized dialogues to packs, packs to global batches, and batches to model inputs."""
