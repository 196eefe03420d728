"""Encoded dialogues to packs of at most `max_length` tokens, and packs to batches."""
