"""Predictions to metrics, tables, comparisons, reports and judgements."""
