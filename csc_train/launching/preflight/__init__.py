"""Checks, memory estimates and time estimates of a training before it starts."""
