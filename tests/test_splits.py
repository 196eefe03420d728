"""Splits that stay put, overlaps that are found, and the two of them together as a run loads them."""

import random
import re

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csc_train.data.config import DataConfig, DialogueSourceConfig
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.overlap import NGRAM, Overlap, best_overlaps, find_overlaps, find_shared_text
from csc_train.data.readers import write_dialogues
from csc_train.data.splits import read_and_check_splits, read_splits, split
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError


def make_dialogue(name, seed, turns=8, length=20):
    """A dialogue of random characters: two of different seeds have hardly a 5-gram in common."""
    random_ = random.Random(seed)
    texts = ["".join(chr(random_.randrange(0x4E00, 0x5200)) for _ in range(length)) for _ in range(turns)]
    return from_texts(name, texts)


def from_texts(name, texts, first_strategy=0):
    return Dialogue(
        name,
        tuple(
            Turn(Speaker.CUSTOMER, text) if place % 2 else Turn(Speaker.SUPPORTER, text, STRATEGIES[first_strategy])
            for place, text in enumerate(texts)
        ),
    )


def edited(dialogue, name, turns):
    """The dialogue with its last `turns` texts replaced."""
    texts = [turn.text for turn in dialogue.turns]
    return from_texts(name, texts[: len(texts) - turns] + [f"{name}改过的第{i}句" for i in range(turns)])


def jaccard(one, other):
    """The similarity, worked out the long way."""
    sets = []
    for dialogue in (one, other):
        text = "\n".join(turn.text for turn in dialogue.turns)
        sets.append({text[i : i + 5] for i in range(len(text) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


MANY = [make_dialogue(f"d{i}", i, turns=2) for i in range(2000)]


def ids(dialogues):
    return [dialogue.id for dialogue in dialogues]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_the_fraction_is_kept_and_every_dialogue_is_on_one_side(fraction):
    kept, set_aside = split(MANY, fraction, seed=0)
    # Four standard deviations of a binomial.
    assert abs(len(set_aside) / 2000 - fraction) < 4 * (fraction * (1 - fraction) / 2000) ** 0.5
    assert sorted(ids(kept) + ids(set_aside)) == sorted(ids(MANY))
    chosen = set(ids(set_aside))
    assert ids(set_aside) == [d.id for d in MANY if d.id in chosen]
    assert ids(kept) == [d.id for d in MANY if d.id not in chosen]


def test_no_fraction_and_all_of_it():
    assert split(MANY[:50], 0.0, seed=0) == (MANY[:50], [])
    assert split(MANY[:50], 1.0, seed=0) == ([], MANY[:50])


def test_sides_do_not_change_when_rows_are_reordered_added_or_removed():
    sides = {d.id: 0 for d in MANY} | {d.id: 1 for d in split(MANY, 0.3, seed=5)[1]}
    shuffled = random.Random(0).sample(MANY, 700) + [make_dialogue(f"new{i}", 10_000 + i) for i in range(300)]
    for side, dialogues in enumerate(split(shuffled, 0.3, seed=5)):
        assert all(sides.get(dialogue.id, side) == side for dialogue in dialogues)
    larger = set(ids(split(MANY, 0.4, seed=5)[1]))
    assert larger > {name for name, side in sides.items() if side}


def test_equal_dialogues_are_never_separated():
    copies = [Dialogue(f"copy of {d.id}", d.turns, "other") for d in MANY[:300]]
    kept, set_aside = split(MANY[:300] + copies, 0.5, seed=1)
    for side in (kept, set_aside):
        assert len(side) == 2 * len({dialogue.fingerprint for dialogue in side}) > 0


def test_seeds_draw_independently():
    first, second = (set(ids(split(MANY, 0.5, seed)[1])) for seed in (0, 1))
    # About a quarter of the dialogues is in both.
    assert 400 < len(first & second) < 600


def test_overlaps_are_found_and_unrelated_dialogues_are_not():
    train = [make_dialogue(f"t{i}", i, turns=20) for i in range(60)]
    texts = [turn.text for turn in train[4].turns]
    evaluation = [
        make_dialogue("unrelated", 1000),
        Dialogue("copy", train[3].turns),
        from_texts("other strategies", texts, first_strategy=5),
        edited(train[5], "one turn edited", 1),
        edited(train[6], "half edited", 10),
    ]
    exact, relabelled, near = best_overlaps(find_overlaps(train, evaluation))
    assert exact == Overlap("t3", "copy", "exact", 1.0)
    assert relabelled == Overlap("t4", "other strategies", "exact", 1.0)
    assert (near.train_id, near.evaluation_id, near.kind) == ("t5", "one turn edited", "near")
    assert near.similarity == jaccard(train[5], evaluation[3]) > 0.8
    assert jaccard(train[6], evaluation[4]) < 0.8


def test_near_duplicates_at_the_threshold_are_not_missed_and_none_is_reported_wrongly():
    train, evaluation, expected = [], [], set()
    for i in range(200):
        original = make_dialogue(f"t{i}", i, turns=24, length=6)
        variant = edited(original, f"e{i}", i % 6)
        train.append(original)
        evaluation.append(variant)
        if jaccard(original, variant) >= 0.7:
            expected.add((f"t{i}", f"e{i}"))
    assert 50 < len(expected) < 200
    found = {
        (overlap.train_id, overlap.evaluation_id)
        for overlap in best_overlaps(find_overlaps(train, evaluation, 0.7, seed=3))
    }
    assert found <= expected
    assert len(found) >= 0.97 * len(expected)


def test_an_evaluation_dialogue_reports_its_best_match():
    base = make_dialogue("base", 0, turns=20)
    train = [edited(base, "far", 2), edited(base, "close", 1), base, Dialogue("second copy", base.turns)]
    assert best_overlaps(find_overlaps(train, [Dialogue("e", base.turns)])) == [Overlap("base", "e", "exact", 1.0)]
    (best,) = best_overlaps(find_overlaps(train[:2], [base]))
    assert best.train_id == "close" and best.kind == "near"


def test_texts_shorter_than_a_shingle_and_empty_sets():
    short = from_texts("s", ["好"])
    assert best_overlaps(find_overlaps([short], [from_texts("e", ["好"])])) == [Overlap("s", "e", "exact", 1.0)]
    assert best_overlaps(find_overlaps([short], [from_texts("e", ["行"])])) == []
    assert best_overlaps(find_overlaps([], [short])) == best_overlaps(find_overlaps([short], [])) == []


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.95, 1.0])
def test_equal_texts_are_found_at_any_threshold(threshold):
    train = [make_dialogue(f"t{i}", i) for i in range(5)]
    assert Overlap("t2", "e", "exact", 1.0) in best_overlaps(
        find_overlaps(train, [Dialogue("e", train[2].turns)], threshold)
    )


def containment(train, evaluation):
    """The share of n-grams, worked out the long way for texts without white space or placeholders."""
    grams = [
        {turn.text[i : i + NGRAM] for turn in dialogue.turns for i in range(len(turn.text) - NGRAM + 1)}
        for dialogue in (train, evaluation)
    ]
    return len(grams[0] & grams[1]) / len(grams[1])


def test_shared_text_is_found_whatever_else_a_training_dialogue_says():
    train = [make_dialogue(f"t{i}", i, turns=8) for i in range(300)]  # more than are compared at a time
    evaluation = [make_dialogue(f"e{i}", 1000 + i, turns=8) for i in range(300)]
    own = [turn.text for turn in evaluation[270].turns]
    train[5] = from_texts("longer", [turn.text for turn in train[5].turns] * 3 + own[:6])
    train[7] = from_texts("shorter", own[:5])
    evaluation[280] = from_texts("no n-gram", ["您好", "好的"])
    assert best_overlaps(find_overlaps(train, evaluation)) == []
    assert find_shared_text(train, evaluation) == [Overlap("longer", "e270", "shared", 0.75)]
    assert containment(train[5], evaluation[270]) == 0.75
    assert find_shared_text(train, evaluation, threshold=0.76) == []
    assert find_shared_text(train[:5] + train[7:], evaluation)[0] == Overlap("shorter", "e270", "shared", 0.625)
    assert find_shared_text([], evaluation) == find_shared_text(train, []) == []
    assert find_shared_text([from_texts("t", ["您好"])], [from_texts("e", ["您好"])]) == []


def test_shared_text_is_within_turns_and_blind_to_white_space_and_to_what_a_placeholder_stands_for():
    text = "您的手机[手机号码]尾号已经为您登记好了请放心使用我们的服务谢谢您的来电"  # 31 characters, so 19 n-grams
    masked = text.replace("[手机号码]", "[电话]").replace("尾", "尾 ")
    spoken = text.replace("[手机号码]", "一三八")  # the 26 characters after it remain, with 14 n-grams
    parted = [text[:19], text[19:]]  # 14 and 17 characters, with 2 and 5 n-grams
    for texts, share in (([masked], 1), ([spoken], 14 / 19), (parted, 7 / 19)):
        found = find_shared_text([from_texts("t", texts)], [from_texts("e", [text])], threshold=0.1)
        assert found == [Overlap("t", "e", "shared", pytest.approx(share))]


@pytest.fixture
def files(tmp_path):
    """A training file of 40 and an evaluation file of 4: e0 is t0 and t2, and nearly t3; e1 is nearly t1."""
    train = [make_dialogue(f"t{i}", i, turns=20) for i in range(40)]
    train[2], train[3] = Dialogue("t2", train[0].turns), edited(train[0], "t3", 1)
    evaluation = [Dialogue("e0", train[0].turns), edited(train[1], "e1", 1)]
    evaluation += [make_dialogue(f"e{i}", 100 + i, turns=20) for i in (2, 3)]
    write_dialogues(tmp_path / "train.jsonl", train)
    write_dialogues(tmp_path / "evaluation.parquet", evaluation)
    return {
        "train": DialogueSourceConfig(str(tmp_path / "train.jsonl")),
        "evaluation": DialogueSourceConfig(str(tmp_path / "evaluation.parquet")),
    }


def test_warn_keeps_everything_and_says_so(files, said):
    splits = read_and_check_splits(DataConfig(**files))
    assert (len(splits.train), len(splits.evaluation)) == (40, 4)
    assert [(o.train_id, o.evaluation_id, o.kind) for o in splits.overlaps] == [
        ("t0", "e0", "exact"),
        ("t1", "e1", "near"),
    ]
    (line,) = said
    assert "40 training and 4 evaluation dialogues" in line
    assert "2 evaluation dialogues are also in the training data (1 exact, 1 near at 0.8); kept" in line


def test_drop_removes_every_training_dialogue_that_gives_an_evaluation_dialogue_away(files, said):
    splits = read_and_check_splits(DataConfig(**files, on_overlap="drop"))
    assert ids(splits.train) == [f"t{i}" for i in range(4, 40)]
    assert ids(splits.evaluation) == ["e0", "e1", "e2", "e3"]
    assert len(splits.overlaps) == 2 and best_overlaps(find_overlaps(splits.train, splits.evaluation)) == []
    assert len(said) == 1 and "4 training dialogues dropped" in said[0]


def test_error_names_the_first_pair(files):
    with pytest.raises(InputError, match=r"on_overlap=error: 2 .*\(1 exact, 1 near .*training t0 ~ evaluation e0"):
        read_and_check_splits(DataConfig(**files, on_overlap="error"))


def test_error_passes_disjoint_sets(files, said):
    config = DataConfig(
        train=files["train"], on_overlap="error", evaluation_fraction=0.2, seed=1, overlap_threshold=1.0
    )
    splits = read_and_check_splits(config)
    assert splits.overlaps == [] and len(splits.train) + len(splits.evaluation) == 40
    assert "0 evaluation dialogues are also in the training data" in said[0]


def test_dropping_everything_is_an_error(files):
    config = DataConfig(train=files["train"], evaluation=files["train"], on_overlap="drop")
    with pytest.raises(InputError, match=r"data\.on_overlap=drop leaves no train dialogue"):
        read_and_check_splits(config)


def test_without_an_evaluation_file_the_split_is_that_of_the_training_file(tmp_path, said):
    for name, dialogues in {"a.jsonl": MANY[:300], "b.parquet": MANY[299::-1]}.items():
        path = tmp_path / name
        write_dialogues(path, dialogues)
        splits = read_and_check_splits(DataConfig(DialogueSourceConfig(str(path)), evaluation_fraction=0.3, seed=4))
        kept, set_aside = split(dialogues, 0.3, seed=4)
        assert (splits.train, splits.evaluation) == (kept, set_aside)
        assert set(ids(set_aside)) == set(ids(split(MANY, 0.3, seed=4)[1])) & set(ids(dialogues))


@pytest.mark.slow
def test_the_validation_set_is_drawn_only_from_the_training_set_and_independently(tmp_path, said):
    path = tmp_path / "a.jsonl"
    write_dialogues(path, MANY)

    def read(**settings):
        return read_splits(DataConfig(DialogueSourceConfig(str(path)), seed=4, **settings))

    without, with_it = read(evaluation_fraction=0.3), read(evaluation_fraction=0.3, validation_fraction=0.3)
    assert (without.validation, without.validation_dialogues) == ([], without.evaluation)
    assert with_it.evaluation == without.evaluation and with_it.validation_dialogues == with_it.validation
    assert sorted(ids(with_it.train) + ids(with_it.validation)) == sorted(ids(without.train))
    # By the number that held dialogues out, none of what is left is below 0.3, and nothing would be set aside.
    assert 0.2 < len(with_it.validation) / len(without.train) < 0.4
    more = read(evaluation_fraction=0.3, validation_fraction=0.5)
    assert set(ids(with_it.validation)) < set(ids(more.validation))
    assert read_and_check_splits(DataConfig(DialogueSourceConfig(str(path)), validation_fraction=0.3)).validation
    assert re.search(r"data: \d+ training, \d+ validation and \d+ evaluation dialogues;", said[-1])


def test_drop_removes_what_gives_an_evaluation_dialogue_away_from_the_validation_set_too(files):
    both = [
        read_and_check_splits(DataConfig(**files, validation_fraction=0.5, on_overlap=do)) for do in ("warn", "drop")
    ]
    kept, dropped = ([set(ids(each.train)), set(ids(each.validation))] for each in both)
    flagged = {"t0", "t1", "t2", "t3"}
    assert kept[0] & flagged and kept[1] & flagged
    assert dropped == [kept[0] - flagged, kept[1] - flagged]
    assert both[0].overlaps == both[1].overlaps and len(both[0].overlaps) == 2


def test_a_closer_match_in_the_validation_set_does_not_hide_one_in_the_training_set(tmp_path):
    whole = make_dialogue("whole", 0, turns=20)
    near = [edited(whole, f"n{i}", i) for i in range(20)]
    write_dialogues(tmp_path / "train.jsonl", [whole, *near, *MANY[:20]])
    write_dialogues(tmp_path / "evaluation.jsonl", [Dialogue("e", whole.turns)])
    sets = [DialogueSourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("train", "evaluation")]
    configs = (DataConfig(*sets, validation_fraction=0.5, seed=seed) for seed in range(20))
    splits = next(each for each in map(read_and_check_splits, configs) if "whole" in ids(each.validation))
    (overlap,) = splits.overlaps
    assert overlap.kind == "near" and overlap.train_id in ids(splits.train)


def test_a_smaller_share_of_the_training_dialogues_is_a_part_of_a_larger_one(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    write_dialogues(path, MANY[:600])

    def read(fraction, **more):
        splits = read_splits(DataConfig(DialogueSourceConfig(str(path)), train_fraction=fraction, **more))
        return [{dialogue.id for dialogue in side} for side in (splits.train, splits.evaluation, splits.validation)]

    (whole, evaluation, _), (half, same, _), (tenth, _, _) = map(read, (1.0, 0.5, 0.1))
    assert tenth < half < whole and same == evaluation
    assert 0.4 < len(half) / len(whole) < 0.6 and 0.05 < len(tenth) / len(whole) < 0.16
    assert read(0.5, seed=1)[0] - half
    # The validation set is a part of the share, too.
    train, _, validation = read(0.5, validation_fraction=0.3)
    assert validation and train | validation == half
    with pytest.raises(InputError, match=r"^data.train_fraction=1e-09 leaves no dialogue of \d+: raise it$"):
        read(1e-9)


def test_limit_keeps_the_same_dialogues_whatever_their_order(tmp_path):
    chosen = []
    for seed, dialogues in [(0, MANY[:200]), (0, MANY[199::-1]), (1, MANY[:200])]:
        write_dialogues(tmp_path / "a.jsonl", dialogues)
        config = DataConfig(
            DialogueSourceConfig(str(tmp_path / "a.jsonl")), evaluation_fraction=0.5, limit=20, seed=seed
        )
        splits = read_and_check_splits(config)
        assert (len(splits.train), len(splits.evaluation)) == (20, 20)
        for side in (splits.train, splits.evaluation):
            assert ids(side) == [d.id for d in dialogues if d.id in ids(side)]
        chosen.append((set(ids(splits.train)), set(ids(splits.evaluation))))
    assert chosen[0] == chosen[1] != chosen[2]


def test_limit_is_not_tied_to_the_split():
    """Were both drawn from one number, the kept side's first by hash would be the ones next to be held out."""
    from csc_train.data.splits import _limited

    nearly = set(ids(split(MANY, 0.2, seed=0)[1])) - set(ids(split(MANY, 0.1, seed=0)[1]))
    kept = split(MANY, 0.1, seed=0)[0]
    assert len(nearly & set(ids(_limited(kept, 100, seed=0)))) < 40


def test_refused_rows_of_each_set_go_to_their_own_file(files, tmp_path, said):
    train = files["train"].path
    with open(train, "a", encoding="utf-8") as file:
        file.write("{\n")
    config = DataConfig(train=files["train"], evaluation=DialogueSourceConfig(train))
    read_and_check_splits(config, rejected_directory=tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "rejected-evaluation.jsonl",
        "rejected-train.jsonl",
    ]
    assert "41 rows, 40 accepted, 1 rejected" in said[0]
    with pytest.raises(InputError, match=r"^data\.train: .*train\.jsonl, row 41, field row: broken JSON"):
        read_and_check_splits(DataConfig(train=files["train"], strict=True))


def test_a_source_is_selected_for_each_set(tmp_path):
    path = tmp_path / "all.jsonl"
    write_dialogues(path, [Dialogue(d.id, d.turns, "RoleCS" if i % 3 else "CSConv") for i, d in enumerate(MANY[:30])])
    config = DataConfig(DialogueSourceConfig(str(path), "RoleCS"), DialogueSourceConfig(str(path), "CSConv"))
    splits = read_and_check_splits(config)
    assert {d.source for d in splits.train} == {"RoleCS"} and {d.source for d in splits.evaluation} == {"CSConv"}
    assert (len(splits.train), len(splits.evaluation)) == (20, 10)
    with pytest.raises(
        InputError, match=r"^data\.evaluation: .*no row has source 'x'; found: 'RoleCS' \(20\), 'CSConv'"
    ):
        read_and_check_splits(DataConfig(DialogueSourceConfig(str(path)), DialogueSourceConfig(str(path), "x")))


def test_sets_that_end_up_empty_name_their_key(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=r"^data\.train\.path is not set"):
        read_and_check_splits(DataConfig())
    with pytest.raises(InputError, match=r"^data\.train: .*a\.jsonl: cannot read: No such file"):
        read_and_check_splits(DataConfig(DialogueSourceConfig(str(path))))
    path.write_text("")
    with pytest.raises(InputError, match=r"^data\.train: .*a\.jsonl: no rows"):
        read_and_check_splits(DataConfig(DialogueSourceConfig(str(path))))
    write_dialogues(path, MANY[:1])
    for fraction, name in [(1e-9, "evaluation"), (1 - 1e-9, "training")]:
        with pytest.raises(
            InputError, match=rf"^data.evaluation_fraction={fraction} .* leaves no {name} dialogue of 1 in"
        ):
            read_and_check_splits(DataConfig(DialogueSourceConfig(str(path)), evaluation_fraction=fraction))
    for fraction, name in [(1e-9, "validation"), (1 - 1e-9, "training")]:
        with pytest.raises(
            InputError, match=rf"^data.validation_fraction={fraction} .* leaves no {name} dialogue of 1 "
        ):
            read_and_check_splits(
                DataConfig(
                    DialogueSourceConfig(str(path)), DialogueSourceConfig(str(path)), validation_fraction=fraction
                )
            )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("evaluation_fraction", value) for value in (0, 1, -0.1, 1.5, float("nan"))],
        *[("validation_fraction", value) for value in (1, -0.1, float("nan"))],
        *[("train_fraction", value) for value in (0, 1.1, float("nan"))],
        *[("overlap_threshold", value) for value in (0, 1.01, -1, float("nan"))],
        *[("on_overlap", value) for value in ("Drop", "", "ignore")],
        *[("limit", value) for value in (0, -1)],
        *[("sample_dialogues", value) for value in (0, -1)],
        *[("seed", value) for value in (-1, 2**32)],
        *[("sample_seed", value) for value in (-1, 2**32)],
    ],
)
def test_a_value_out_of_range_names_its_key(key, value):
    with pytest.raises(InputError, match=rf"^data\.{key}={value}: "):
        DataConfig(**{key: value})


def test_an_evaluation_source_without_a_path_would_be_ignored_and_is_refused():
    with pytest.raises(InputError, match=r"data\.evaluation\.source is set, but data\.evaluation\.path is not"):
        DataConfig(evaluation=DialogueSourceConfig(source="CSConv"))


def test_the_config_is_a_structured_config_of_hydra():
    schema = OmegaConf.structured(DataConfig)
    merged = OmegaConf.merge(schema, {"train": {"path": "a.jsonl"}, "limit": 3, "overlap_threshold": 1})
    config = OmegaConf.to_object(merged)
    assert config == DataConfig(train=DialogueSourceConfig("a.jsonl"), limit=3, overlap_threshold=1.0)
    for wrong in ({"trian": {}}, {"limit": "many"}, {"train": {"file": "x"}}, {"strict": "perhaps"}):
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.merge(schema, wrong)
    with pytest.raises(InputError, match=r"data\.limit=0"):
        OmegaConf.to_object(OmegaConf.merge(schema, {"limit": 0}))


def test_overlaps_come_in_the_order_of_the_evaluation_set():
    one, other = make_dialogue("one", 1), make_dialogue("other", 2)
    train = [edited(other, "t0", 0), edited(one, "t1", 0), edited(other, "t2", 0)]
    found = [(each.evaluation_id, each.train_id) for each in find_overlaps(train, [one, other])]
    assert found == [("one", "t1"), ("other", "t0"), ("other", "t2")]
