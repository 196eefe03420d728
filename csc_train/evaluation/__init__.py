"""Evaluate predictions: metrics, tables, comparisons, reports and judgements."""
