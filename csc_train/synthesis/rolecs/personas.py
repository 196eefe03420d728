"""The customers: profiles, topics, moods, behaviour, and the quotas of their combinations."""

import functools
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csc_train.errors import InputError, suggestion
from csc_train.files import digest
from csc_train.jsonl import read_jsonl
from csc_train.synthesis.config import BehaviourConfig
from csc_train.synthesis.rolecs.engine import Behaviour
from csc_train.templates import read_yaml

_TABLES = read_yaml("csc_train.synthesis.rolecs", "personas.yaml")
TOPICS, MOODS = _TABLES["topics"], _TABLES["moods"]
"""By language."""


@dataclass(frozen=True)
class Profile:
    """The profile of a customer: an id, and named plain values in the order of the prompt."""

    id: str
    values: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of id and values."""
        return digest([self.id, list(self.values.items())])


def generate_profiles(count: int, seed: int, language: str) -> list[Profile]:
    """Generate `count` distinct profiles; fewer profiles are a prefix of more."""
    rng = random.Random(f"profiles:{seed}:{language}")
    profiles: dict[str, Profile] = {}
    while len(profiles) < count:
        values = {name: rng.choice(choices) for name, choices in _TABLES["profile_attributes"][language].items()}
        profile = _profile(values)
        profiles.setdefault(profile.id, profile)
    return list(profiles.values())


def read_profiles(path: str | os.PathLike) -> list[Profile]:
    """Read profiles from a JSONL: one object per line, its values texts, numbers, booleans or lists of these.

    `id` is optional and defaults to a hash of the values.

    Raises:
        InputError: the file cannot be read, a line is no such object, or an id is used twice; names file and line.
    """

    def parse(values: dict[str, Any]) -> Profile:
        if not values.keys() - {"id"}:
            raise ValueError("no values besides the id")
        if wrong := [name for name, value in values.items() if not _plain(value)]:
            raise ValueError(f"field {wrong[0]}: neither a text, a number, a boolean nor a list of these")
        return _profile(values)

    profiles = [profile for _, profile in read_jsonl(path, parse, key=lambda profile: f"id {profile.id}")]
    if not profiles:
        raise InputError(f"{path}: no profiles")
    return profiles


def _profile(values: dict[str, Any]) -> Profile:
    rest = {name: value for name, value in values.items() if name != "id"}
    return Profile(str(values["id"]) if "id" in values else digest(rest)[:12], rest)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_plain(item) and not isinstance(item, list) for item in value)
    return isinstance(value, str | int | float | bool)


def resolve_choices(key: str, names: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The `names` of the configuration's `key`; defaults to all known ones.

    Raises:
        InputError: a name is unknown.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{key}: {name}: not one of {', '.join(known)}.{suggestion(name, known)}")
    return tuple(names) or known


def draw_behaviour(config: BehaviourConfig, seed: str) -> Behaviour:
    """The behaviour of a dialogue's customer, drawn from `seed`, the dialogue's id."""
    rng = random.Random(f"behaviour:{seed}")

    def draw(otherwise: str, **shares: float) -> str:
        return rng.choices([*shares, otherwise], [*shares.values(), 1 - sum(shares.values())])[0]

    return Behaviour(
        patience=draw("ordinary", short=config.short_patience, long=config.long_patience),
        disclosure=draw("when_asked", at_once=config.at_once, reluctant=config.reluctant),
        misunderstanding=draw("none", once=config.misunderstands_once, often=config.misunderstands_often),
        demands=draw("reasonable", unreasonable=config.unreasonable),
    )


@dataclass(frozen=True)
class ScenarioQuota:
    """A slot of the quotas; `round` is the number of earlier slots with this persona and topic."""

    persona: str
    topic: str
    mood: str
    round: int


@dataclass(frozen=True)
class DialogueAttempt:
    """A dialogue to generate: one attempt at a quota slot.

    Attributes:
        id: a hash of persona, topic, mood, replicate, seed and settings, independent of the position in a list.
        replicate: distinguishes the dialogues of one persona and topic.
    """

    id: str
    persona: str
    topic: str
    mood: str
    replicate: int


def dialogue_attempt(
    quota: ScenarioQuota, profile: Profile, attempt: int, attempts: int, seed: int, settings_hash: str
) -> DialogueAttempt:
    """The attempt number `attempt`, of `attempts`, at a quota slot; `profile` is the slot's persona."""
    replicate = quota.round * attempts + attempt
    name = digest([profile.digest, quota.topic, quota.mood, replicate, seed, settings_hash])[:16]
    return DialogueAttempt(name, quota.persona, quota.topic, quota.mood, replicate)


def scenario_quotas(personas: list[str], topics: tuple[str, ...], moods: tuple[str, ...]) -> Iterator[ScenarioQuota]:
    """An endless sequence of quota slots, in the order of filling.

    Every persona meets every topic once per round, and the mood changes each time. So every prefix is as even over
    topics, moods and personas as its length allows.
    """
    for number in itertools.count():
        rest, topic = divmod(number, len(topics))
        round_, persona = divmod(rest, len(personas))
        mood = moods[(topic + persona + round_) % len(moods)]
        yield ScenarioQuota(personas[persona], topics[topic], mood, round_)
