"""Checks and plans of a training before it starts."""
