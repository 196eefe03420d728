"""Likelihoods of general texts that a user names, before and after training: how much a model has forgotten."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from csc_train.data.dialogue import SURROGATE, has_surrogate
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.predictions import BASELINE_NAMES, PredictionStore, is_merged
from csc_train.invisible import is_blank
from csc_train.jsonl import CORRECT, read_jsonl
from csc_train.overrides import resume_hint
from csc_train.progress import ProgressBar

if TYPE_CHECKING:
    from accelerate import PartialState

    from csc_train.inference.hf import HFGenerator
    from csc_train.template.dialogue_template import DialogueTemplate


class _Message(pydantic.BaseModel, strict=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Row(pydantic.BaseModel, strict=True):
    text: str | None = None
    messages: list[_Message] | None = None


Content = str | list[dict[str, str]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class EncodedText:
    """The ids of a general text, the indices of those to score, from 1 on, and the SHA-256 (hex) of its content."""

    ids: Sequence[int]
    scored: Sequence[int]
    text_hash: str


Texts = Sequence[EncodedText]


@dataclass(frozen=True)
class TextScore:
    """The likelihood of a general text."""

    key: int
    """Its number among the texts of the file, from 0."""
    text_hash: str
    """See `EncodedText`."""
    nll: float
    """Negative log-likelihood in nats, summed over its scored tokens."""
    tokens: int
    """Those tokens; 0 for a text of one token, which nothing predicts."""
    config_hash: str
    """SHA-256 (hex) of the texts, and of all that decides their likelihoods."""


_SCORE = pydantic.TypeAdapter(TextScore)


def read_texts(path: str | None) -> list[tuple[str, Content]]:
    """Read a JSONL file of general texts: rows with a `text`, or with `messages` of a chat; none without a path.

    Returns:
        File and line of each, and its content.

    Raises:
        InputError: the file cannot be read or has no text, or a row is neither; names file, line and field.
    """
    if path is None:
        return []
    texts = [(f"{path}, line {line}", content) for line, content in read_jsonl(path, _parse)]
    if not texts:
        raise InputError(f"evaluation.general={path}: it holds no text: give it rows of text, or of messages")
    return texts


def _parse(row: dict[str, Any]) -> Content:
    found = _Row.model_validate(row)
    if (found.text is None) == (found.messages is None):
        raise ValueError(f"field text: {'missing' if found.text is None else 'beside messages'}: give one of the two")
    content = [each.model_dump() for each in found.messages or ()] if found.text is None else found.text
    chat = isinstance(content, list)
    if chat and not any(each["role"] == "assistant" for each in content):
        raise ValueError("field messages: none is of the assistant, and only those are scored")
    name, parts = ("messages", [each["content"] for each in content]) if chat else ("text", [content])
    if any(map(has_surrogate, parts)):
        raise ValueError(f"field {name}: {SURROGATE}")
    if all(map(is_blank, parts)):
        raise ValueError(f"field {name}: empty")
    return content


def encode_texts(texts: Iterable[tuple[str, Content]], template: "DialogueTemplate") -> list[EncodedText]:
    """The ids of texts, as the tokenizer begins and splits a text, and of chats (see `DialogueTemplate.encode_chat`).

    Of a text all tokens but the first are scored, of a chat those of the assistant.

    Raises:
        InputError: the chat template cannot render the messages; names file and line.
    """
    encoded = []
    for place, content in texts:
        try:
            whole = template.tokenizer.encode(content) if isinstance(content, str) else None
            ids, scored = (whole, range(1, len(whole))) if whole is not None else template.encode_chat(content)
        except ValueError as error:
            raise InputError(f"{place}: field messages: {error}: {CORRECT}") from error
        encoded.append(EncodedText(ids, scored, digest(content)))
    return encoded


def texts_hash(texts: Texts) -> str:
    """SHA-256 (hex) of the content of all texts."""
    return digest([text.text_hash for text in texts])


def scores_path(directory: str | os.PathLike, system: str) -> Path:
    """The file of a system's scores in a run directory."""
    return Path(directory) / "general" / f"{system}.jsonl"


def read_scores(path: Path, advice: str | None = None) -> list[TextScore]:
    """The scores in a file, none if it is not there; `advice` as of `predictions.read_outcomes`.

    Raises:
        InputError: the file cannot be read, or a line is no score.
    """
    rows = read_jsonl(path, _SCORE.validate_python, advice=advice, allow_torn=True) if path.exists() else ()
    return [score for _, score in rows]


def run_scores(directory: str | os.PathLike, system: str) -> list[TextScore]:
    """The scores of a system in a run directory; none if it has none.

    Raises:
        InputError: as `read_scores`; says how to score a text again.
    """
    return read_scores(
        scores_path(directory, system), f"delete the line; {resume_hint(directory)} scores its text again"
    )


def lacks_scores(directory: Path, system: str, texts: Texts) -> bool:
    """Whether a system that scores texts, as baselines do not, lacks the score of one."""
    if not texts or system in BASELINE_NAMES:
        return False
    path = scores_path(directory, system)
    return not is_merged(path) or {each.key for each in read_scores(path)} != {*range(len(texts))}


def score_texts(directory: Path, generator: "HFGenerator", texts: Texts, state: "PartialState", system: str) -> None:
    """Score the texts that a system lacks in a run directory; each process scores a share, and the main one joins them.

    Raises:
        InputError: the file has scores of other texts or settings, or cannot be written.
    """
    config_hash = digest([generator.config_hash, texts_hash(texts)])
    path = scores_path(directory, system)
    with PredictionStore(path, config_hash, state.process_index, read_scores) as store:
        keys = [key for key in range(state.process_index, len(texts), state.num_processes) if key not in store.earlier]
        own = [texts[key] for key in keys]
        found = generator.score_texts([(text.ids, text.scored) for text in own])
        label = {"desc": f"{system}, general texts", "unit": "text", "disable": not state.is_main_process}
        for number, nll in ProgressBar(found, total=len(own), **label):
            text = own[number]
            store.add(TextScore(keys[number], text.text_hash, nll, len(text.scored), config_hash))
    state.wait_for_everyone()
    if state.is_main_process:
        store.merge_rows(range(len(texts)))
    state.wait_for_everyone()
