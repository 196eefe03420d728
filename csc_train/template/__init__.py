"""Dialogues to token ids and per-token loss weights, and reply text back to (strategy, response)."""
