"""Two systems beside each other: as a library, and as the recipes are started."""

import dataclasses
import json
import random

import pytest
from conftest import ROOT
from processes import run_script

from csc_train.data.dialogue import Dialogue, Speaker, Turn, data_digest
from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.splits import Splits
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.comparison import NOT_SIGNIFICANT, compare, read_run_dialogues
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.contamination import read_contamination
from csc_train.evaluation.metrics.likelihood import NO_TEXTS, OTHER_CONTEXT, UNKNOWN_LABELS
from csc_train.evaluation.scoring import data_inputs
from csc_train.files import file_digest
from csc_train.inference.predictions import Prediction, read_external_replies, read_run_predictions


def answers(right, seed, dialogues=60, turns=8, context="reference"):
    """Predictions that name the reference's strategy with chance `right`, and then give its reply."""
    rng = random.Random(seed)
    made = []
    for dialogue in range(dialogues):
        for turn in range(0, 2 * turns, 2):
            reference = (dialogue + turn) % 12 + 1
            hit, text = rng.random() < right, f"第{reference}号方案，好的。"
            strategy = reference if hit else reference % 12 + 1
            reply = text if hit else "请稍等。"
            made.append(Prediction(f"d{dialogue}", turn, context, "", "", strategy, reply, reference, text))
    return made


LEXICAL = MetricsConfig()


def by_metric(rows):
    return {row.metric: row for row in rows}


@pytest.mark.slow
def test_a_clear_difference_is_significant_and_a_small_one_is_not():
    clear = compare({"reference": answers(0.7, 0)}, {"reference": answers(0.4, 1)}, LEXICAL, permutations=1000)
    assert {row.verdict for row in clear if row.p_value is not None} == {"A is higher"}
    mirrored = compare({"reference": answers(0.4, 1)}, {"reference": answers(0.7, 0)}, LEXICAL, permutations=1000)
    assert {row.verdict for row in mirrored if row.p_value is not None} == {"B is higher"}
    small = compare({"reference": answers(0.5, 0)}, {"reference": answers(0.5, 1)}, LEXICAL, permutations=1000)
    assert {row.verdict for row in small if row.p_value is not None} == {NOT_SIGNIFICANT}
    accuracy = by_metric(clear)["ACC"]
    assert accuracy.difference == pytest.approx(accuracy.a - accuracy.b)
    assert accuracy.low < accuracy.difference < accuracy.high
    assert accuracy.mcnemar is not None and by_metric(clear)["macro-F1"].mcnemar is None


def test_systems_without_a_common_context_are_refused():
    with pytest.raises(
        InputError, match=r"no context in common: A was .* reference context, B was .* generated context"
    ):
        compare({"reference": answers(0.5, 0)}, {"generated": answers(0.5, 1, context="generated")}, LEXICAL, 1000)


@pytest.mark.slow
def test_every_metric_is_compared_once_and_holm_counts_all_contexts():
    both = [{context: answers(0.5, seed, context=context) for context in ("reference", "generated")} for seed in (0, 1)]
    rows = compare(*both, LEXICAL, permutations=1000)
    names = ["paper B-2", "paper B-4", "paper R-L", "zh B-2", "zh B-4", "zh R-L char", "zh R-L word"]
    names += ["general perplexity", "ECE", "overconfidence", "ACC at 80 % coverage", "AURC", "BS", "paper BR"]
    names += ["placeholders kept", "placeholders invented", "placeholders filled"]
    names += ["ACC", "ACC accepted", "macro-F1", "preference bias", "stage ACC"]
    assert [(row.context, row.metric) for row in rows] == [
        (context, name) for context in ("reference", "generated") for name in names
    ]
    tested = [row for row in rows if row.p_value is not None]
    assert len(tested) == 22
    assert min(row.adjusted for row in tested) == pytest.approx(min(1, 22 * min(row.p_value for row in tested)))
    missing = [row for row in rows if row.p_value is None]
    models = {"no BERTScore model given", "no BLEURT model given"}
    ours = {"no reference reply has a placeholder", "the run has no dialogues.jsonl"}
    assert {row.reason for row in missing} == {*models, *ours, NO_TEXTS, OTHER_CONTEXT, UNKNOWN_LABELS}


def dialogues_of(answers, accepted=()):
    """The dialogues that `answers` belong to; every turn of the reference also accepts these strategies."""
    turns = {}
    for each in answers:
        own, several = STRATEGIES[each.reference_strategy - 1], tuple(STRATEGIES[n - 1] for n in accepted)
        said = Turn(Speaker.SUPPORTER, each.reference_response, own, several and (own, *several))
        turns.setdefault(each.dialogue_id, []).extend([said, Turn(Speaker.CUSTOMER, "好")])
    return {name: Dialogue(name, tuple(each)) for name, each in turns.items()}


@pytest.mark.slow
def test_metrics_of_what_was_said_before_are_compared_if_both_runs_have_their_dialogues():
    """A always names an accepted strategy and keeps the placeholder; B names 12, another placeholder and a number."""
    slot = {"reference_response": "请报[姓名]。"}
    ours, theirs = (
        [dataclasses.replace(each, **slot, strategy=strategy, response=reply) for each in answers(0.5, 0, 12, 2)]
        for strategy, reply in ((1, "请报[姓名]。"), (12, "请报[工号]1234。"))
    )
    a, b = {"reference": ours}, {"reference": theirs}
    sets, others = dialogues_of(ours, [1, 2]), dialogues_of(ours, [1, 3])
    names = ("ACC accepted", "placeholders kept", "placeholders invented", "placeholders filled")

    def compared(*dialogues):
        rows = by_metric(compare(a, b, LEXICAL, 1000, dialogues=dialogues))
        return [(rows[name].verdict, rows[name].difference, rows[name].reason) for name in names]

    missed = 100 * sum(each.reference_strategy == 12 for each in theirs) / len(theirs)
    assert missed > 0 and compared(sets, sets) == [
        ("A is higher", pytest.approx(100 - missed), None), ("A is higher", 100, None), ("B is higher", -100, None),
        ("B is higher", -100, None),
    ]  # fmt: skip
    unknown = "the run has no dialogues.jsonl"
    kept = ("A is higher", 100, None)
    for dialogues in ((sets, None), (None, sets), (None, None)):
        assert compared(*dialogues) == [(None, None, unknown), kept, (None, None, unknown), (None, None, unknown)]
    reason = "the two runs accept different strategies: give metrics.accepted=PATH"
    assert compared(sets, others)[0] == (None, None, reason) and compared(sets, others)[1] == kept
    assert compared(sets, dialogues_of(ours))[0] == (None, None, reason)
    assert compared(dialogues_of(ours), dialogues_of(ours))[0][2] == "no turn accepts several strategies"


def test_dialogues_of_a_run_take_the_accept_sets_of_a_file(tmp_path):
    assert read_run_dialogues(tmp_path, LEXICAL) is None
    (first, *_), file = generate_sample(2, seed=0), tmp_path / "sets.jsonl"
    write_lines(tmp_path / "dialogues.jsonl", [first.row()])
    write_lines(file, [{"dialogue_id": first.id, "turn": first.supporter_turns[-1], "accepted": ["12"]}])
    read = read_run_dialogues(tmp_path, MetricsConfig(accepted=str(file)))[first.id]
    assert [each.number for each in read.turns[first.supporter_turns[-1]].accepted][-1] == 12
    assert read_run_dialogues(tmp_path, LEXICAL) == {first.id: first}
    with pytest.raises(InputError, match=r"^metrics\.accepted=nowhere\.jsonl: no such file$"):
        MetricsConfig(accepted="nowhere.jsonl")


def test_results_are_not_reused_under_other_accept_sets(tmp_path):
    train, (first, second) = generate_sample(2, seed=1), generate_sample(2, seed=0)
    splits, turn = Splits(train, [first, second]), first.supporter_turns[0]
    plain = data_inputs(splits, LEXICAL)
    assert plain == {"train": data_digest(train), "evaluation": data_digest([first, second])}  # as without sets
    found = []
    for labels in (["12"], ["12", "12"], ["7"], []):
        rows = [{"dialogue_id": first.id, "turn": turn, "accepted": labels}]
        path = write_lines(tmp_path / "sets.jsonl", rows)
        found.append(data_inputs(splits, MetricsConfig(accepted=str(path))))
    assert found[0] == found[1] == plain | {"accepted": found[0]["accepted"]}
    assert found[2]["accepted"] != found[0]["accepted"] and found[3] == plain


def test_a_verdict_is_by_the_p_value_after_the_correction():
    rows = compare({"reference": answers(0.56, 3)}, {"reference": answers(0.5, 103)}, LEXICAL, permutations=1000)
    doubtful = [row for row in rows if row.p_value is not None and row.p_value < 0.05 <= row.adjusted]
    assert doubtful and {row.verdict for row in doubtful} == {NOT_SIGNIFICANT}


def test_where_one_system_predicts_no_strategy_its_choices_are_not_compared():
    handed_in = [dataclasses.replace(each, predicts_strategy=False, strategy=None) for each in answers(0.5, 0)]
    rows = by_metric(compare({"reference": handed_in}, {"reference": answers(0.5, 1)}, LEXICAL, permutations=1000))
    for name in ("ACC", "macro-F1", "stage ACC"):
        assert (rows[name].a, rows[name].verdict, rows[name].reason) == (None, None, "this mode predicts no strategy")
    assert rows["zh B-2"].verdict is not None


@pytest.mark.slow
def test_turns_that_one_system_lacks_are_left_out_of_both_and_counted():
    a, b = answers(0.7, 0), answers(0.4, 1)
    rows = by_metric(compare({"reference": a[2:]}, {"reference": b[:-1]}, LEXICAL, permutations=1000))
    expected = by_metric(compare({"reference": a[2:-1]}, {"reference": b[2:-1]}, LEXICAL, permutations=1000))
    assert {(row.turns, row.left_out) for row in rows.values()} == {(len(a) - 3, 3)}
    assert {(row.turns, row.left_out) for row in expected.values()} == {(len(a) - 3, 0)}
    assert {name: dataclasses.replace(row, left_out=0) for name, row in rows.items()} == expected
    # A context in which all of one system's turns failed hides no other.
    generated = answers(0.5, 2, context="generated")
    both = compare(
        {"reference": a, "generated": generated}, {"reference": b, "generated": []}, LEXICAL, permutations=1000
    )
    assert {row.verdict for row in both if row.context == "reference"} >= {"A is higher"}
    assert {(row.verdict, row.turns, row.left_out) for row in both if row.context == "generated"} == {
        (None, 0, len(generated))
    }
    assert "no turns to score" in {row.reason for row in both}


def test_no_common_turns_or_other_references_are_refused():
    whole = answers(0.5, 0)
    for changed, message in (
        ([], "A and B have no turn in common"),
        ([dataclasses.replace(each, turn=each.turn + 1) for each in whole], "A and B have no turn in common"),
        ([*whole, whole[0]], "dialogue d0, turn 0 is predicted twice"),
        (
            [dataclasses.replace(whole[0], reference_response="另"), *whole[1:]],
            "the references of turn 0 of dialogue d0 differ",
        ),
    ):
        with pytest.raises(InputError, match=message):
            compare({"reference": whole}, {"reference": changed}, LEXICAL, permutations=1000)


# --- replies made elsewhere ---


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(dialogues, share=1.0):
    rng = random.Random(0)
    return [
        {"dialogue_id": dialogue.id, "turn": turn, "text": f"[{said.strategy.zh}]{said.text}"}
        if rng.random() < share
        else {"dialogue_id": dialogue.id, "turn": turn, "text": ""}
        for dialogue in dialogues
        for turn in dialogue.supporter_turns
        for said in [dialogue.turns[turn]]
    ]


def test_replies_made_elsewhere_are_read_in_dialogue_order(tmp_path):
    dialogues = generate_sample(3, seed=0)
    rows = rows_of(dialogues)
    read = read_external_replies(write_lines(tmp_path / "r.jsonl", reversed(rows)), dialogues, "reference")
    assert [(each.dialogue_id, each.turn) for each in read] == [(row["dialogue_id"], row["turn"]) for row in rows]
    assert all(each.strategy == each.reference_strategy for each in read)
    assert all(each.response == each.reference_response for each in read)
    plain = [row | {"text": "好的"} for row in rows]
    read = read_external_replies(write_lines(tmp_path / "p.jsonl", plain), dialogues, "generated")
    assert {(each.predicts_strategy, each.strategy, each.context) for each in read} == {(False, None, "generated")}


def test_replies_made_elsewhere_are_read_as_dialogue_files_are(tmp_path):
    """Whole numbers for ids, a byte order mark, blank lines; the same file is the same system."""
    dialogues = [dataclasses.replace(each, id=str(number)) for number, each in enumerate(generate_sample(3, seed=0))]
    rows = rows_of(dialogues)
    path = write_lines(tmp_path / "r.jsonl", [row | {"dialogue_id": int(row["dialogue_id"])} for row in rows])
    path.write_text("\ufeff" + path.read_text("utf-8").replace("\n", "\n\n", 1) + " \n", encoding="utf-8")
    read = read_external_replies(path, dialogues, "reference")
    assert [(each.dialogue_id, each.turn, each.raw_text) for each in read] == [tuple(row.values()) for row in rows]
    assert {each.config_hash for each in read} == {file_digest(path)}


def test_replies_made_elsewhere_must_be_whole(tmp_path):
    dialogues = generate_sample(3, seed=0)
    rows = rows_of(dialogues)
    name, count = rows[0]["dialogue_id"], len(rows)
    for changed, message in (
        (rows[1:], f"1 of {count} turns are missing, first turn 0 of dialogue {name}"),
        ([*rows, rows[0]], f"line {count + 1}: turn 0 of dialogue {name} stands in line 1 already"),
        ([rows[0] | {"turn": 1}], f"line 1: turn 1 of dialogue {name} is not a supporter turn"),
        ([rows[0] | {"turn": "0"}], "line 1: field turn: Input should be a valid integer"),
        ([rows[0] | {"text": None}], "line 1: field text: Input should be a valid string"),
        ([rows[0] | {"dialogue_id": True}], "line 1: field dialogue_id"),
        ([[]], "line 1: not a JSON object"),
    ):
        with pytest.raises(InputError, match=message):
            read_external_replies(write_lines(tmp_path / "r.jsonl", changed), dialogues, "reference")
    half = json.dumps(rows[0] | {"text": "好\ud83d"})
    (tmp_path / "r.jsonl").write_text(half + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.jsonl, line 1: field text: lone surrogate"):
        read_external_replies(tmp_path / "r.jsonl", dialogues, "reference")
    with pytest.raises(InputError, match="a baseline has it"):
        read_external_replies(write_lines(tmp_path / "strategy bigram.jsonl", rows), dialogues, "reference")


# --- as they are started ---


def start(*arguments, cwd):
    done = run_script(ROOT / "recipes" / arguments[0], *arguments[1:], cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a run that scored replies made elsewhere."""
    directory = tmp_path_factory.mktemp("workplace")
    evaluation = generate_sample(80, seed=5)
    write_lines(directory / "train.jsonl", [each.row() for each in generate_sample(80, seed=6)])
    write_lines(directory / "evaluation.jsonl", [each.row() for each in evaluation])
    write_lines(directory / "elsewhere.jsonl", rows_of(evaluation, share=0.8))
    shown = start(
        "evaluate.py", "predictions=elsewhere.jsonl", "data=files", "data.train.path=train.jsonl",
        "data.evaluation.path=evaluation.jsonl", "evaluation.contexts=[reference]", "run.directory=runs/elsewhere",
        cwd=directory,
    )  # fmt: skip
    return directory, shown


@pytest.mark.slow
def test_replies_made_elsewhere_are_scored_beside_the_baselines(workplace):
    directory, shown = workplace
    results = json.loads((directory / "runs/elsewhere/results.json").read_text())["results"]
    assert list(results) == ["most frequent strategy", "strategy bigram", "elsewhere"]
    accuracy = results["elsewhere"]["reference"]["profiles"]["paper"]["ACC"]
    rows = rows_of(generate_sample(80, seed=5), share=0.8)
    assert accuracy["value"] == pytest.approx(100 * sum(row["text"] != "" for row in rows) / len(rows))
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert "elsewhere" in shown and "±" in shown
    assert len(read_dialogues(directory / "runs/elsewhere/dialogues.jsonl")) == 80
    listed = read_contamination(directory / "runs/elsewhere")
    assert (listed.training, listed.evaluation) == (80, 80)
    assert "report: runs/elsewhere/report.html" in shown
    assert "<title>Evaluation: elsewhere</title>" in (directory / "runs/elsewhere/report.html").read_text()


@pytest.mark.slow
def test_a_run_is_scored_again_without_a_model(workplace):
    directory, _ = workplace
    run = directory / "runs/elsewhere"
    before = json.loads((run / "results.json").read_text())["results"]
    file = run / "predictions" / "elsewhere-reference.jsonl"
    kept, record = file.read_text(), (run / "run.json").read_text()
    predictions = [json.loads(line) for line in kept.splitlines()]
    file.write_text("".join(json.dumps(each | {"strategy": each["reference_strategy"]}) + "\n" for each in predictions))
    several = [{"dialogue_id": each["dialogue_id"], "turn": each["turn"], "accepted": ["12"]} for each in predictions]
    write_lines(directory / "sets.jsonl", several)
    start(
        "evaluate.py", "run=runs/elsewhere", "score_only=true", "metrics.profiles=[zh]",
        "metrics.accepted=sets.jsonl", cwd=directory,
    )  # fmt: skip
    after = json.loads((run / "results.json").read_text())["results"]
    file.write_text(kept)
    assert list(after["elsewhere"]["reference"]["profiles"]) == ["zh"]
    assert after["elsewhere"]["reference"]["profiles"]["zh"]["ACC"]["value"] == 100
    accepted = [each["elsewhere"]["reference"]["strategy"]["ACC accepted"] for each in (before, after)]
    assert [each["value"] for each in accepted] == [None, 100] and "from sets.jsonl" in accepted[1]["signature"]
    assert (
        after["strategy bigram"]["reference"]["profiles"]["zh"]
        == before["strategy bigram"]["reference"]["profiles"]["zh"]
    )
    assert (run / "run.json").read_text() == record


@pytest.mark.slow
def test_compare_writes_and_prints_what_it_finds(workplace):
    directory, _ = workplace
    shown = start(
        "compare.py", "runs/elsewhere", "runs/elsewhere", "system_b=strategy bigram", "permutations=1000",
        "run.directory=runs/compared", cwd=directory,
    )  # fmt: skip
    assert "A: elsewhere of runs/elsewhere\nB: strategy bigram of runs/elsewhere" in shown
    written = json.loads((directory / "runs/compared/comparison.json").read_text())
    verdicts = {(row["verdict"], row["direction"]) for row in written["differences"] if row["verdict"]}
    assert verdicts == {("A is higher", "higher"), ("B is higher", "lower"), ("not significant", "lower")}
    (same,) = [row["metric"] for row in written["differences"] if row["verdict"] == "not significant"]
    assert same == "placeholders invented"  # by neither
    reasons = {row["metric"]: row["reason"] for row in written["differences"]}
    assert reasons["ACC accepted"] == "no turn accepts several strategies"  # the run's dialogues were read
    assert "A is higher" in (directory / "runs/compared/comparison.md").read_text()


@pytest.mark.slow
def test_a_system_that_a_run_has_not_is_named(workplace, tmp_path):
    directory, _ = workplace
    run = read_run_predictions(directory / "runs/elsewhere")
    assert run.select_system(None) == "elsewhere"
    with pytest.raises(InputError, match="runs/elsewhere: no system 'other'"):
        run.select_system("other")
    with pytest.raises(InputError, match="no predictions here"):
        read_run_predictions(tmp_path)
