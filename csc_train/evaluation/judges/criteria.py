"""The five criteria of the LLM judge and of human evaluation, in Chinese and English; the wording is ours."""

from csc_train.data.strategies import BilingualTerm
from csc_train.templates import read_yaml

CRITERIA = {
    name: BilingualTerm(**row) for name, row in read_yaml("csc_train.evaluation.judges", "criteria.yaml").items()
}
"""By the name in answers, from `criteria.yaml`; `evaluation.config.CRITERIA_NAMES` lists the names."""
