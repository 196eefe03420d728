"""Composed, typed configuration: a schema per recipe, made of its owners' schemas, and errors with a remedy."""

import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from csc_train.chat.config import ChatConfig
from csc_train.checkpoints.config import ExportConfig
from csc_train.config.cluster import ClusterConfig, OnFinishConfig, PreflightConfig, SweepConfig
from csc_train.data.config import DataConfig, DialogueSourceConfig
from csc_train.errors import InputError, check_choice, check_range, suggestion
from csc_train.evaluation.config import EvaluationConfig, HumanConfig, JudgeConfig, MetricsConfig
from csc_train.llm.config import LLMConfig
from csc_train.models.config import AdapterConfig, ModelConfig
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.runs.config import RESOLVED_FILE, RunConfig
from csc_train.runs.directory import mark_failed
from csc_train.runs.distributed import exit_with_launcher, record_failure
from csc_train.synthesis.config import (
    BatchConfig,
    BudgetConfig,
    CallConfig,
    DuplicatesConfig,
    RewriteConfig,
    RoleCSCheckConfig,
    SynthesisConfig,
)
from csc_train.template.config import LANGUAGES, TemplateConfig, TokenizationConfig
from csc_train.tracking.config import TrackingConfig
from csc_train.training.config import TrainerConfig, ValidationConfig, ZeroConfig

CONF = Path(__file__).parent.parent.parent / "conf"
RECORDED = ("run", "resume", "from")
"""Keys that ask for the configuration that an earlier run recorded (see `compose`)."""
POSITIONAL = {
    "compare": ("a", "b"),
    "judge": ("a", "b"),
    "human_eval": ("action", "inputs*"),
    "compare_runs": ("folder",),
}
"""Keys that a recipe's leading arguments stand for where they are bare words; one with a star takes all that follow."""


@dataclass
class SftRecipe:
    """Configuration of recipes/sft.py."""

    data: DataConfig = field(default_factory=DataConfig)
    # No instance here: what it was given to pass its own checks would stay where a file of the group is silent.
    model: ModelConfig = MISSING
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tokenization: TokenizationConfig = field(default_factory=TokenizationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    on_finish: OnFinishConfig = field(default_factory=OnFinishConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        if self.validation.metric_for_best_model == "strategy_accuracy" and self.template.mode != "joint":
            raise InputError(
                "validation.metric_for_best_model=strategy_accuracy: the model chooses no strategy under "
                f"template.mode={self.template.mode}"
            )


@dataclass
class PrepareRecipe(SftRecipe):
    """Configuration of recipes/prepare.py: that of the training it prepares."""


@dataclass
class PreflightRecipe(SftRecipe):
    """Configuration of recipes/preflight.py: a training, and the machines it is meant for."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)


@dataclass
class EvaluateRecipe:
    """Configuration of recipes/evaluate.py."""

    checkpoint: str | None = None
    """The checkpoint directory to evaluate."""
    predictions: str | None = None
    """Instead of a checkpoint: a JSONL of replies made elsewhere, each with its dialogue_id, turn and text."""
    score_only: bool = False
    """With run=DIR: score that run's predictions again, without a model."""
    data: DataConfig | None = None
    """The dialogues; those that the checkpoint's run held out where not given."""
    llm: LLMConfig | None = None
    """A model on a server: the checkpoint's where one is given, else one that is asked in words."""
    template: TemplateConfig | None = None
    """How a model that is asked in words is asked: joint and Chinese where not given; a checkpoint knows."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        if self.predictions is None:
            if self.checkpoint is None and self.llm is None:
                raise InputError("checkpoint is required: give checkpoint=...")
            if self.checkpoint is None and self.data is None:
                raise InputError("llm: say on which dialogues to evaluate it, such as data=rolecs")
            if self.checkpoint is not None and self.template is not None:
                raise InputError(f"template: {self.checkpoint} knows its own; leave it out")
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
    """The system of run A; the one that it evaluated where not given."""
    system_b: str | None = None
    """The system of run B; as `system_a`."""
    permutations: int = 10000
    """Random exchanges of the two systems for each p-value."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        check_range("permutations", self.permutations, 1000)


@dataclass
class JudgeRecipe:
    """Configuration of recipes/judge.py."""

    a: str = MISSING
    """Run directory of an evaluation."""
    b: str = MISSING
    """Run directory of another evaluation on the same dialogues, or the same one with another system."""
    system_a: str | None = None
    """The system of run A; the one that it evaluated where not given."""
    system_b: str | None = None
    """The system of run B; as `system_a`."""
    llm: LLMConfig = MISSING
    """The judge."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class HumanEvalRecipe:
    """Configuration of recipes/human_eval.py."""

    action: str = MISSING
    """export: write a sheet and its key. import: read the answers."""
    inputs: list[str] = MISSING
    """export: the run directories of two evaluations of the same dialogues. import: the files that raters exported."""
    system_a: str | None = None
    """For export: the system of the first run; the one that it evaluated where not given."""
    system_b: str | None = None
    """For export: the system of the second run; as `system_a`."""
    key: str | None = None
    """For import: the key of the sheet."""
    judge: str | None = None
    """For import: a run directory of recipes/judge.py on the same systems, to see how far it agrees with people."""
    human: HumanConfig = field(default_factory=HumanConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        check_choice("action", self.action, ("export", "import"))
        if self.action == "import":
            if self.key is None:
                raise InputError("key is required: give the key.json of the sheet by key=...")
            if not self.inputs:
                raise InputError("import takes the files that raters exported")
            for name in ("system_a", "system_b"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: the key knows the systems; leave it out")
            return
        if len(self.inputs) != 2:
            raise InputError(f"export takes two run directories, not {len(self.inputs)}")
        for name in ("key", "judge"):
            if getattr(self, name) is not None:
                raise InputError(f"{name}: export takes none, import does")


@dataclass
class SynthesizeRolecsRecipe:
    """Configuration of recipes/synthesize_rolecs.py."""

    target: int = 2000
    """How many accepted dialogues there are to be."""
    new_run: bool = False
    """Begin anew where the run directory holds another recipe's dialogues; those are kept, and not written out."""
    dry_run: bool = False
    """Print how many calls and tokens it would take, ask nothing and write nothing."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    rolecs_check: RoleCSCheckConfig = field(default_factory=RoleCSCheckConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    reference: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """Dialogues to put beside these in the report, such as CSConv."""
    llm: LLMConfig = MISSING
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        check_range("target", self.target, 1)
        if self.batch.roles and self.llm.backend == "mock":
            raise InputError("batch.roles: llm=mock answers at once; choose a model on a server")
        check_range("rolecs_check.judges", self.rolecs_check.judges, 1, 3)  # synthesis.roles has as many


@dataclass
class WriteSampleRecipe:
    """Configuration of recipes/write_sample.py."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class BuildCsconvRecipe:
    """Configuration of recipes/build_csconv.py."""

    calls: str | None = None
    """The recorded calls, a JSONL of `{"id", "turns": [{"speaker", "text"}]}`; a handful of made-up ones where not
    given."""
    language: str = "zh"
    """Language of the calls and of the prompts: zh or en."""
    seed: int = 0
    """Of the model's sampling, and of the samples that the report is made from."""
    call: CallConfig = field(default_factory=CallConfig)
    rewrite: RewriteConfig = field(default_factory=RewriteConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    reference: DialogueSourceConfig = field(default_factory=DialogueSourceConfig)
    """Dialogues to put beside these in the report."""
    llm: LLMConfig = MISSING
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        check_choice("language", self.language, LANGUAGES)
        check_range("seed", self.seed, 0, 2**32 - 1)


@dataclass
class LaunchRecipe:
    """Configuration of launch/launch.py; whatever else it is given is the recipe's."""

    recipe: str = "sft"
    """The recipe to start."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    dry_run: bool = False
    """Print what would be started, start nothing and write nothing."""

    def __post_init__(self):
        check_choice("recipe", self.recipe, ("sft",))  # the others are one process


@dataclass
class SweepRecipe(LaunchRecipe):
    """Configuration of launch/sweep.py; whatever else it is given is the recipe's."""

    sweep: SweepConfig = MISSING


@dataclass
class CompareRunsRecipe:
    """Configuration of recipes/compare_runs.py."""

    folder: str = "runs"
    """Whose runs are compared, those in its subfolders included."""
    metric: str = "eval_loss"
    """The figure by which they are ordered and whose curves are drawn beside the training loss's."""
    direction: str = "minimize"
    """Whether the least or the greatest of it comes first: minimize or maximize."""
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        check_choice("direction", self.direction, ("minimize", "maximize"))


SCHEMAS = {
    "sft": SftRecipe,
    "prepare": PrepareRecipe,
    "preflight": PreflightRecipe,
    "export": ExportConfig,
    "evaluate": EvaluateRecipe,
    "compare": CompareRecipe,
    "judge": JudgeRecipe,
    "human_eval": HumanEvalRecipe,
    "chat": ChatConfig,
    "write_sample": WriteSampleRecipe,
    "build_csconv": BuildCsconvRecipe,
    "synthesize_rolecs": SynthesizeRolecsRecipe,
    "launch": LaunchRecipe,
    "sweep": SweepRecipe,
    "compare_runs": CompareRunsRecipe,
}


def compose(recipe: str, overrides: list[str]) -> Any:
    """The configuration of a recipe as an instance of its schema, every value checked.

    Args:
        recipe: a key of `SCHEMAS`; `conf/<recipe>.yaml` is its root.
        overrides: Hydra overrides, such as `trainer.epochs=1` or `model=qwen2_5_7b`. With `from=DIR` among them they
            change single values of the configuration that the run in DIR recorded; its directory is left to be named
            anew. `run=DIR resume=true`, and nothing else, is that configuration itself, to go on with the run in DIR.
            `run=DIR score_only=true` is the recorded configuration of an evaluation, and may change single values.

    Raises:
        InputError: an unknown key or group option (with the nearest known one), a wrong type, a value out of range,
            or a required value that is missing.
    """
    overrides = _named(recipe, overrides)
    _check_overrides(overrides)
    recorded = {key: text for text in overrides if (key := text.split("=")[0]) in RECORDED}
    values = [text for text in overrides if text not in recorded.values()]
    score_only = recipe == "evaluate" and "score_only=true" in map(str.lower, values)
    if score_only and recorded.keys() == {"run"}:
        directory = recorded["run"].split("=", 1)[1]
        return compose_recorded(recipe, Path(directory) / RESOLVED_FILE, [*values, f"run.directory={directory}"])
    if score_only:
        raise InputError("score_only=true: say which run's predictions to score, by run=DIR")
    if "run" in recorded or "resume" in recorded:
        directory = _resumed_directory(recorded, values)
        config = compose_recorded(recipe, directory / RESOLVED_FILE, [])
        config.run = RunConfig(str(directory), "resume")
        return config
    if "from" in recorded:
        unnamed = ["run.directory=null", "run.if_exists=error"]
        return compose_recorded(recipe, Path(recorded["from"].split("=", 1)[1]) / RESOLVED_FILE, unnamed + values)
    if recipe == "evaluate":
        _check_data_group(overrides)
    return _compose(recipe, CONF, recipe, overrides)


def compose_recorded(recipe: str, file: Path, values: list[str]) -> Any:
    """The configuration that a file holds in full, such as a run directory's `to_container.yaml`, with other `values`.

    Raises:
        InputError: there is no such file, it is not `recipe`'s, or what `compose` refuses.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} holds no {file.name}: not the directory of a run")
    for text in values:
        if _options(text.split("=")[0]):
            raise InputError(f"{text}: the configuration of {file.parent} is made; only single values can be changed")
    return _compose(recipe, file.parent.resolve(), file.stem, values)


def _resumed_directory(recorded: dict[str, str], values: list[str]) -> Path:
    """DIR of `run=DIR resume=true`."""
    if "run" not in recorded:
        raise InputError(f"{recorded['resume']}: say which run to go on with, by run=DIR")
    if recorded.get("resume", "").lower() != "resume=true":
        raise InputError(f"{recorded['run']}: add resume=true to go on with it, or start a new run by from=DIR")
    if others := [*values, *filter(None, [recorded.get("from")])]:
        raise InputError(f"{others[0]}: a run goes on as it began; for a new run with other values use from=DIR")
    return Path(recorded["run"].split("=", 1)[1])


def _compose(recipe: str, folder: Path, root: str, overrides: list[str]) -> Any:
    """What Hydra makes of the file `root` of a folder, as an instance of the recipe's schema."""
    _register_schemas()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra.compose(root, overrides, return_hydra_config=True)
        with open_dict(composed):
            chosen = composed.pop("hydra").runtime.choices
        # Hydra lets `+group.nope=1` through; merging into the bare schema does not.
        plain = OmegaConf.create(OmegaConf.to_container(composed))
        typed = OmegaConf.merge(OmegaConf.structured(SCHEMAS[recipe]), plain)
        missing = sorted(OmegaConf.missing_keys(typed)) or list(_unfilled(typed, chosen))
        if missing:
            raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
        return OmegaConf.to_object(typed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, recipe)) from error


def recorded_data_config(config: dict[str, Any]) -> DataConfig:
    """The `data` section of a resolved configuration, such as a checkpoint's manifest holds."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config["data"]))


def _named(recipe: str, overrides: list[str]) -> list[str]:
    """The overrides with leading bare words given the keys that they stand for."""
    bare = list(itertools.takewhile(lambda text: "=" not in text, overrides))
    named, taken = [], 0
    for key in POSITIONAL.get(recipe, ())[: len(bare)]:
        rest = bare[taken:]
        words = rest if key.endswith("*") else rest[:1]
        value = f"[{','.join(map(_quoted, words))}]" if key.endswith("*") else words[0]
        named.append(f"{key.removesuffix('*')}={value}")
        taken += len(words)
    return named + overrides[taken:]


def _quoted(text: str) -> str:
    """A text as Hydra reads it whatever it holds, such as the name of a file."""
    return "'" + text.replace("'", "\\'") + "'"


def _check_overrides(overrides: list[str]) -> None:
    """Refuse what Hydra refuses without naming it."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise InputError(f"{text}: not of the form key=value ({str(error).splitlines()[0]})") from error
        group = override.key_or_group
        if override.value() is None and not override.is_delete() and _options(group):
            raise InputError(f"{text}: choose one of {', '.join(_options(group))}, or leave it out")


def _check_data_group(overrides: list[str]) -> None:
    """The data of an evaluation are the checkpoint's until a group is chosen, so there is nothing to change in them."""
    keys = [text.split("=")[0] for text in overrides]
    changed = [key for key in keys if key.startswith("data.")]
    if changed and "data" not in keys:
        raise InputError(f"{changed[0]}: choose a group of conf/data with it, such as data=files")


def _unfilled(config: DictConfig, chosen: dict[str, str | None]) -> Iterator[str]:
    """Keys that a chosen file of conf/ marks `???` and nobody filled in: merging keeps the schema's null there."""
    for group, option in chosen.items():
        file = CONF / group / f"{option}.yaml"
        if group in config and file.is_file():
            marked = _marked(OmegaConf.to_container(OmegaConf.load(file)), f"{group}.")
            yield from (key for key in marked if OmegaConf.select(config, key) is None)


def _marked(node: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _marked(value, f"{prefix}{key}.")
        elif value == MISSING:
            yield prefix + key


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _register_schemas() -> None:
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def to_container(config: Any) -> dict[str, Any]:
    """A configuration as plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)


class _StdoutHandler(logging.Handler):
    """Prints the log records of the main process, and those of another one that ask for it by `any_rank`."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" or getattr(record, "any_rank", False):
            print(self.format(record), flush=True)


def log_to_stdout() -> None:
    """Print the package's log records, once a process calls this."""
    logger = logging.getLogger("csc_train")
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.setLevel(logging.INFO)
        logger.addHandler(_StdoutHandler())


def run_recipe(recipe: str, main: Callable[[Any], None]) -> None:
    """Run a recipe's `main` on the configuration that the command line asks for.

    Flags that only show something (`--help`, `--cfg job`, `--info`) are Hydra's own. An InputError is printed as one
    line, with exit status 2; an interrupt (Ctrl-C) ends with status 130.
    """
    exit_with_launcher()
    log_to_stdout()
    arguments = sys.argv[1:]
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("-")}
    try:
        if flags - {"--help", "-h", "--hydra-help", "--cfg", "-c", "--package", "-p", "--resolve", "--info", "-i"}:
            raise InputError(f"{min(flags)}: the flags are --help, --cfg and --info; everything else is key=value")
        if flags:
            _register_schemas()
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=recipe)(lambda _: None)()
        else:
            # It warns on import about a kernel that only 4-bit inference on a CPU would use.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            main(compose(recipe, arguments))
    except InputError as error:
        mark_failed(error)
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        else:  # most often it would only repeat that; where it does not, torchrun's report says it
            record_failure(error)
        sys.exit(2)
    except KeyboardInterrupt as error:
        mark_failed(error)
        sys.exit(130)
    except Exception as error:
        mark_failed(error)
        record_failure(error)
        raise
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            distributed.destroy_process_group()


def _explain(error: Exception, recipe: str) -> str:
    """One line that says which key is wrong, and which known one is nearest."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(part) for part in chain)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        options = _options(group)
        return f"{group}={option}: not in conf/{group}.{suggestion(option, options)} Known: {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text):
        full = re.search(r"full_key: (\S+)", text)
        key = match.group(1) if "." in match.group(1) or not full else full.group(1)
        if "not in" in text:
            return f"unknown key {key!r} for recipe {recipe}.{suggestion(key, known_keys(recipe))}"
    # A value of a mapping is known to OmegaConf by its last key alone; the override tells the whole one.
    full = re.search(r"Error merging override [+]*([^=\s]+)=", text) or re.search(r"full_key: (\S+)", text)
    reasons = [line for line in str(chain[-1]).strip().splitlines() if "raised while composing config" not in line]
    place = re.search(r"In '([^']+)': \w+ raised while composing config", text)
    source = f"conf/{place.group(1)}.yaml: " if place else ""
    return source + (f"{full.group(1)}: {reasons[0]}" if full else reasons[0])


def known_keys(recipe: str) -> Iterator[str]:
    """Every key of a recipe's schema with its path, and the groups of conf/."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield prefix + key
            child = node._get_node(key)
            if isinstance(child, DictConfig) and child._is_missing():
                child = OmegaConf.structured(child._metadata.ref_type)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{key}.")

    yield from walk(OmegaConf.structured(SCHEMAS[recipe]), "")
    yield from (path.name for path in CONF.iterdir() if path.is_dir())
