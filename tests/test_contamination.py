"""Overlap with the training data: kept with a run, and left out of a second set of metrics."""

import pytest

from csc_train.data.dialogue import Dialogue
from csc_train.data.overlap import Overlap, best_overlaps, find_overlaps
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits
from csc_train.errors import InputError
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.contamination import (
    CONTAMINATION_FILE,
    find_contamination,
    read_contamination,
    write_contamination,
)
from csc_train.evaluation.metrics.base import MetricResult
from csc_train.evaluation.report.tables import results_markdown
from csc_train.evaluation.scoring import score_predictions
from csc_train.inference.predictions import Prediction

TRAIN, EVALUATION = generate_sample(40, seed=1), generate_sample(20, seed=2)
COPY = Dialogue("copy", TRAIN[3].turns)
HELD_OUT = [*EVALUATION, COPY]


@pytest.fixture(scope="module")
def found():
    """Of 21 evaluation dialogues the last stands in the training data."""
    return find_contamination(Splits(TRAIN, HELD_OUT, best_overlaps(find_overlaps(TRAIN, HELD_OUT))), near=0.8)


def test_both_checks_list_a_copy_and_flag_it_once(found):
    assert set(found.overlaps[:2]) == {
        Overlap(TRAIN[3].id, "copy", "exact", 1.0),
        Overlap(TRAIN[3].id, "copy", "shared", 1.0),
    }
    assert "copy" in found.flagged and len(found.flagged) < len(HELD_OUT) / 2
    text = str(found)
    assert text.startswith(f"{len(found.flagged)} of 21 evaluation dialogues are flagged. ")
    assert "one of the 40 training dialogues" in text and "at least 50 % of its 13-grams" in text


def test_what_was_dropped_from_the_training_data_counts_no_more(found):
    kept = [dialogue for dialogue in TRAIN if dialogue.id != TRAIN[3].id]
    splits = Splits(kept, HELD_OUT, best_overlaps(find_overlaps(TRAIN, HELD_OUT)))
    assert [overlap.evaluation_id for overlap in splits.overlaps] == ["copy"]
    assert "copy" not in find_contamination(splits, near=0.8).flagged


def test_the_list_is_kept_with_the_run(found, tmp_path):
    assert read_contamination(tmp_path) is None
    write_contamination(tmp_path, found)
    assert read_contamination(tmp_path) == found
    (tmp_path / CONTAMINATION_FILE).write_text('{"overlaps": [{"kind": "near"}]}')
    with pytest.raises(InputError, match=r"contamination\.json: not a list of overlaps"):
        read_contamination(tmp_path)


def said(dialogues, right):
    """Predictions that are the reference's for the dialogues whose ids are in `right`, and wrong elsewhere."""
    return [
        Prediction(each.id, turn, "reference", "", "", strategy, text, gold.strategy.number, gold.text)
        for each in dialogues
        for turn in each.supporter_turns
        for gold in [each.turns[turn]]
        for strategy, text in [(gold.strategy.number, gold.text) if each.id in right else (None, "嗯")]
    ]


def test_scores_without_the_flagged_dialogues_are_those_of_the_rest(found):
    by_id = {dialogue.id: dialogue for dialogue in HELD_OUT}
    right = {"copy", *(dialogue.id for dialogue in EVALUATION[:8])}
    config = MetricsConfig(bootstrap_resamples=200)
    whole = score_predictions(said(HELD_OUT, right), by_id, config, flagged=found.flagged)
    rest = [dialogue for dialogue in HELD_OUT if dialogue.id not in found.flagged]
    alone = score_predictions(said(rest, right), by_id, config)
    assert alone["decontaminated"] is None
    without = whole["decontaminated"]
    assert (without["dialogues"], without["turns"]) == (len(rest), alone["counts"]["turns"])
    for profile, cells in alone["profiles"].items():
        for column, cell in cells.items():
            other = without["profiles"][profile][column]
            assert other.value == (None if cell.value is None else pytest.approx(cell.value)), (profile, column)
    accuracy = without["profiles"]["paper"]["ACC"]
    assert accuracy.low < accuracy.value < accuracy.high
    assert accuracy.value < whole["profiles"]["paper"]["ACC"].value


def test_where_every_dialogue_is_flagged_no_metric_remains():
    by_id = {dialogue.id: dialogue for dialogue in EVALUATION}
    everything = score_predictions(
        said(EVALUATION, by_id), by_id, MetricsConfig(bootstrap_resamples=100), flagged=set(by_id)
    )["decontaminated"]
    assert (everything["dialogues"], everything["turns"]) == (0, 0)
    cells = [cell for profile in everything["profiles"].values() for cell in profile.values()]
    assert {cell.value for cell in cells} == {None} and all(
        isinstance(cell, MetricResult) and cell.reason for cell in cells
    )


def test_the_table_says_what_was_found_and_shows_both_sets_of_metrics(found):
    by_id = {dialogue.id: dialogue for dialogue in HELD_OUT}
    scores = score_predictions(
        said(HELD_OUT, {"copy"}),
        by_id,
        MetricsConfig(bootstrap_resamples=100, profiles=["paper"]),
        flagged=found.flagged,
    )
    text = results_markdown({"system": {"reference": scores}}, {}, found)
    assert f"Training overlap: {found}" in text
    rest = len(HELD_OUT) - len(found.flagged)
    assert f"### Profile `paper` without the flagged dialogues (percent; {rest} of 21 dialogues)" in text
    assert "without the flagged" not in results_markdown({"system": {"reference": scores}}, {})
