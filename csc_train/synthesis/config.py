"""What a user may choose about the synthesis of dialogues."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_choice, check_range
from csc_train.llm.config import LLMConfig
from csc_train.synthesis.rolecs.engine import MOST_UTTERANCES
from csc_train.synthesis.rolecs.roles import LANGUAGES, LAYOUTS

BATCH_ROLES = ("persona", "planner", "rolecs_check", "rolecs_check_2", "rolecs_check_3")
"""The roles that nobody answers back to."""


@dataclass
class RoleConfig:
    """The model behind one role."""

    llm: LLMConfig | None = None
    """A model and server of its own, by +llm@synthesis.roles.<role>.llm=...; the recipe's llm where not given."""
    temperature: float | None = None
    """0.8 for whoever writes, 0 for judges, where neither this nor the llm's own is given."""
    max_tokens: int | None = None
    """The longest answer in tokens; that of the llm, else 1024, where not given."""

    def __post_init__(self):
        if self.temperature is not None:
            check_range("synthesis.roles: temperature", self.temperature, 0, 2)
        if self.max_tokens is not None:
            check_range("synthesis.roles: max_tokens", self.max_tokens, 1)


@dataclass
class RolesConfig:
    """The models behind the roles: the writer of personas, the five of the paper, the judges."""

    persona: RoleConfig = field(default_factory=RoleConfig)
    planner: RoleConfig = field(default_factory=RoleConfig)
    supporter_assistant: RoleConfig = field(default_factory=RoleConfig)
    supporter: RoleConfig = field(default_factory=RoleConfig)
    customer_assistant: RoleConfig = field(default_factory=RoleConfig)
    customer: RoleConfig = field(default_factory=RoleConfig)
    rolecs_check: RoleConfig = field(default_factory=RoleConfig)
    rolecs_check_2: RoleConfig = field(default_factory=RoleConfig)
    """The second judge of a panel (see `rolecs_check.judges`)."""
    rolecs_check_3: RoleConfig = field(default_factory=RoleConfig)


@dataclass
class BehaviourConfig:
    """How often a dialogue's customer is difficult, as shares of the dialogues (0..1). The paper has none of this."""

    short_patience: float = 0.25
    long_patience: float = 0.15
    at_once: float = 0.2
    """Tells everything at the start."""
    reluctant: float = 0.2
    """Wants to hear why a detail is needed before giving it."""
    misunderstands_once: float = 0.2
    misunderstands_often: float = 0.1
    unreasonable: float = 0.15
    """Asks for what the rules do not allow, and insists."""

    def __post_init__(self):
        for name, share in vars(self).items():
            check_range(f"synthesis.behaviour.{name}", share, 0, 1)
        for first, second in (
            ("short_patience", "long_patience"),
            ("at_once", "reluctant"),
            ("misunderstands_once", "misunderstands_often"),
        ):
            if getattr(self, first) + getattr(self, second) > 1:
                raise InputError(f"synthesis.behaviour.{first} and {second} are more than 1 together")


@dataclass
class PersonasConfig:
    """Who the customers are."""

    path: str | None = None
    """A JSONL of profiles, an object of plain values a line, with an optional `id`; made-up ones where not given."""
    count: int = 200
    """How many profiles are made up."""

    def __post_init__(self):
        check_range("synthesis.personas.count", self.count, 1)


@dataclass
class SynthesisConfig:
    """How dialogues are made; a change of any value makes other dialogues."""

    language: str = "zh"
    """Of prompts and dialogues: zh or en."""
    layout: str = "cache_friendly"
    """faithful: one message, fields in the paper's order. cache_friendly: the history last, for servers that keep
    prefixes."""
    compact: bool = False
    """Short prompts and answers, for small models."""
    max_utterances: int = MOST_UTTERANCES
    seed: int = 0
    attempts: int = 8
    """How many dialogues are tried for one place of the quotas before it stays empty."""
    topics: list[str] = field(default_factory=list)
    """The topics in the order in which they take turns; all seven where none is given."""
    moods: list[str] = field(default_factory=list)
    """The moods in the order in which they take turns, so one that is named twice comes twice as often; all five where
    none is given."""
    personas: PersonasConfig = field(default_factory=PersonasConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)

    def __post_init__(self):
        check_choice("synthesis.language", self.language, LANGUAGES)
        check_choice("synthesis.layout", self.layout, LAYOUTS)
        check_range("synthesis.max_utterances", self.max_utterances, 2, MOST_UTTERANCES)
        check_range("synthesis.seed", self.seed, 0, 2**32 - 1)
        check_range("synthesis.attempts", self.attempts, 1)


@dataclass
class BudgetConfig:
    """When to stop paying; failed attempts count, and so does what earlier starts of the same run spent."""

    tokens: int | None = None
    """Of prompts and answers together."""
    money: float | None = None
    """In the currency of the llm's prices."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None:
                check_range(f"budget.{name}", value, 0)


@dataclass
class BatchConfig:
    """Which roles are asked by batch files."""

    roles: list[str] = field(default_factory=list)
    """Of persona, planner, rolecs_check, rolecs_check_2, rolecs_check_3."""
    results: list[str] = field(default_factory=list)
    """Files of results, as the batch service returns them."""

    def __post_init__(self):
        for role in self.roles:
            check_choice("batch.roles", role, BATCH_ROLES)
