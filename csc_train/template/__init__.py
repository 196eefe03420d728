"""Prompts and chat templates: dialogues to token ids, and generated text back to strategy and response."""
