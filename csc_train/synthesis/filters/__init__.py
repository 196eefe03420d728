"""Filters that keep or drop a conversation: rules, private data, near-duplicates, and checks by language models."""
