"""Who calls about what: profiles, quotas, and how difficult customers are."""

import itertools
import json
from collections import Counter

import pytest

from csc_train.data.sample_grammar import sample_grammar
from csc_train.errors import InputError
from csc_train.synthesis.config import BehaviourConfig
from csc_train.synthesis.rolecs.engine import Behaviour
from csc_train.synthesis.rolecs.personas import (
    MOODS,
    TOPICS,
    Profile,
    dialogue_attempt,
    draw_behaviour,
    generate_profiles,
    read_profiles,
    resolve_choices,
    scenario_quotas,
)  # fmt: skip


def test_profiles_are_made_up_the_same_each_time():
    for language in TOPICS:
        many = generate_profiles(50, 0, language)
        assert many[:20] == generate_profiles(20, 0, language)
        assert len({profile.id for profile in many}) == 50
        assert {profile.id for profile in many}.isdisjoint(profile.id for profile in generate_profiles(50, 1, language))


def test_the_grammar_knows_the_topics_and_moods():
    for language in TOPICS:
        grammar = sample_grammar(language)
        assert set(TOPICS[language]) == {problem.topic for problem in grammar.problems}
        assert list(MOODS[language]) == list(grammar.feelings)
        assert [len(TOPICS[language]), len(MOODS[language])] == [7, 5]


def test_profiles_are_read(tmp_path):
    path = tmp_path / "profiles.jsonl"
    rows = [{"id": "a", "年龄": 30, "爱好": ["茶", "棋"]}, {"年龄": 31}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = read_profiles(path)
    assert (first.id, first.values) == ("a", {"年龄": 30, "爱好": ["茶", "棋"]})
    assert len(second.id) == 12
    assert Profile("a", {"年龄": 30}).digest != Profile("a", {"年龄": 31}).digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"), ("[1]", "line 2: not a JSON object"),
        ('{"id": "b"}', "line 2: no values besides the id"),
        ('{"id": "a", "x": 1}', "line 2: id a stands in line 1 already"),
        ('{"x": {"y": 1}}', "line 2: field x: neither"),
        ('{"x": null}', "line 2: field x: neither"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_named(tmp_path, line, message):
    path = tmp_path / "profiles.jsonl"
    path.write_text('{"id": "a", "x": 1}\n' + line)
    with pytest.raises(InputError, match=message):
        read_profiles(path)


def test_no_profiles_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no profiles"):
        read_profiles(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        read_profiles(tmp_path / "none.jsonl")


def test_quotas_are_even_over_topics_moods_and_personas():
    people, topics, moods = [f"p{index}" for index in range(10)], TOPICS["zh"], MOODS["zh"]
    places = list(itertools.islice(scenario_quotas(people, topics, moods), 700))
    assert len(set(places)) == 700
    # The first round is every persona with every topic, once.
    assert len({(cell.persona, cell.topic) for cell in places[:70]}) == 70
    for count in (35, 70, 350, 700):
        for name in ("topic", "mood"):
            shares = Counter(getattr(cell, name) for cell in places[:count])
            assert max(shares.values()) - min(shares.values()) <= 1 + (name == "mood") * 2, (count, name, shares)
    # After as many rounds as there are moods, every combination is there as often.
    whole = Counter((cell.persona, cell.topic, cell.mood) for cell in places[:350])
    assert len(whole) == 350


def test_topics_and_moods_are_chosen_by_name():
    assert resolve_choices("synthesis.topics", [], TOPICS["en"]) == TOPICS["en"]
    assert resolve_choices("synthesis.moods", ["不满", "平静", "不满"], MOODS["zh"]) == ("不满", "平静", "不满")
    with pytest.raises(InputError, match=r"synthesis\.topics: 产品咨讯: not one of .* Did you mean '产品咨询'"):
        resolve_choices("synthesis.topics", ["产品咨讯"], TOPICS["zh"])
    places = itertools.islice(scenario_quotas(["p"], TOPICS["zh"], ("不满", "平静", "不满")), 63)
    assert Counter(cell.mood for cell in places) == {"不满": 42, "平静": 21}


def test_an_attempts_id_depends_on_its_content_and_not_on_its_position():
    profiles = generate_profiles(3, 0, "zh")
    named = {}
    for people in (profiles, profiles[::-1]):
        for place in itertools.islice(scenario_quotas([profile.id for profile in people], TOPICS["zh"], ("平静",)), 21):
            profile = next(profile for profile in profiles if profile.id == place.persona)
            unit = dialogue_attempt(place, profile, 0, 8, 0, "recipe")
            named.setdefault((place.persona, place.topic), set()).add(unit.id)
    assert len(named) == 21 and all(len(ids) == 1 for ids in named.values())
    place = next(scenario_quotas([profiles[0].id], TOPICS["zh"], ("平静",)))
    others = [
        dialogue_attempt(place, profiles[0], 1, 8, 0, "recipe"),
        dialogue_attempt(place, profiles[1], 0, 8, 0, "recipe"),
        dialogue_attempt(place, profiles[0], 0, 8, 1, "recipe"),
        dialogue_attempt(place, profiles[0], 0, 8, 0, "other"),
    ]
    assert len({dialogue_attempt(place, profiles[0], 0, 8, 0, "recipe").id, *(unit.id for unit in others)}) == 5


def test_replicates_of_rounds_do_not_meet():
    people = generate_profiles(1, 0, "zh")
    places = itertools.islice(scenario_quotas([people[0].id], ("产品咨询",), ("平静",)), 4)
    replicates = [
        dialogue_attempt(place, people[0], attempt, 8, 0, "r").replicate for place in places for attempt in range(8)
    ]
    assert replicates == list(range(32))


def test_behaviour_follows_its_shares():
    config = BehaviourConfig(short_patience=0.5, long_patience=0.0, unreasonable=1.0, at_once=0.0, reluctant=0.0)
    drawn = [draw_behaviour(config, str(index)) for index in range(2000)]
    assert drawn == [draw_behaviour(config, str(index)) for index in range(2000)]
    patience = Counter(each.patience for each in drawn)
    assert set(patience) == {"short", "ordinary"} and 900 < patience["short"] < 1100
    assert {each.demands for each in drawn} == {"unreasonable"} and {each.disclosure for each in drawn} == {
        "when_asked"
    }
    none = BehaviourConfig(0, 0, 0, 0, 0, 0, 0)
    assert draw_behaviour(none, "x") == Behaviour()


def test_shares_above_one_are_refused():
    with pytest.raises(InputError, match="short_patience and long_patience: must be at most 1"):
        BehaviourConfig(short_patience=0.7, long_patience=0.4)
    with pytest.raises(InputError, match="between 0 and 1"):
        BehaviourConfig(unreasonable=1.2)
