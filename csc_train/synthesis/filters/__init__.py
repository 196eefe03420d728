"""Filters that keep or drop a conversation."""
