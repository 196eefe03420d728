"""Checkpoints, servers and baselines that reply to dialogues; evaluation and chat stand on it."""
