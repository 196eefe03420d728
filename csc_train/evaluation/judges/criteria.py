"""The five criteria by which replies are judged, by a model and by people; `evaluation/config.py` lists their names."""

from dataclasses import dataclass

from csc_train.templates import read_yaml


@dataclass(frozen=True)
class Criterion:
    """One criterion: its name and what makes a reply good by it, in Chinese and English."""

    zh: str
    en: str
    definition_zh: str
    definition_en: str

    def name(self, language: str) -> str:
        """The name in `language` ("zh" or "en")."""
        return {"zh": self.zh, "en": self.en}[language]

    def definition(self, language: str) -> str:
        """What makes a reply good, in `language` ("zh" or "en")."""
        return {"zh": self.definition_zh, "en": self.definition_en}[language]


CRITERIA = {name: Criterion(**row) for name, row in read_yaml("csc_train.evaluation.judges", "criteria.yaml").items()}
"""The criteria by the names that answers give them, from `criteria.yaml`."""
