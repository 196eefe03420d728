"""Composed, typed configuration of the recipes."""
