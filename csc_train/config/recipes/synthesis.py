"""Schemas of the recipes that make dialogues."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from csc_train.data.config import DialogueSourceConfig, check_encoding
from csc_train.errors import InputError, check_fields, check_range
from csc_train.llm.config import LLMConfig
from csc_train.runs.config import RunConfig
from csc_train.synthesis.config import (
    LANGUAGES,
    BatchConfig,
    BudgetConfig,
    CallFilterConfig,
    DuplicatesConfig,
    RewriteFilterConfig,
    RoleCSCheckConfig,
    SynthesisConfig,
)


@dataclass
class BuildCsconvRecipe:
    """Configuration of recipes/build_csconv.py."""

    calls: str | None = None
    """The recorded calls, a JSONL file of `{"id", "turns": [{"speaker", "text"}]}`; defaults to a few made-up calls."""
    max_rejected: float = 0.1
    """Greatest share of bad rows of the calls; above it nothing is built. 1 takes any call that is left."""
    encoding: str | None = None
    """Python's name of the encoding of the calls, such as gb18030 or utf-16; null is UTF-8."""
    language: str = "zh"
    """Language of the calls and of the prompts."""
    seed: int = 0
    """Seed of the model's sampling and of the report's samples."""
    call: CallFilterConfig = field(default_factory=CallFilterConfig)
    """The filter of recorded calls."""
    rewrite: RewriteFilterConfig = field(default_factory=RewriteFilterConfig)
    """The filter of rewritten calls."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """The filter of near-duplicates."""
    reference: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """Dialogues to compare with in the report."""
    llm: LLMConfig = MISSING
    """The model on a server; mock: a built-in one."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        check_fields("", self, "language", choices=LANGUAGES)
        check_fields("", self, "seed", low=0, high=2**32 - 1)
        check_fields("", self, "max_rejected", low=0, high=1)
        check_encoding("encoding", self.encoding)


@dataclass
class SynthesizeRolecsRecipe:
    """Configuration of recipes/synthesize_rolecs.py."""

    target: int = 2000
    """Number of accepted dialogues."""
    new_run: bool = False
    """Start a new run if the run directory holds dialogues of other settings. Those stay in the database."""
    dry_run: bool = False
    """Print an estimate of calls and tokens; call no model and write nothing."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """Roles, personas, topics and quotas."""
    rolecs_check: RoleCSCheckConfig = field(default_factory=RoleCSCheckConfig)
    """The filter by judge models."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """The filter of near-duplicates."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """The limits of tokens and cost."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The roles that use a batch API."""
    reference: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """Dialogues to compare with in the report, such as CSConv."""
    llm: LLMConfig = MISSING
    """The model on a server; mock: a built-in one."""
    run: RunConfig = field(default_factory=RunConfig)
    """The run directory."""

    def __post_init__(self):
        check_fields("", self, "target", low=1)
        if self.batch.roles and self.llm.backend == "mock":
            raise InputError("batch.roles: llm=mock answers at once; choose a model on a server")
        check_range("rolecs_check.judges", self.rolecs_check.judges, 1, 3)  # synthesis.roles has three judges
