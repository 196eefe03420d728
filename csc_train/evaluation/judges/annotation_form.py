"""The annotation form: a blinded HTML page on which people compare two systems, and its unblinding key.

Replies are compared in reference context, in which both systems answer the same history. The form calls the replies 1
and 2; which system is reply 1 differs by item, and only the key tells.
"""

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import pydantic

from csc_train.data.dialogue import Dialogue
from csc_train.data.languages import get_language
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import HumanConfig
from csc_train.evaluation.judges.criteria import CRITERIA
from csc_train.evaluation.table import PredictionTable
from csc_train.files import digest, read_json
from csc_train.inference.predictions import Prediction
from csc_train.jsonl import to_line
from csc_train.templates import render

FORM_FILE, KEY_FILE = "form.html", "key.json"
OVERALL = "overall"
"""The first question, asked before the criteria."""


class StrictModel(pydantic.BaseModel):
    """A JSON file in which unknown fields and other types are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class AnnotationItem(StrictModel):
    """An item of the key: its turn, the system of reply 1, and characters of A's reply minus characters of B's."""

    item: str
    dialogue_id: str
    turn: int
    first: Literal["A", "B"]
    longer: int


class UnblindingKey(StrictModel):
    """The key that maps the replies of a form to systems.

    Attributes:
        form: id of the form, a hash of its content.
        a, b: the systems with their runs.
        questions: `OVERALL` and the criteria.
        turns: turns that both systems answered.
        differing: those of them with different replies.
        left_out: turns that only one of the systems answered.
        strategies: see `HumanConfig.show_strategies`.
    """

    form: str
    a: str
    b: str
    questions: list[str]
    turns: int
    differing: int
    strategies: str
    items: list[AnnotationItem]
    left_out: int = 0


def draw_annotation_form(
    sides: tuple[PredictionTable, PredictionTable],
    dialogues: Mapping[str, Dialogue],
    names: tuple[str, str],
    config: HumanConfig,
    left_out: int = 0,
) -> tuple[str, UnblindingKey]:
    """Draw the items and return the form, as an HTML page, and its key.

    The order of items and replies and the ids derive from the seed and all predictions of both systems. The same runs
    give the same form; the form does not reveal them.

    Args:
        sides: systems A and B on the same turns.
        dialogues: by id.
        names: the systems, for the key only.
        left_out: turns that only one of the systems has, for the key only.

    Raises:
        InputError: no replies differ, a dialogue is missing, or strategies are to be shown and a system has none.
    """
    pairs = list(zip(*(side.predictions for side in sides), strict=True))
    if config.show_strategies == "own":
        for side, name in zip(sides, names, strict=True):
            if not side.predicts_strategy:
                raise InputError(f"human.show_strategies=own: {name} predicts none: choose hidden or reference")
    language = config.language or "zh"
    differing = [
        index for index in sides[0].shuffled_indices(config.seed) if _differ(pairs[index][0], pairs[index][1], config)
    ]
    if not differing:
        raise InputError(f"{names[0]} and {names[1]}: all replies are equal: there is nothing to compare")
    chosen, taken = [], Counter()
    for index in differing:
        dialogue = pairs[index][0].dialogue_id
        if config.max_items_per_dialogue is None or taken[dialogue] < config.max_items_per_dialogue:
            taken[dialogue] += 1
            chosen.append(index)
    secret = digest([config.seed, [[to_line(asdict(each)) for each in pair] for pair in pairs]])
    rng = random.Random(secret)
    chosen = chosen[: config.num_items]
    rng.shuffle(chosen)
    shown, items = [], []
    for number, index in enumerate(chosen):
        a, b = pairs[index]
        if a.dialogue_id not in dialogues:
            raise InputError(f"dialogue {a.dialogue_id} is not among the run's dialogues")
        item, first = digest([secret, number])[:12], rng.choice("AB")
        ordered = (a, b) if first == "A" else (b, a)
        shown.append({"id": item, **_shown(dialogues[a.dialogue_id], ordered, config, language)})
        longer = len(a.response) - len(b.response)
        items.append(AnnotationItem(item=item, dialogue_id=a.dialogue_id, turn=a.turn, first=first, longer=longer))
    described = {name: CRITERIA[name][get_language(language).texts] for name in config.criteria}
    criteria = [{"id": name, "name": title, "definition": text} for name, (title, text) in described.items()]
    data = {"questions": [{"id": OVERALL}, *criteria], "items": shown}
    form = digest(data)[:16]
    values = {"language": get_language(language).texts, "spoken": language, "data": data | {"form": form}}
    page = render("csc_train.evaluation.report", "form.html.jinja", **values)
    key = UnblindingKey(
        form=form, a=names[0], b=names[1], questions=[OVERALL, *config.criteria], turns=len(pairs),
        differing=len(differing), strategies=config.show_strategies, items=items, left_out=left_out,
    )  # fmt: skip
    return page, key


def _differ(a: Prediction, b: Prediction, config: HumanConfig) -> bool:
    """Whether the form shows two different replies."""
    return a.response != b.response or (config.show_strategies == "own" and a.strategy != b.strategy)


def _shown(dialogue: Dialogue, replies: Sequence[Prediction], config: HumanConfig, language: str) -> dict[str, Any]:
    """An item of the form: its history as (whether the supporter speaks, text), and the replies."""

    def strategy(number: int | None, display: str) -> list[str] | None:
        """Name and definition of a strategy; None for none, and unless the form shows strategies in this way."""
        if not number or config.show_strategies != display:
            return None
        shown = STRATEGIES[number - 1]
        return [shown.name(language), shown.definition(language)]

    return {
        "history": [[each.strategy is not None, each.text] for each in dialogue.turns[: replies[0].turn]],
        "strategy": strategy(replies[0].reference_strategy, "reference"),
        "replies": [{"strategy": strategy(each.strategy, "own"), "text": each.response} for each in replies],
    }


def read_key(path: str | os.PathLike) -> UnblindingKey:
    """Read the unblinding key of a form.

    Raises:
        InputError: the file cannot be read or is not a key; names the field.
    """
    return read_strict_json(path, UnblindingKey, "the key of an annotation form")


Model = TypeVar("Model", bound=StrictModel)


def read_strict_json(path: str | os.PathLike, model: type[Model], what: str) -> Model:
    """Read a JSON file of a form.

    Args:
        what: what errors say they expected.

    Raises:
        InputError: the file cannot be read or has another structure; names item and field.
    """
    content = read_json(path)
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place: list[Any] = list(first["loc"])
        item = ""
        if place[:1] in (["ratings"], ["items"]) and len(place) > 1:
            entry = content[place[0]][place[1]]
            name = entry.get("item") if isinstance(entry, dict) else None
            item, place = f", item {name or f'number {place[1] + 1}'}", place[2:]
        field = f", field {'.'.join(map(str, place))}" if place else ""
        raise InputError(f"{path}{item}{field}: {first['msg']}: give {what}") from error
