"""Schemas of the recipes that evaluate a model and compare evaluations."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from csc_train.data.config import DataConfig
from csc_train.errors import InputError, check_fields
from csc_train.evaluation.config import COMPARING_TASKS, EvaluationConfig, HumanConfig, JudgeConfig, MetricsConfig
from csc_train.llm.config import LLMConfig
from csc_train.runs.config import RunConfig
from csc_train.template.config import TemplateConfig


@dataclass
class EvaluateRecipe:
    """Configuration of recipes/evaluate.py."""

    checkpoint: str | None = None
    """A run directory, a final model, an exported directory or a training checkpoint; with `template`, the directory or
    hub id of any other model, or the directory of a PEFT adapter."""
    predictions: str | None = None
    """Instead of a checkpoint: a JSONL file of replies made elsewhere, each with dialogue_id, turn and text."""
    score_only: bool = False
    """With run=DIR: score the predictions of that run again, without a model."""
    data: DataConfig | None = None
    """The dialogues; defaults to the evaluation dialogues of the checkpoint's run."""
    llm: LLMConfig | None = None
    """A model on a server: the served checkpoint if `checkpoint` is set, else a prompted model."""
    template: TemplateConfig | None = None
    """The prompt of a prompted model, which defaults to joint and the language of the dialogues; or of a checkpoint
    that another program wrote. A checkpoint of this project has its own."""
    chat_template: str | None = None
    """With `template`: the chat template of a checkpoint that another program wrote (see `model.chat_template`); null
    takes that of its tokenizer."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Contexts, baselines and generation."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """The metrics and their intervals."""
    plugins: list[str] = field(default_factory=list)
    """Python files, or modules on PYTHONPATH, that register metrics or model families (docs/extending.md)."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        if self.predictions is None:
            if self.checkpoint is None and self.llm is None:
                raise InputError("checkpoint is required: give checkpoint=...")
            if self.checkpoint is None and self.data is None:
                raise InputError("llm: say on which dialogues to evaluate it, such as data=rolecs")
            if self.checkpoint is not None and self.template is not None and self.data is None:
                raise InputError(
                    f"template: {self.checkpoint} knows its own; leave it out; or, if another program wrote it, say on "
                    "which dialogues to evaluate it, such as data=rolecs"
                )
            if self.chat_template is not None and (self.checkpoint is None or self.template is None):
                raise InputError(f"chat_template={self.chat_template}: give checkpoint=... and template=... as well")
            return
        if self.llm is not None:
            raise InputError(f"predictions={self.predictions}: give them or llm=..., not both")
        if self.checkpoint is not None:
            raise InputError(f"predictions={self.predictions}: give it or checkpoint=..., not both")
        if self.data is None:
            raise InputError(f"predictions={self.predictions}: say what they answer, such as data=rolecs")
        if len(self.evaluation.contexts) > 1:
            raise InputError(
                f"predictions={self.predictions}: say in which context they were made, such as "
                "evaluation.contexts=[reference]"
            )


@dataclass
class CompareRecipe:
    """Configuration of recipes/compare.py."""

    a: str = MISSING
    """Run directory of an evaluation."""
    b: str = MISSING
    """Run directory of another evaluation on the same dialogues, or the same one with another system."""
    system_a: str | None = None
    """The system of run A; defaults to the one that the run evaluated."""
    system_b: str | None = None
    """The system of run B; defaults to the one that the run evaluated."""
    permutations: int = 10000
    """Random exchanges of the two systems for each p-value of the permutation test."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """The metrics and their intervals."""
    plugins: list[str] = field(default_factory=list)
    """Python files, or modules on PYTHONPATH, that register metrics (docs/extending.md)."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        check_fields("", self, "permutations", low=1000)


@dataclass
class JudgeRecipe:
    """Configuration of recipes/judge.py."""

    a: str = MISSING
    """Run directory of an evaluation."""
    b: str | None = None
    """Run directory of another evaluation on the same dialogues, or the same one with another system; none for
    judge.tasks=[accepted]."""
    system_a: str | None = None
    """The system of run A; defaults to the one that the run evaluated."""
    system_b: str | None = None
    """The system of run B; defaults to the one that the run evaluated."""
    llm: LLMConfig = MISSING
    """The judge model."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The questions to the judge."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        comparing = set(self.judge.tasks) & set(COMPARING_TASKS)
        if comparing and self.b is None:
            raise InputError("b is required: give b=...")
        for name in ("b", "system_a", "system_b"):
            if not comparing and getattr(self, name) is not None:
                raise InputError(f"{name}: judge.tasks=[accepted] needs only the dialogues of a; leave it out")


@dataclass
class HumanEvalRecipe:
    """Configuration of recipes/human_eval.py."""

    action: str = MISSING
    """export: write an annotation form and its unblinding key. import: read the ratings."""
    inputs: list[str] = MISSING
    """For export: the run directories of two evaluations of the same dialogues. For import: the raters' files."""
    system_a: str | None = None
    """For export: the system of the first run; defaults to the one that the run evaluated."""
    system_b: str | None = None
    """For export: the system of the second run; defaults to the one that the run evaluated."""
    key: str | None = None
    """For import: the unblinding key."""
    judge: str | None = None
    """For import: a run directory of recipes/judge.py on the same systems, for the agreement with the raters."""
    human: HumanConfig = field(default_factory=HumanConfig)
    """The annotation form."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        check_fields("", self, "action", choices=("export", "import"))
        if self.action == "import":
            if self.key is None:
                raise InputError("key is required: give the key.json of the annotation form by key=...")
            if not self.inputs:
                raise InputError("inputs=[]: give the files that raters exported")
            for name in ("system_a", "system_b"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: the key knows the systems; leave it out")
            return
        if len(self.inputs) != 2:
            raise InputError(f"action=export: give two run directories, not {len(self.inputs)}")
        for name in ("key", "judge"):
            if getattr(self, name) is not None:
                raise InputError(f"{name}: only action=import takes it; leave it out")
