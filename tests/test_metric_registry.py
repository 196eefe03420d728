"""`@metric`: metrics from outside the package, in every table; invalid registrations are refused."""

import json
import re
import sys

import pytest

from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.evaluation.comparison import compare
from csc_train.evaluation.config import PROFILES, MetricsConfig
from csc_train.evaluation.metrics import registry
from csc_train.evaluation.report.html import write_html
from csc_train.evaluation.report.tables import console_table, results_markdown, write_results
from csc_train.evaluation.scoring import score_run
from csc_train.inference.predictions import Prediction, write_predictions
from csc_train.plugins import load_plugins

PLUGIN = '''
"""A user's metrics."""
import numpy
from csc_train.evaluation.metrics.base import Metric
from csc_train.evaluation.metrics.registry import metric
from csc_train.stats import mean

@metric(name="polite", unit="turns", direction="higher", profiles=["zh"], by_position=True)
def polite(table):
    """The reply addresses the customer politely."""
    return 100.0 * numpy.array(["您" in reply for reply, _ in table.pairs])

@metric(name="questions", unit="turns", direction="lower", profiles=["reply"])
def questions(table, config):
    """The reply asks a question."""
    return Metric(mean([100.0 * ("？" in reply) for reply, _ in table.pairs]), f"asked, {config.batch_size}")
'''
DIALOGUES = generate_sample(12, seed=5)


def predictions(context, asks):
    return [
        Prediction(
            dialogue.id, turn, context, "p", "", 1, "好的？" if asks else "您好",
            dialogue.turns[turn].strategy.number, dialogue.turns[turn].text,
        )
        for dialogue in DIALOGUES
        for turn in dialogue.supporter_turns
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    """A registry that a test may add to."""
    monkeypatch.setattr(registry, "METRICS", list(registry.METRICS))
    return registry.METRICS


@pytest.fixture
def run(tmp_path):
    write_dialogues(tmp_path / "dialogues.jsonl", DIALOGUES)
    for context in ("reference", "generated"):
        write_predictions(tmp_path / f"predictions/trained-{context}.jsonl", predictions(context, asks=True))
    (tmp_path / "my_metrics.py").write_text(PLUGIN, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_metric_from_outside_is_in_tables_report_json_and_comparison(run):
    load_plugins([str(run / "my_metrics.py")])
    config = MetricsConfig(bootstrap_resamples=100)
    scored = score_run(run, config)
    write_results(run, scored.results, scored.drifts, {})
    polite = json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]["trained"]["reference"]
    cell = polite["profiles"]["zh"]["polite"]
    assert (cell["value"], cell["unit"], cell["direction"]) == (0, "turns", "higher")
    assert cell["signature"] == "The reply addresses the customer politely"
    asked = polite["reply"]["questions"]
    assert asked["system"]["value"] == 100 and asked["system"]["signature"] == "asked, 64"
    expected = 100 * sum("？" in each.reference_response for each in predictions("reference", True))
    assert asked["reference"]["value"] == pytest.approx(expected / len(predictions("reference", True)))
    assert polite["by_position"][0]["polite"]["value"] == 0 and scored.drifts["trained"][0]["polite"].value == 0
    markdown = results_markdown(scored.results, scored.drifts)
    assert "ref polite" in markdown and "| questions ↓ |" in markdown and "drift of polite" in markdown
    assert "ref\npolite" in [str(column.header) for column in console_table(scored.results, "zh").columns]
    settings = {"checkpoint": None, "predictions": "x", "llm": None, "data": None, "evaluation": {}}
    write_html(run, scored, settings, {"started": "now", "provenance": {"commit": None, "versions": {}}})
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '"polite"' in page and "questions ↓" in page and "The reply asks a question" not in page
    sides = [{"reference": predictions("reference", asks)} for asks in (True, False)]
    rows = {row.metric: row for row in compare(*sides, config, permutations=1000)}
    assert rows["zh polite"].verdict == "B is higher" and rows["questions"].verdict == "A is higher"
    assert (rows["questions"].direction, rows["questions"].unit) == ("lower", "turns")


def test_a_module_is_a_plugin_too_and_is_imported_once(run, monkeypatch):
    monkeypatch.syspath_prepend(run)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    for _ in range(2):
        assert load_plugins(["my_metrics"]) == ["my_metrics"]
    assert [spec.name for spec in registry.METRICS[-2:]] == ["polite", "questions"]
    assert len(registry.metrics_in_profiles(["zh"])) == 8


def decorated(**fields):
    registry.metric(**{"name": "mine", "unit": "turns", "direction": "higher", "profiles": ["zh"]} | fields)(len)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "R-L char"},
            "name 'R-L char' is taken in profile zh by csc_train.evaluation.metrics.lexical.zh_rouge",
        ),
        ({"name": ""}, "the field 'name' is missing; give name"),
        ({"profiles": []}, "the field 'profiles' is missing"),
        ({"profiles": ["zk"]}, "profiles=zk: choose one of paper, zh, en, strategy, .* Did you mean 'zh'?"),
        ({"direction": "highest"}, "direction=highest: choose one of higher, lower, none. Did you mean 'higher'?"),
        ({"units": "turns"}, "unknown field 'units'. Did you mean 'unit'?"),
        ({"function": len}, "unknown field 'function'"),
    ],
)
def test_an_invalid_registration_is_refused(fields, message):
    with pytest.raises(InputError, match=f"^@metric of .*: {re.escape(message)}".replace(r"\.\*", ".*")):
        decorated(**fields)
    assert "mine" not in [spec.name for spec in registry.METRICS]


def test_the_same_name_in_another_profile_is_free():
    decorated(name="R-L char", profiles=["paper"])
    assert [spec.name for spec in registry.metrics_in_profiles(["paper"])][-1] == "R-L char"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1 / 0", "cannot be imported: ZeroDivisionError"),
        ("x = 1", "registers nothing: follow a checklist of docs/extending.md"),
        ("import csc_train.packing.loss_weights", "registers nothing"),
        (PLUGIN.replace('["zh"]', '["zhh"]'), "profiles=zhh: choose one of"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused(tmp_path, source, message):
    (tmp_path / "plugin.py").write_text(source, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_plugins([str(tmp_path / "plugin.py")])
    with pytest.raises(InputError, match=r"^plugins=.*none\.py: no such file"):
        load_plugins([str(tmp_path / "none.py")])
    with pytest.raises(InputError, match=r"^plugins=no_such_module: cannot be imported: ModuleNotFoundError"):
        load_plugins(["no_such_module"])


def test_every_built_in_metric_is_registered_once_in_column_order():
    names = {profile: [spec.name for spec in registry.metrics_in_profiles([profile])] for profile in PROFILES}
    assert names == {
        "paper": ["B-2", "B-4", "R-L", "BS", "BR", "ACC"],
        "zh": ["B-2", "B-4", "R-L char", "R-L word", "BS", "BS rescaled", "ACC"],
        "en": ["B-2", "B-4", "R-L", "BS", "BR", "ACC"],
    }
    lower = {spec.name for spec in registry.METRICS if spec.direction == "lower"}
    process = {"repeated strategy", "stage regressions", "new numbers", "placeholders invented", "placeholders filled"}
    assert lower == {"ECE", "AURC", "NLL", "perplexity", "general perplexity", "preference bias", *process}
