"""Settings of the synthesis: RoleCS dialogues by roles, CSConv dialogues from recorded calls, and their filters."""

from dataclasses import dataclass, field

from csc_train.errors import InputError, check_fields, check_order
from csc_train.llm.config import LLMConfig

LANGUAGES = ("zh", "en")
PROMPT_LAYOUTS = ("faithful", "cache_friendly")
MAX_UTTERANCES = 50
"""Utterances of the longest dialogue."""
NUM_STRATEGIES = 12
CRITERIA = ("strategy_followed", "unreasonable_requests", "natural", "varied", "roles_kept")
"""The criteria by which judges check a RoleCS dialogue, one point each."""
BATCH_ROLES = ("persona", "planner", "rolecs_check", "rolecs_check_2", "rolecs_check_3")
"""Roles whose answers no other role of the same conversation waits for."""


@dataclass
class RoleConfig:
    """The model behind one role."""

    llm: LLMConfig | None = None
    """Model and server of this role (+llm@synthesis.roles.<role>.llm=...); defaults to the recipe's llm."""
    temperature: float | None = None
    """Sampling temperature; defaults to the llm's, else 0.8 for writers and 0 for judges."""
    max_tokens: int | None = None
    """Longest answer in tokens; defaults to the llm's, else 1024."""

    def __post_init__(self):
        check_fields("synthesis.roles: ", self, "temperature", low=0, high=2)
        check_fields("synthesis.roles: ", self, "max_tokens", low=1)


@dataclass
class RolesConfig:
    """The models behind the roles: the persona writer, the five roles of the paper, the judges."""

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
    """Shares (0..1) of the customers by behaviour. The paper has no such settings."""

    short_patience: float = 0.25
    """Share of customers who grow angry when kept waiting or asked again, and may hang up."""
    long_patience: float = 0.15
    """Share of customers who are very patient and take the time to explain."""
    at_once: float = 0.2
    """Share of customers who tell everything at the start."""
    reluctant: float = 0.2
    """Share of customers who ask why a detail is needed before they give it."""
    misunderstands_once: float = 0.2
    """Share of customers who misunderstand the supporter once."""
    misunderstands_often: float = 0.1
    """Share of customers who often misunderstand the supporter."""
    unreasonable: float = 0.15
    """Share of customers who insist on something that the rules do not allow."""

    def __post_init__(self):
        check_fields("synthesis.behaviour.", self, *vars(self), low=0, high=1)
        for first, second in (
            ("short_patience", "long_patience"),
            ("at_once", "reluctant"),
            ("misunderstands_once", "misunderstands_often"),
        ):
            if getattr(self, first) + getattr(self, second) > 1:
                raise InputError(f"synthesis.behaviour.{first} and {second}: must be at most 1 together")


@dataclass
class PersonasConfig:
    """The profiles of the customers."""

    path: str | None = None
    """A JSONL of profiles: one object of plain values per line, with an optional `id`. Defaults to generated ones."""
    count: int = 200
    """Number of generated profiles."""

    def __post_init__(self):
        check_fields("synthesis.personas.", self, "count", low=1)


@dataclass
class SynthesisConfig:
    """How dialogues are generated; a change of any value gives other dialogues."""

    language: str = "zh"
    """Language of prompts and dialogues: zh or en."""
    layout: str = "cache_friendly"
    """faithful: one message, fields in the paper's order. cache_friendly: the history comes last, for servers with a
    prefix cache."""
    compact: bool = False
    """Short prompts and answers, for small models."""
    max_utterances: int = MAX_UTTERANCES
    """Most utterances of a dialogue."""
    seed: int = 0
    """Seed of the scenarios."""
    attempts: int = 8
    """Most dialogues to try for a quota slot before it stays empty."""
    topics: list[str] = field(default_factory=list)
    """Topics, assigned to dialogues in this order; defaults to all seven."""
    moods: list[str] = field(default_factory=list)
    """Moods, assigned to dialogues in this order; repeat one to make it more frequent. Defaults to all five."""
    personas: PersonasConfig = field(default_factory=PersonasConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)

    def __post_init__(self):
        check_fields("synthesis.", self, "language", choices=LANGUAGES)
        check_fields("synthesis.", self, "layout", choices=PROMPT_LAYOUTS)
        check_fields("synthesis.", self, "max_utterances", low=2, high=MAX_UTTERANCES)
        check_fields("synthesis.", self, "seed", low=0, high=2**32 - 1)
        check_fields("synthesis.", self, "attempts", low=1)


@dataclass
class BudgetConfig:
    """Limits of what a run may use; failed attempts and earlier starts of the same run count."""

    tokens: int | None = None
    """Most tokens of prompts and answers together; null sets no limit."""
    money: float | None = None
    """Highest cost, in the currency of the llm's prices; null sets no limit."""

    def __post_init__(self):
        check_fields("budget.", self, *vars(self), low=0)


@dataclass
class BatchConfig:
    """Roles that are answered by batch files."""

    roles: list[str] = field(default_factory=list)
    """Roles that are answered through batch files instead of single requests."""
    results: list[str] = field(default_factory=list)
    """Result files of the batch service, to read before the run continues."""

    def __post_init__(self):
        check_fields("batch.", self, "roles", choices=BATCH_ROLES)


@dataclass
class RoleCSCheckConfig:
    """How judges check RoleCS dialogues."""

    points: int = 5
    """Fewest points, of 5, with which a dialogue is kept."""
    judges: int = 1
    """Number of judges; a criterion's point is given by a majority. The second and third judge are the roles
    `rolecs_check_2` and `rolecs_check_3`, so each may be another model."""

    def __post_init__(self):
        check_fields("rolecs_check.", self, "points", low=0, high=len(CRITERIA))
        check_fields("rolecs_check.", self, "judges", low=1)


@dataclass
class CallFilterConfig:
    """Which recorded calls are kept."""

    min_rounds: int = 3
    """Fewest rounds of a call; a round is one turn of each speaker."""
    max_rounds: int = 30
    """Most rounds of a call."""
    max_characters: int = 500
    """Most characters of a turn."""
    customer_share: float = 0.5
    """Keep a call only if its customer turns exceed this share of its supporter turns."""
    short_characters: int = 3
    """Most characters of a short turn, for `long_share`."""
    long_share: float = 0.7
    """Smallest share of customer turns that are longer than `short_characters`."""

    def __post_init__(self):
        check_fields("call.", self, "min_rounds", "max_characters", low=1)
        check_order("call.", self, "min_rounds", "max_rounds")
        check_fields("call.", self, "customer_share", "short_characters", low=0)
        check_fields("call.", self, "long_share", low=0, high=1)


@dataclass
class RewriteFilterConfig:
    """Which rewritten calls are kept."""

    min_utterances: int = 10
    """Fewest utterances of a rewritten call."""
    max_utterances: int = MAX_UTTERANCES
    """Most utterances of a rewritten call."""
    required_strategies: list[int] = field(default_factory=lambda: [1, 2, 11])
    """Numbers of the strategies that a rewritten call must contain."""

    def __post_init__(self):
        check_fields("rewrite.", self, "min_utterances", low=1)
        check_order("rewrite.", self, "min_utterances", "max_utterances")
        check_fields("rewrite.", self, "required_strategies", low=1, high=NUM_STRATEGIES)


@dataclass
class DuplicatesConfig:
    """Jaccard similarity of character 5-grams from which a dialogue repeats an earlier one; null skips the check."""

    dialogue: float | None = 0.8
    """Jaccard similarity of all turns from which a dialogue is a duplicate; null skips the check."""
    opening: float | None = 0.9
    """The same for the first two turns of each speaker."""
    scenario: float | None = 0.8
    """The same for the scenarios, if dialogues have one."""

    def __post_init__(self):
        for name, threshold in vars(self).items():
            if threshold is not None and not 0 < threshold <= 1:
                raise InputError(f"duplicates.{name}={threshold}: must be above 0 and at most 1, or null")
