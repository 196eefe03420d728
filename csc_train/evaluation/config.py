"""What a user may choose about an evaluation."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.inference.config import CONTEXTS, InferenceConfig
from csc_train.template.config import LANGUAGES


@dataclass
class EvaluationConfig(InferenceConfig):
    """How replies are generated and scored."""

    contexts: list[str] = field(default_factory=lambda: list(CONTEXTS))
    base: bool = True
    """Evaluate the model that training started from as well."""

    def __post_init__(self):
        if not self.contexts:
            raise InputError(f"evaluation.contexts=[]: give one or more of {', '.join(CONTEXTS)}")
        for context in self.contexts:
            check_choice("evaluation.contexts", context, CONTEXTS)
        super().__post_init__()


TASKS = ("pairwise", "rubric")


@dataclass
class JudgeConfig:
    """How a language model judges replies."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """pairwise: which of two replies is better, asked in both orders. rubric: five scores for each reply."""
    turns: int | None = 500
    """Turns to judge, drawn at random; all where null."""
    seed: int = 0
    """Of the draw, and of the judge's sampling."""
    language: str = "zh"
    """Language of the questions: zh or en."""
    draws: int = 1000
    """Resamples of the dialogues that the 95 % intervals are taken from."""
    flips: int = 10000
    """Random exchanges of the two systems for the p-value."""

    def __post_init__(self):
        if not self.tasks:
            raise InputError(f"judge.tasks=[]: give one or more of {', '.join(TASKS)}")
        for task in self.tasks:
            check_choice("judge.tasks", task, TASKS)
        if self.turns is not None:
            check_range("judge.turns", self.turns, 1)
        check_choice("judge.language", self.language, LANGUAGES)
        check_range("judge.draws", self.draws, 100)
        check_range("judge.flips", self.flips, 1000)


STRATEGIES_SHOWN = ("hidden", "own", "reference")


@dataclass
class HumanConfig:
    """How people compare replies."""

    items: int = 100
    """Turns on the sheet, drawn at random among those where the replies differ; with one seed, the first of those that
    a judge is given."""
    per_dialogue: int | None = 1
    """Turns of one dialogue, at most; any number where null."""
    seed: int = 0
    """Of the draw, of the order of the items and of which reply stands first."""
    language: str = "zh"
    """Language of the sheet: zh or en."""
    strategies: str = "hidden"
    """Whether strategies are shown. own: each reply's. reference: that of the reference at this turn, to both."""
    criteria: list[str] = field(default_factory=lambda: list(CRITERIA))
    """What is asked besides which reply is better overall."""
    draws: int = 1000
    """Resamples of the dialogues that the 95 % intervals are taken from."""
    flips: int = 10000
    """Random exchanges of the two systems for each p-value."""

    def __post_init__(self):
        check_range("human.items", self.items, 1)
        if self.per_dialogue is not None:
            check_range("human.per_dialogue", self.per_dialogue, 1)
        check_choice("human.language", self.language, LANGUAGES)
        check_choice("human.strategies", self.strategies, STRATEGIES_SHOWN)
        for criterion in self.criteria:
            check_choice("human.criteria", criterion, CRITERIA)
        check_range("human.draws", self.draws, 100)
        check_range("human.flips", self.flips, 1000)
