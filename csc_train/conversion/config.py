"""Settings of recipes/convert.py."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from csc_train.data.config import KINDS, LANGUAGE_CODES, check_encoding
from csc_train.errors import InputError, check_fields
from csc_train.llm.config import LLMConfig

SUFFIXES = (".jsonl", ".parquet")
FORMAT_NAMES = ["sharegpt", "openai", "esconv", "abcd", "csv"]
"""Names of the known formats; `formats.dialogue_format` adds others."""


@dataclass
class CsvColumns:
    """The columns of a CSV file, one row a turn."""

    id: str = "dialogue_id"
    """Names the dialogue; the rows of one dialogue keep their order."""
    speaker: str = "speaker"
    """Who speaks."""
    text: str = "text"
    """What is said."""
    strategy: str = "strategy"
    """The label; the file may lack this column."""


@dataclass
class ConvertConfig:
    """What recipes/convert.py converts, and how."""

    format: str = MISSING
    """Shape of the input: sharegpt, openai, esconv, abcd, csv, or one of a plugin. `from=NAME` says the same."""
    input: list[str] = MISSING
    """A file, a folder, a glob in quotes, or the id of a Hugging Face data set; or a list of these in brackets."""
    output: str = MISSING
    """The file to write: `.jsonl` or `.parquet`. Beside it are the records left out, `_NAME.rejected.jsonl`, and the
    counts, `_NAME.report.json`."""
    if_exists: str = "error"
    """What to do if `output` exists. error: stop. replace: convert again."""
    kind: str = "csc"
    """csc: dialogues with strategies. chat: ordinary chats, rows of `messages` without strategies."""
    source: str | None = None
    """The `source` of the rows; defaults to the name of the format."""
    strategies: str | None = None
    """YAML table of labels to our strategies; defaults to that of the format, which esconv and abcd have."""
    label: str = "given"
    """Where strategies come from. given: a field of the turn, else brackets at the start of its text. llm: predicted by
    `llm` for every supporter turn. fill: given ones stay, the others are predicted."""
    unlabelled: str | None = None
    """The strategy of a supporter turn without a label that the table knows; null leaves the dialogue out."""
    label_sample: str | None = None
    """With label=llm or fill: a file of hand-labelled dialogues, which the model labels too; prints the agreement."""
    language: str = "en"
    """Language of the names and definitions of strategies that the model reads."""
    speakers: dict[str, str] = field(default_factory=dict)
    """Further names of speakers, such as `+speakers.Anna=supporter`: supporter, customer, system or drop."""
    columns: CsvColumns = field(default_factory=CsvColumns)
    """The columns of a CSV file."""
    encoding: str | None = None
    """Python's name of the encoding of JSON, JSONL and CSV files, such as gb18030 or utf-16; null is UTF-8."""
    llm: LLMConfig | None = None
    """The model that labels; mock: a rule by position and question marks."""
    seed: int = 0
    """Seed of the model's sampling."""
    plugins: list[str] = field(default_factory=list)
    """Python files, or modules on PYTHONPATH, that register formats (docs/extending.md)."""

    def __post_init__(self):
        check_fields("", self, "format", choices=FORMAT_NAMES)
        check_fields("", self, "if_exists", choices=("error", "replace"))
        check_fields("", self, "kind", choices=KINDS)
        check_fields("", self, "label", choices=("given", "llm", "fill"))
        check_fields("", self, "language", choices=LANGUAGE_CODES)
        check_fields("", self, "speakers", choices=("supporter", "customer", "system", "drop"))
        check_fields("", self, "seed", low=0, high=2**32 - 1)
        check_encoding("encoding", self.encoding)
        if not self.input:
            raise InputError("input=[]: give a file, or several in brackets")
        if not self.output.endswith(SUFFIXES):
            raise InputError(f"output={self.output}: cannot write this file type: use .jsonl or .parquet")
        predicted = self.label != "given"
        if predicted and self.kind == "chat":
            raise InputError(f"label={self.label}: kind=chat has no labels: leave it out")
        if predicted != (self.llm is not None):
            raise InputError(
                f"label={self.label}: name the model by llm=..., such as llm=vllm"
                if predicted
                else "llm: label=given asks no model: leave it out, or say label=llm"
            )
        if self.label_sample is not None and not predicted:
            raise InputError(f"label_sample={self.label_sample}: say label=llm or label=fill")
