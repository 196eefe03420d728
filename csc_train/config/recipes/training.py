"""Schemas of the recipes around a training: data, preparation, checks, launching, comparison."""

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from csc_train.config.cluster import ClusterConfig, OnFinishConfig, PreflightConfig, SweepConfig
from csc_train.config.suite import STEP_RECIPES, SuiteConfig
from csc_train.data.config import KINDS, DataConfig, DialogueSourceConfig
from csc_train.errors import InputError, check_fields
from csc_train.models.config import AdapterConfig, ModelConfig
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.runs.config import RunConfig
from csc_train.template.config import TemplateConfig, TokenizationConfig
from csc_train.tracking.config import TrackingConfig
from csc_train.training.config import AlertsConfig, TrainerConfig, ValidationConfig, ZeroConfig


@dataclass
class SftRecipe:
    """Configuration of recipes/sft.py."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training and evaluation dialogues."""
    # No default instance: placeholder values would leak into groups that do not set the field.
    model: ModelConfig = MISSING
    """The model to train: its directory or hub id, its tokenizer and its architecture."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The trained weights: all, LoRA or QLoRA."""
    template: TemplateConfig = field(default_factory=TemplateConfig)
    """The system prompt and the form of a reply."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """The packs: length, strategy, truncation."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The weights of the trained tokens."""
    tokenization: TokenizationConfig = field(default_factory=TokenizationConfig)
    """The cache of tokenized dialogues."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Optimizer, schedule, precision and checkpoints."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The evaluation during training."""
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    """What in the metrics raises an alert."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Sharding by DeepSpeed ZeRO."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Logging to Weights & Biases."""
    on_finish: OnFinishConfig = field(default_factory=OnFinishConfig)
    """The recipe to run after the training."""
    plugins: list[str] = field(default_factory=list)
    """Python files, or modules on PYTHONPATH, that register model families, loss weightings or launchers
    (docs/extending.md)."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        if self.validation.metric_for_best_model == "strategy_accuracy" and self.template.mode != "joint":
            raise InputError(
                "validation.metric_for_best_model=strategy_accuracy: the model chooses no strategy under "
                f"template.mode={self.template.mode}"
            )


@dataclass
class PrepareRecipe(SftRecipe):
    """Configuration of recipes/prepare.py: that of the training."""


@dataclass
class PreflightRecipe(SftRecipe):
    """Configuration of recipes/preflight.py: a training and the machines that it runs on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines of the job."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """The checks before the start."""


@dataclass
class InspectDataRecipe(SftRecipe):
    """Configuration of recipes/inspect_data.py: dialogues, and the training that they are for."""

    path: list[str] = field(default_factory=list)
    """The dialogues to look at: a file, folder, glob in quotes or hub data set, or a list of these in brackets;
    defaults to `data.train`, or to all sources of `data.mix`."""
    kind: str = "csc"
    """csc: dialogues with strategies. chat: ordinary chats, rows of `messages` without strategies. The sources
    of a mix have their own."""
    evaluation_path: str | None = None
    """The evaluation dialogues to search for; defaults to `data.evaluation.path`."""
    reference_path: str | None = None
    """Dialogues whose shares of strategies are shown for comparison, such as RoleCS."""
    reference_source: str | None = None
    """Take only the reference rows with this `source`; null takes all."""
    samples: int = 10
    """Dialogues to show token by token: the longest, the shortest, and others drawn by `data.seed`."""

    def __post_init__(self):
        super().__post_init__()
        check_fields("", self, "samples", low=0, high=100)
        check_fields("", self, "kind", choices=KINDS)
        if self.data.mix and not self.path:
            self.kind = "csc" if any(entry.kind == "csc" for entry in self.data.mix) else "chat"
        if self.kind == "chat" and self.reference_path is not None:
            raise InputError(f"reference_path={self.reference_path}: kind=chat has no strategies: leave it out")
        if self.path:
            train = DialogueSourceConfig(self.path[0], also=self.path[1:])
            evaluation = DialogueSourceConfig(self.evaluation_path)
            self.data = replace(self.data, train=train, evaluation=evaluation, mix=[], sample_dialogues=None)
        elif self.evaluation_path is not None:
            self.data = replace(self.data, evaluation=DialogueSourceConfig(self.evaluation_path))


@dataclass
class WriteSampleRecipe:
    """Configuration of recipes/write_sample.py."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training and evaluation dialogues."""


@dataclass
class CompareRunsRecipe:
    """Configuration of recipes/compare_runs.py."""

    folders: list[str] = field(default_factory=lambda: ["runs"])
    """Runs, or folders of runs; subfolders are included."""
    metric: str = "eval_loss"
    """The metric that orders the runs. Its curves are drawn beside the training loss."""
    direction: str = "minimize"
    """minimize: the smallest value comes first. maximize: the largest."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        check_fields("", self, "direction", choices=("minimize", "maximize"))


@dataclass
class CleanRecipe:
    """Configuration of recipes/clean.py."""

    directory: str | None = "runs"
    """Folder of the runs, with its subfolders; null cleans no runs."""
    cache_dir: str | None = TokenizationConfig.cache_dir
    """The cache of tokenized dialogues, as `tokenization.cache_dir` of the trainings; null leaves it."""
    older_than_days: float = 30.0
    """Only what nobody wrote to, and no training read from the cache, for so many days."""
    larger_than_gb: float = 0.0
    """Only what holds at least so many GB (10^9 bytes)."""
    unfinished: bool = False
    """Also runs that were stopped, failed or killed, which a resume could continue."""
    delete: bool = False
    """Delete it. Otherwise the table is printed and nothing else is done."""

    def __post_init__(self):
        check_fields("", self, "older_than_days", "larger_than_gb", low=0)


@dataclass
class LaunchRecipe:
    """Configuration of launch/launch.py; it passes all other settings to the recipe."""

    recipe: str = "sft"
    """The recipe to start: sft, evaluate or compare."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines of the job."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """The checks before the start of a training."""
    dry_run: bool = False
    """Print the job; start nothing and write nothing."""

    def __post_init__(self):
        check_fields("", self, "recipe", choices=STEP_RECIPES)


@dataclass
class SweepRecipe(LaunchRecipe):
    """Configuration of launch/sweep.py; it passes all other settings to the recipe."""

    recipe: str = "sft"
    """The recipe of the trials: sft, since only a training logs a metric."""
    sweep: SweepConfig = MISSING
    """The trials: what they vary and how they are judged."""

    def __post_init__(self):
        check_fields("", self, "recipe", choices=("sft",))


@dataclass
class ReproduceRecipe:
    """Configuration of launch/reproduce.py; `sft.KEY=VALUE` and `evaluate.KEY=VALUE` go to all steps of a recipe."""

    suite: SuiteConfig = MISSING
    """The steps, and the table that they fill."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines of the steps."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """The checks before a training starts, and what its estimates assume."""
    dry_run: bool = False
    """Print the plan; start nothing and write nothing."""
