"""Bad input, generated: each ends in one line that names the place, or is right after all; never in a traceback.

Settings: values of every key of every recipe. Files: what is no file, and files with one thing wrong, for every reader.
"""

import copy
import functools
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import manifest_of, random_dialogue, sampled, small_tokenizer
from test_human_judges import drawn, rating_file

from csc_train.checkpoints.manifest import MANIFEST_FILE, read_manifest
from csc_train.config.cluster import ClusterConfig
from csc_train.config.compose import compose, from_container, to_container
from csc_train.config.explain import Setting, all_settings, settings_of
from csc_train.config.recipes import SCHEMAS, schema_of
from csc_train.data.readers import read_dialogues
from csc_train.errors import InputError
from csc_train.evaluation.judges.annotation_form import read_key
from csc_train.evaluation.judges.human_ratings import read_ratings
from csc_train.inference.predictions import Prediction, read_outcomes
from csc_train.llm.usage import USAGE_FILE, Usage, read_usage
from csc_train.runs.comparison import read_run
from csc_train.runs.directory import RECORD_FILE, read_run_record
from csc_train.suites.estimate import measure_cost
from csc_train.synthesis.csconv.build import BUNDLED_CALLS, read_calls
from csc_train.synthesis.rolecs.batch_api import read_batch_results
from csc_train.synthesis.rolecs.personas import read_profiles
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

COMPOSES = {
    "sft": ["experiment=demo"], "prepare": ["experiment=demo"], "preflight": ["experiment=demo"],
    "export": ["source=a", "output=b"], "evaluate": ["checkpoint=a"], "compare": ["a", "b"], "judge": ["a", "b"],
    "human_eval": ["export", "a", "b"], "chat": ["checkpoint=a"], "reproduce": ["suite=cpu_tiny"],
    "convert": ["from=csv", "input=x", "output=y.jsonl"],
}  # fmt: skip
"""Arguments without which a recipe does not compose."""
VALUES = ["", None, -1, 0, math.nan, math.inf, -math.inf, 10**12, 1.5, "x", True, [1], {"a": 1}]
TYPES = {"int": int, "float": int | float, "bool": bool, "str": str}
"""Of settings that hold one value, by the name of their type."""


# Settings


SECTIONS = list(
    dict.fromkeys(
        schema
        for recipe in SCHEMAS
        for schema in (
            schema_of(recipe),
            *(each.schema for each in all_settings(schema_of(recipe)) if each.schema and each.type[0].isupper()),
        )
    )
)
"""The schemas of all sections of all recipes, those of entries of lists aside."""


@functools.cache
def sections() -> dict[type, dict[str, Any]]:
    """Values that each schema accepts."""
    found: dict[type, dict[str, Any]] = {}
    for recipe in SCHEMAS:
        values = to_container(compose(recipe, COMPOSES.get(recipe, [])))
        found[schema_of(recipe)] = values
        for setting in all_settings(schema_of(recipe)):
            if setting.schema and setting.prefix == f"{setting.key}.":
                place: Any = values
                for name in setting.key.split("."):
                    place = place and place[name]
                if place:
                    found.setdefault(setting.schema, place)
    return found


def fits(setting: Setting, value: Any) -> bool:
    """Whether a value is of the setting's type, and a number where one is wanted."""
    wanted, _, optional = setting.type.partition(" | ")
    if value is None:
        return optional == "None"
    if wanted == "str":  # a number or truth value is read as text
        return not isinstance(value, list | dict)
    if wanted == "bool":  # a number other than 0 is true
        return isinstance(value, int)
    return isinstance(value, TYPES[wanted]) and not (isinstance(value, float) and not math.isfinite(value))


@pytest.mark.parametrize(
    "schema",
    sampled(sorted(SECTIONS, key=lambda schema: len([*settings_of(schema)])), 12),
    ids=lambda schema: schema.__name__,
)
def test_a_setting_of_another_type_or_size_is_named(schema):
    passed, unnamed = [], []
    for setting, value in itertools.product(settings_of(schema), VALUES):
        if setting.type.removesuffix(" | None") not in TYPES:
            continue
        try:
            from_container(schema, sections()[schema] | {setting.key: value})
            if not fits(setting, value):
                passed.append((setting.key, value))
        except InputError as error:
            if "\n" in str(error) or setting.key not in str(error):
                unnamed.append((setting.key, value, str(error)))
    assert (passed, unnamed) == ([], [])


def test_there_are_many():
    assert set(SECTIONS) == set(sections())
    tried = [setting for schema in sections() for setting in settings_of(schema)]
    assert len(tried) * len(VALUES) > 3000


# Files


@dataclass(frozen=True)
class Reader:
    """What reads a file.

    Attributes:
        name: of the file.
        rows: what a good file holds; of JSONL one row each, else a single value.
        read: reads the file in a directory.
    """

    name: str
    rows: list[Any]
    read: Callable[[Path], Any]


def _prediction(**facts: Any) -> Prediction:
    return Prediction("d", 0, "reference", "p", "[策略1 礼貌问候]您好", 1, "您好", 1, "您好", True, **facts)


@functools.cache
def readers() -> dict[str, Reader]:
    """Every reader of files that a user, another run or a server wrote."""
    dialogues = [random_dialogue(random.Random(seed)).row() for seed in range(2)]
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    key = drawn()[1]
    profile = {"gender": "女", "age": "30-39", "occupation": "教师", "personality": "急躁", "id": "p1"}
    answer = {"content": "您好", "role": "assistant"}
    batch = {
        "custom_id": "a", "error": None,
        "response": {"status_code": 200, "body": {
            "choices": [{"index": 0, "message": answer, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }},
    }  # fmt: skip
    run = {"recipe": "sft", "status": "finished", "finished": "2026-01-01T00:00:00+0000", "seconds": 9.5, "error": None}
    history = [
        {"step": step, "loss": 1.0, "trained_tokens_per_second": 9.0, "eval_loss": 1.0, "tokens_per_second": 20.0,
         "step_seconds": 2.0}
        for step in (1, 2)
    ]  # fmt: skip

    def read_a_run(place: Path) -> None:
        (place / "resolved.yaml").write_text("trainer: {learning_rate: 1.0}\n")
        read_run(place, read_run_record(place))
        measure_cost(place, "sft", ClusterConfig(device="cuda"))

    return {
        "dialogues": Reader("d.jsonl", dialogues, lambda place: read_dialogues(place / "d.jsonl", strict=True)),
        "calls": Reader(
            "c.jsonl", [json.loads(line) for line in BUNDLED_CALLS["zh"].read_text("utf-8").splitlines()[:2]],
            lambda place: read_calls(place / "c.jsonl"),
        ),
        "predictions": Reader(
            "p.jsonl", [asdict(_prediction(label_log_likelihoods=[-1.0] * 12, token_ids=[1, 2]))],
            lambda place: read_outcomes(place / "p.jsonl", "predict it again"),
        ),
        "profiles": Reader("profiles.jsonl", [profile], lambda place: read_profiles(place / "profiles.jsonl")),
        "batch": Reader("b.jsonl", [batch], lambda place: read_batch_results([place / "b.jsonl"])),
        "manifest": Reader(MANIFEST_FILE, [asdict(manifest_of(template))], read_manifest),
        "key": Reader("key.json", [key.model_dump()], lambda place: read_key(place / "key.json")),
        "ratings": Reader(
            "r.json", [rating_file(key, "Anna", "AB=")], lambda place: read_ratings([place / "r.json"], key)
        ),
        "run.json": Reader(RECORD_FILE, [run], read_a_run),
        "history": Reader("history.jsonl", history, read_a_run),
        "metrics": Reader("metrics.json", [{"log": history}], read_a_run),
        "usage": Reader(USAGE_FILE, [asdict(Usage(1, 0, 100, 20))], read_usage),
    }  # fmt: skip


READERS = (
    "dialogues", "calls", "predictions", "profiles", "batch", "manifest", "key", "ratings", "run.json", "history",
    "metrics", "usage",
)  # fmt: skip


def write(place: Path, reader: Reader, rows: list[Any]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (place / reader.name).write_text(content, encoding="utf-8")


def with_one_thing_wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """Each value with one field, at any depth, that is missing, another value or added."""
    fields = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in list(fields)[:12]:
        others = [*VALUES, "\x00", "\u200b", "a" * 10**5, {"b": [1]}]
        changes = [*((repr(other)[:20], other) for other in others), *with_one_thing_wrong(inner)]
        for what, other in changes:
            changed = copy.copy(value)
            changed[name] = other
            yield f"{name}: {what}", changed
        missing = copy.copy(value)
        del missing[name]
        yield f"{name}: missing", missing
    if isinstance(value, dict):
        yield "added", value | {"unknown": 1}
    if isinstance(value, list):
        yield "twice", [*value, *value]


def trouble(reader: Reader, place: Path) -> str | None:
    """What is wrong with the way in which a file is refused; None if it is read, or refused in one line."""
    try:
        reader.read(place)
    except InputError as error:
        if "\n" in str(error) or not str(error).startswith(str(place)) or len(str(error)) > 1000:
            return f"vague: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.mark.parametrize("name", sampled(READERS, 4))
def test_a_file_with_one_thing_wrong_is_read_or_refused_in_one_line(tmp_path, name):
    reader, troubles, tried = readers()[name], {}, 0
    write(tmp_path, reader, reader.rows)
    reader.read(tmp_path)
    for what, changed in with_one_thing_wrong(reader.rows[0]):
        tried += 1
        write(tmp_path, reader, [changed, *reader.rows[1:]])
        if found := trouble(reader, tmp_path):
            troubles[what] = found
    assert troubles == {}
    assert tried >= 40


def test_readers_are_all_tried():
    assert readers().keys() == set(READERS)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "null": lambda path: path.write_bytes(b"null\n"),
    "list": lambda path: path.write_bytes(b"[]\n"),
    "number": lambda path: path.write_bytes(b"1\n"),
    "text": lambda path: path.write_bytes(b"no JSON\n"),
    "NaN": lambda path: path.write_bytes(b"NaN\n"),
    "NULs": lambda path: path.write_bytes(bytes(1000)),
    "not UTF-8": lambda path: path.write_bytes(b'{"id": "\xff"}\n'),
    "deep": lambda path: path.write_bytes(b"[" * 10**5 + b"]" * 10**5),
    "long number": lambda path: path.write_bytes(b'{"id": ' + b"9" * 10**4 + b"}\n"),
}


@pytest.mark.parametrize(
    ("name", "kind"),  # dialogues are read from a pipe as they come
    [pair for pair in itertools.product(READERS, NO_FILES) if pair != ("dialogues", "pipe")],
)
def test_what_is_no_file_of_the_kind_is_refused_in_one_line(tmp_path, name, kind):
    reader = readers()[name]
    NO_FILES[kind](tmp_path / reader.name)
    assert trouble(reader, tmp_path) is None


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bytes_left", [1, 0.5, -2])
def test_a_file_that_is_cut_off_is_read_or_refused_in_one_line(tmp_path, name, bytes_left):
    reader = readers()[name]
    write(tmp_path, reader, reader.rows)
    content = (tmp_path / reader.name).read_bytes()
    left = int(bytes_left * len(content)) if bytes_left == 0.5 else bytes_left
    (tmp_path / reader.name).write_bytes(content[:left])
    assert trouble(reader, tmp_path) is None


def test_a_path_is_never_cut_and_a_text_in_its_place_is():
    path = "/".join(["folder"] * 500)
    assert str(InputError(f"{path}: no such file")) == f"{path}: no such file"
    assert str(InputError(f"unknown speaker ({'a' * 5000}")) == f"unknown speaker ({'a' * 199}..."
