"""Packs to a checkpoint: tokenizer, model, adapter, trainer."""
