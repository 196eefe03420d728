"""Metrics of predictions; the import order of the built-in metrics is the order of table columns."""

from csc_train.evaluation.metrics import lexical, likelihood, model_based, replies, strategy  # noqa: F401
