"""Metrics of one system's predictions, and their profiles."""
