"""Dialogues: the taxonomy, reading and writing, splits, near duplicates, and the sample grammar."""
