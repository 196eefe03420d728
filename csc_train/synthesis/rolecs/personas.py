"""Who calls, about what and in which mood: profiles, the seven topics, and how difficult a dialogue's customer is."""

import functools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csc_train.errors import InputError, suggestion
from csc_train.files import digest, os_errors
from csc_train.synthesis.config import BehaviourConfig
from csc_train.synthesis.rolecs.engine import Behaviour
from csc_train.templates import read_yaml

_TABLES = read_yaml("csc_train.synthesis.rolecs", "personas.yaml")
TOPICS, MOODS = _TABLES["topics"], _TABLES["moods"]
"""By language."""


@dataclass(frozen=True)
class Profile:
    """A customer: an id and named plain values, in the order in which the prompt lists them."""

    id: str
    values: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of id and values, so that a profile that is changed is another one."""
        return digest([self.id, list(self.values.items())])


def make_profiles(count: int, seed: int, language: str) -> list[Profile]:
    """Make up `count` different profiles; a smaller number is the beginning of a larger one."""
    rng = random.Random(f"profiles:{seed}:{language}")
    profiles: dict[str, Profile] = {}
    while len(profiles) < count:
        values = {name: rng.choice(choices) for name, choices in _TABLES["profile_attributes"][language].items()}
        profile = _profile(values)
        profiles.setdefault(profile.id, profile)
    return list(profiles.values())


def read_profiles(path: str | os.PathLike) -> list[Profile]:
    """Read profiles from a JSONL: an object a line, its values texts, numbers, truth values or lists of these.

    `id` is optional; else a profile is named after its content.

    Raises:
        InputError: the file cannot be read, a line is no such object, or two have the same id; names file and line.
    """
    with os_errors(path, "cannot read"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    profiles: dict[str, Profile] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: broken JSON: {error}") from error
        if not isinstance(values, dict) or not values.keys() - {"id"}:
            raise InputError(f"{place}: not an object with values")
        if wrong := [name for name, value in values.items() if not _plain(value)]:
            raise InputError(f"{place}: {wrong[0]} is neither a text, a number, a truth value nor a list of these")
        profile = _profile(values)
        if profile.id in profiles:
            raise InputError(f"{place}: the id {profile.id!r} is used by an earlier line")
        profiles[profile.id] = profile
    if not profiles:
        raise InputError(f"{path}: no profiles")
    return list(profiles.values())


def _profile(values: dict[str, Any]) -> Profile:
    rest = {name: value for name, value in values.items() if name != "id"}
    return Profile(str(values["id"]) if "id" in values else digest(rest)[:12], rest)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_plain(item) and not isinstance(item, list) for item in value)
    return isinstance(value, str | int | float | bool)


def chosen(key: str, names: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The `names` that the configuration's `key` gives, or all that are known.

    Raises:
        InputError: a name is not known.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{key}: {name}: not one of {', '.join(known)}.{suggestion(name, known)}")
    return tuple(names) or known


def draw_behaviour(config: BehaviourConfig, seed: str) -> Behaviour:
    """How the customer of the dialogue that `seed` names behaves."""
    rng = random.Random(f"behaviour:{seed}")

    def draw(default: str, *shares: tuple[str, float]) -> str:
        place = rng.random()
        for name, share in shares:
            place -= share
            if place < 0:
                return name
        return default

    return Behaviour(
        patience=draw("ordinary", ("short", config.short_patience), ("long", config.long_patience)),
        disclosure=draw("when_asked", ("at_once", config.at_once), ("reluctant", config.reluctant)),
        misunderstanding=draw("none", ("once", config.misunderstands_once), ("often", config.misunderstands_often)),
        demands=draw("reasonable", ("unreasonable", config.unreasonable)),
    )


@dataclass(frozen=True)
class QuotaSlot:
    """One place of the quotas: whom, about what, in which mood; `round` counts how often the pair was there before."""

    persona: str
    topic: str
    mood: str
    round: int


@dataclass(frozen=True)
class DialogueSlot:
    """A dialogue to be: the `attempt`-th try at a place of the quotas.

    Attributes:
        id: a hash of persona, topic, mood, replicate, seed and recipe, never of a place in a list.
        replicate: tells the dialogues of one persona and topic apart.
    """

    id: str
    persona: str
    topic: str
    mood: str
    replicate: int


def dialogue_slot(
    cell: QuotaSlot, profile: Profile, attempt: int, attempts: int, seed: int, recipe: str
) -> DialogueSlot:
    """The `attempt`-th try, of `attempts`, at a cell under a recipe (its hash); `profile` is the cell's persona."""
    replicate = cell.round * attempts + attempt
    name = digest([profile.digest, cell.topic, cell.mood, replicate, seed, recipe])[:16]
    return DialogueSlot(name, cell.persona, cell.topic, cell.mood, replicate)


def quota_slots(personas: list[str], topics: tuple[str, ...], moods: tuple[str, ...]) -> Iterator[QuotaSlot]:
    """The places of the quotas without end, in the order in which they are filled.

    Every persona meets every topic before any does so again, and the mood changes each time, so the beginning of
    whatever length is as even over topics, moods and personas as its length allows.
    """
    number = 0
    while True:
        rest, topic = divmod(number, len(topics))
        round_, persona = divmod(rest, len(personas))
        mood = moods[(topic + persona + round_) % len(moods)]
        yield QuotaSlot(personas[persona], topics[topic], mood, round_)
        number += 1
