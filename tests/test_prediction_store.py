"""The prediction store: incomplete lines, retries of failed turns, and the merge of parts."""

from dataclasses import replace

import pytest
from test_generator import DIALOGUES, LONG, TURNS, Flaky, Recorder

from csc_train.errors import InputError
from csc_train.inference.generator import generate_predictions, shard_dialogues
from csc_train.inference.predictions import (
    FailedTurn,
    PredictionStore,
    is_complete,
    read_outcomes,
    read_run_predictions,
)

NAME = "system-generated.jsonl"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "predictions" / NAME


def run(path, generator, dialogues=DIALOGUES, process=0, context="generated"):
    """Predict with a store, without merging: the state after a kill at the end."""
    with PredictionStore(path, "recorder", process) as store:
        generate_predictions(dialogues, generator, context, store)
    return store


@pytest.fixture
def whole(tmp_path):
    """The bytes of an uninterrupted run."""
    path = tmp_path / "whole" / NAME
    assert run(path, Recorder(2)).merge(DIALOGUES) == []
    return path.read_bytes()


class Killed(Recorder):
    """Is interrupted after some replies."""

    def __init__(self, answers):
        super().__init__(2)
        self.answers = answers

    def run(self, queue):
        while requests := queue.pop(self.batch_size):
            for request in requests:
                if self.answers == 0:
                    raise KeyboardInterrupt
                self.answers -= 1
                queue.complete(request, self.predict(request))


@pytest.mark.parametrize("torn", [0, 1, 9])
@pytest.mark.parametrize("answers", range(8))
def test_a_run_that_was_interrupted_ends_with_the_same_file(path, whole, answers, torn):
    """Between any two answers, or within the line of the last one, in the middle of a character too."""
    if answers < 7:
        with pytest.raises(KeyboardInterrupt):
            run(path, Killed(answers))
    else:
        run(path, Killed(answers))
    part = path.with_name(f"{NAME}.part-00000")
    content = part.read_bytes()
    assert content.count(b"\n") == answers
    part.write_bytes(content[: len(content) - torn])
    again = Recorder(2)
    store = run(path, again)
    assert sum(map(len, again.batches)) == 7 - answers + (torn > 0 and answers > 0)
    assert not is_complete(path, DIALOGUES)
    assert store.merge(DIALOGUES) == []
    assert path.read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [NAME]
    assert is_complete(path, DIALOGUES)


def test_a_line_that_is_broken_elsewhere_is_said_and_its_turn_predicted_again(path, whole, said):
    run(path, Recorder(2))
    part = path.with_name(f"{NAME}.part-00000")
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    again = Recorder(2)
    run(path, again).merge(DIALOGUES)
    assert sum(map(len, again.batches)) == 1 and path.read_bytes() == whole
    assert [line.split(": ")[:2] for line in said] == [[f"{part}, line 2", "not JSON (column 17"]]


def test_another_system_is_not_mixed_in(path):
    run(path, Recorder(2))
    with pytest.raises(InputError, match=r"of other settings \(recorder, now other\): choose another run.directory"):
        PredictionStore(path, "other")


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "predictions").write_text("")
    with pytest.raises(InputError, match=r"part-00000: cannot write: "):
        PredictionStore(tmp_path / "predictions" / NAME, "recorder")


def test_failed_turns_are_listed_and_only_they_are_tried_again(path, whole):
    failures = run(path, Flaky(2)).merge(DIALOGUES)
    assert [(each.turn, each.kind) for each in failures] == [
        (2, "timeout"), (4, "earlier_turn_failed"), (6, "earlier_turn_failed"),
    ]  # fmt: skip
    outcomes = read_outcomes(path)
    assert [(each.dialogue_id, each.turn) for each in outcomes] == TURNS
    assert not is_complete(path, DIALOGUES)
    run_predictions = read_run_predictions(path.parent.parent)
    assert run_predictions.failures == {"system": {"generated": failures}}
    assert run_predictions.predictions == {
        "system": {"generated": [each for each in outcomes if not isinstance(each, FailedTurn)]}
    }
    # Once more in vain, then with success.
    assert run(path, Flaky(2)).merge(DIALOGUES) == failures
    again = Recorder(2)
    assert run(path, again).merge(DIALOGUES) == []
    assert [(each.dialogue.id, each.turn) for batch in again.batches for each in batch] == [
        ("long", 2), ("long", 4), ("long", 6),
    ]  # fmt: skip
    assert path.read_bytes() == whole


def test_parts_of_several_ranks_are_merged_by_one_that_resumes(path, whole):
    for process in range(3):
        run(path, Recorder(2), shard_dialogues(DIALOGUES, process, 3), process)
    # Killed before they were put together; one process resumes, with nothing left to do.
    again = Recorder(2)
    store = run(path, again)
    assert again.batches == []
    assert store.merge(DIALOGUES) == []
    assert path.read_bytes() == whole


def test_a_missing_turn_is_found(path):
    store = run(path, Recorder(2), [LONG])
    with pytest.raises(AssertionError, match="3 of 7 turns are neither predicted nor failed"):
        store.merge(DIALOGUES)


def test_a_later_line_about_a_turn_counts(path):
    with PredictionStore(path, "recorder") as store:
        for outcome in generate_predictions([LONG], Recorder(2), "generated"):
            store.add(outcome)
            store.add(replace(outcome, reference_nll=2.5))
            store.add(FailedTurn(outcome.dialogue_id, outcome.turn, "generated", "timeout", "", "recorder"))
    assert store.merge([LONG]) == []
    assert {outcome.reference_nll for outcome in read_outcomes(path)} == {2.5}


@pytest.mark.parametrize("cut", [1, 5, 2000])
def test_what_was_lost_of_a_finished_file_is_predicted_again(path, whole, cut):
    run(path, Recorder(2)).merge(DIALOGUES)
    path.write_bytes(whole[:-cut])
    assert not is_complete(path, DIALOGUES)
    again = Recorder(2)
    store = run(path, again)
    lost = len(TURNS) - whole[:-cut].count(b"\n")
    assert sum(map(len, again.batches)) == lost > (1 if cut == 2000 else 0)
    store.merge(DIALOGUES)
    assert path.read_bytes() == whole


def test_killed_before_the_parts_were_removed(path, whole):
    store = run(path, Recorder(2))
    path.write_bytes(whole)
    assert not is_complete(path, DIALOGUES)
    again = Recorder(2)
    store = run(path, again)
    assert again.batches == [] and store.merge(DIALOGUES) == []
    assert path.read_bytes() == whole and is_complete(path, DIALOGUES)


def test_a_name_may_look_like_a_pattern(tmp_path, whole):
    path = tmp_path / "predictions" / "model[awq]-generated.jsonl"
    assert run(path, Recorder(2)).merge(DIALOGUES) == []
    assert path.read_bytes() == whole
