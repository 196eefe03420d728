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
    include_base: bool = True
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
    num_turns: int | None = 500
    """Turns to judge, drawn at random; all where null."""
    seed: int = 0
    """Of the draw, and of the judge's sampling."""
    language: str = "zh"
    """Language of the questions: zh or en."""
    bootstrap_resamples: int = 1000
    """Resamples of the dialogues that the 95 % intervals are taken from."""
    permutations: int = 10000
    """Random exchanges of the two systems for the p-value."""

    def __post_init__(self):
        if not self.tasks:
            raise InputError(f"judge.tasks=[]: give one or more of {', '.join(TASKS)}")
        for task in self.tasks:
            check_choice("judge.tasks", task, TASKS)
        if self.num_turns is not None:
            check_range("judge.num_turns", self.num_turns, 1)
        check_choice("judge.language", self.language, LANGUAGES)
        check_range("judge.bootstrap_resamples", self.bootstrap_resamples, 100)
        check_range("judge.permutations", self.permutations, 1000)


STRATEGIES_SHOWN = ("hidden", "own", "reference")


@dataclass
class HumanConfig:
    """How people compare replies."""

    num_items: int = 100
    """Turns on the sheet, drawn at random among those where the replies differ; with one seed, the first of those that
    a judge is given."""
    max_items_per_dialogue: int | None = 1
    """Turns of one dialogue, at most; any number where null."""
    seed: int = 0
    """Of the draw, of the order of the items and of which reply stands first."""
    language: str = "zh"
    """Language of the sheet: zh or en."""
    show_strategies: str = "hidden"
    """Whether strategies are shown. own: each reply's. reference: that of the reference at this turn, to both."""
    criteria: list[str] = field(default_factory=lambda: list(CRITERIA))
    """What is asked besides which reply is better overall."""
    bootstrap_resamples: int = 1000
    """Resamples of the dialogues that the 95 % intervals are taken from."""
    permutations: int = 10000
    """Random exchanges of the two systems for each p-value."""

    def __post_init__(self):
        check_range("human.num_items", self.num_items, 1)
        if self.max_items_per_dialogue is not None:
            check_range("human.max_items_per_dialogue", self.max_items_per_dialogue, 1)
        check_choice("human.language", self.language, LANGUAGES)
        check_choice("human.show_strategies", self.show_strategies, STRATEGIES_SHOWN)
        for criterion in self.criteria:
            check_choice("human.criteria", criterion, CRITERIA)
        check_range("human.bootstrap_resamples", self.bootstrap_resamples, 100)
        check_range("human.permutations", self.permutations, 1000)
