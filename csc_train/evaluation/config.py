"""Settings of evaluation: contexts, metrics, the LLM judge and human evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

from csc_train.data.config import LANGUAGE_CODES
from csc_train.errors import InputError, check_fields
from csc_train.inference.config import CONTEXTS, InferenceConfig


@dataclass
class EvaluationConfig(InferenceConfig):
    """How replies are generated."""

    contexts: list[str] = field(default_factory=lambda: list(CONTEXTS))
    """Dialogue history before each turn. reference: the gold dialogue. generated: the system's own earlier replies with
    the gold customer turns."""
    base: bool | str = True
    """Evaluate the base model of the checkpoint as well. true: the one that the training recorded, wherever it is now.
    Or the directory or hub id of the base model."""
    general: str | None = None
    """A JSONL file of general texts, rows of `text` or of `messages` of a chat, whose perplexity shows what a training
    has made the model forget. Only models that run here score them."""
    max_failed: float = 0.01
    """Largest share of turns of a system in a context that may have no reply. Above it, the evaluation ends incomplete,
    with its figures marked and exit status 1."""

    def __post_init__(self):
        if not self.contexts:
            raise InputError(f"evaluation.contexts=[]: give one or more of {', '.join(CONTEXTS)}")
        check_fields("evaluation.", self, "contexts", choices=CONTEXTS)
        check_fields("evaluation.", self, "max_failed", low=0, high=1)
        super().__post_init__()


PROFILES = {
    "paper": "B-2, B-4, R-L, BS and BR are reconstructions: the paper does not publish its metric code. "
    "R-L sees digits and Latin letters only.",
    "zh": "Our own choice of metrics for Chinese; the paper does not report these.",
    "en": "The paper's six metrics over words, for languages whose words white space separates; our own choice.",
}
"""Metric profiles, each with the note below its table."""
PAPER = "paper"
"""The profile of the published metrics."""


@dataclass
class MetricsConfig:
    """Which metrics are computed.

    Raises:
        InputError: an unknown profile, a number out of range, or a path that is no model directory.
    """

    profiles: list[str] | None = None
    """Tables of metrics. paper: a reconstruction of the paper's metrics. zh: metrics for Chinese text. en: the paper's
    metrics over words. Defaults to those of the language: [paper, zh] for zh, [en] for en."""
    bertscore_model: str | None = None
    """Directory or hub id of the BERTScore model, such as google-bert/bert-base-chinese. null prints n/a."""
    bertscore_layers: int = 8
    """Model layer that BERTScore compares; the bert-score package's choice is 8 for bert-base-chinese, 17 for
    roberta-large."""
    bertscore_baseline: str | None = None
    """Baseline table (LAYER,P,R,F) for rescaling BERTScore. Defaults to the bert-score package's table for Chinese, if
    it has one for a model of this name."""
    bleurt_model: str | None = None
    """Directory or hub id of a PyTorch conversion of BLEURT-20 with a tokenizer.json. null prints n/a."""
    batch_size: int = 64
    """Pairs per forward pass of BERTScore and BLEURT."""
    accepted: str | None = None
    """JSONL file of the admissible strategies of turns, by people or by recipes/judge.py: dialogue_id, turn, accepted.
    The other turns keep the sets of the data."""
    bootstrap_resamples: int = 1000
    """Bootstrap resamples of the dialogues for the 95 % intervals."""

    def __post_init__(self):
        check_fields("metrics.", self, "profiles", choices=PROFILES)
        check_fields("metrics.", self, "bertscore_layers", "batch_size", low=1)
        check_fields("metrics.", self, "bootstrap_resamples", low=100)
        # Checked here, before hours of generating.
        for name in ("bertscore_model", "bleurt_model"):
            path = getattr(self, name)
            if path is not None and _is_local(path) and not (Path(path) / "config.json").is_file():
                raise InputError(f"metrics.{name}={path}: no config.json: give a model directory or a hub id")
        for name in ("bertscore_baseline", "accepted"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise InputError(f"metrics.{name}={path}: no such file")


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") != 1


COMPARING_TASKS = ("pairwise", "rubric")
TASKS = (*COMPARING_TASKS, "accepted")


@dataclass
class JudgeConfig:
    """How a language model judges replies."""

    tasks: list[str] = field(default_factory=lambda: list(COMPARING_TASKS))
    """pairwise: choose the better of two replies, in both orders. rubric: score each reply by five criteria. accepted:
    name the admissible strategies of each reference turn, for `metrics.accepted`; alone it needs one evaluation."""
    num_turns: int | None = 500
    """Turns to judge, drawn at random; null judges all."""
    seed: int = 0
    """Seed of the random draw and of the judge's sampling."""
    language: str | None = None
    """Language of the judge's prompts and of the strategies' names. Defaults to that of the first evaluation."""
    bootstrap_resamples: int = 1000
    """Bootstrap resamples of the dialogues for the 95 % intervals."""
    permutations: int = 10000
    """Permutations of the sign-flip test."""

    def __post_init__(self):
        if not self.tasks:
            raise InputError(f"judge.tasks=[]: give one or more of {', '.join(TASKS)}")
        check_fields("judge.", self, "tasks", choices=TASKS)
        check_fields("judge.", self, "num_turns", low=1)
        check_fields("judge.", self, "language", choices=LANGUAGE_CODES)
        check_fields("judge.", self, "bootstrap_resamples", low=100)
        check_fields("judge.", self, "permutations", low=1000)


CRITERIA_NAMES = ("strategy", "helpfulness", "empathy", "wording", "faithfulness")
"""Criteria of the LLM judge's rubric and of human evaluation; `judges/criteria.py` has their definitions."""
STRATEGY_DISPLAY = ("hidden", "own", "reference")


@dataclass
class HumanConfig:
    """How people compare replies."""

    num_items: int = 100
    """Items on the annotation form: turns drawn at random among those with different replies. With the same seed, they
    are the first turns that the LLM judge draws."""
    max_items_per_dialogue: int | None = 1
    """Maximum items from one dialogue; null sets no limit."""
    seed: int = 0
    """Seed of the random draw, of the order of items and of the order of replies."""
    language: str | None = None
    """Language of the annotation form and of the strategies' names. Defaults to that of the first evaluation."""
    show_strategies: str = "hidden"
    """Strategies on the annotation form. hidden: none. own: that of each reply. reference: that of the gold turn."""
    criteria: list[str] = field(default_factory=lambda: list(CRITERIA_NAMES))
    """Criteria to ask besides the overall preference."""
    bootstrap_resamples: int = 1000
    """Bootstrap resamples of the dialogues for the 95 % intervals."""
    permutations: int = 10000
    """Permutations of the sign-flip test."""

    def __post_init__(self):
        check_fields("human.", self, "num_items", "max_items_per_dialogue", low=1)
        check_fields("human.", self, "language", choices=LANGUAGE_CODES)
        check_fields("human.", self, "show_strategies", choices=STRATEGY_DISPLAY)
        check_fields("human.", self, "criteria", choices=CRITERIA_NAMES)
        check_fields("human.", self, "bootstrap_resamples", low=100)
        check_fields("human.", self, "permutations", low=1000)
