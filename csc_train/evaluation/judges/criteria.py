"""The five criteria of the LLM judge and of human evaluation, in Chinese and English; the wording is ours."""

from dataclasses import dataclass

from csc_train.templates import read_yaml


@dataclass(frozen=True)
class Criterion:
    """A criterion: its name and definition in Chinese and English."""

    zh: str
    en: str
    definition_zh: str
    definition_en: str

    def name(self, language: str) -> str:
        """The name in `language` ("zh" or "en")."""
        return {"zh": self.zh, "en": self.en}[language]

    def definition(self, language: str) -> str:
        """The definition in `language` ("zh" or "en")."""
        return {"zh": self.definition_zh, "en": self.definition_en}[language]


CRITERIA = {name: Criterion(**row) for name, row in read_yaml("csc_train.evaluation.judges", "criteria.yaml").items()}
"""By the name in answers, from `criteria.yaml`; `evaluation.config.CRITERIA_NAMES` lists the names."""
