"""The five criteria of the LLM judge and of human evaluation, in Chinese and English; the wording is ours."""

from csc_train.templates import read_yaml

CRITERIA = read_yaml("csc_train.evaluation.judges", "criteria.yaml")
"""By the name in answers and the language: title and definition. `evaluation.config.CRITERIA_NAMES` lists the names."""
