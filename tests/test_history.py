"""The history of a run as a page: what it holds, when it is written, and how a browser shows it."""

import json
import math
import re

from csc_train.files import write_json
from csc_train.runs.comparison import MAX_POINTS
from csc_train.tracking import history
from csc_train.tracking.history import CURVES_FILE, MAX_STEPS, History, write_curves

MARKUP = "<b id=planted>您好</b>"


def data_of(folder) -> dict:
    page = (folder / CURVES_FILE).read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def reply(turn, strategy, text, dialogue="a"):
    return {
        "dialogue_id": dialogue, "turn": turn, "customer": "在吗？" if turn else "", "reference_strategy": "问候",
        "strategy": strategy, "reference_response": "您好，请问有什么可以帮您？", "response": text,
    }  # fmt: skip


def test_every_metric_is_in_one_panel_and_no_spike_is_thinned_away(tmp_path):
    rows = [
        {"step": step, "time": 0.0, "loss": 1.0 + step % 7 / 100, "own/a": 1, "own/b": 2} for step in range(1, 5001)
    ]
    rows[3210]["loss"], rows[2000]["loss"], rows[100]["loss"] = 9.0, 0.1, math.nan
    rows[499] |= {"eval_loss": 1.5, "eval_runtime": 2.0}
    write_curves(tmp_path, rows)
    panels = {each["title"]: each for each in data_of(tmp_path)["panels"]}
    assert {title: [each["name"] for each in panel["series"]] for title, panel in panels.items()} == {
        "Loss, nats per token": ["loss", "eval_loss"], "own": ["a", "b"], "eval_runtime": ["eval_runtime"],
    }  # fmt: skip
    assert [title for title, panel in panels.items() if panel["main"]] == ["Loss, nats per token"]
    loss, validation = (each["points"] for each in panels["Loss, nats per token"]["series"])
    assert {(1, 1.01), (3211, 9.0), (2001, 0.1), (5000, 1.02)} <= set(map(tuple, loss)) and len(loss) <= MAX_POINTS
    assert loss == sorted(loss) and validation == [[500, 1.5]]


def test_the_page_holds_the_replies_by_step_and_the_alerts(tmp_path):
    log = History(tmp_path)
    for step in range(1, 2 * MAX_STEPS + 2):
        log.log_table("generated", [reply(0, None, str(step)), reply(2, "问候", "好")], step)
    write_json(tmp_path / "run.json", {"alerts": [{"rule": "loss_spike", "step": 3, "message": "too high"}]})
    log.log(1, {"loss": 1.0})
    log.close()
    data = data_of(tmp_path)
    assert data["alerts"][0]["message"] == "too high"
    (table,) = data["tables"]
    assert table["title"] == "Dialogues in generated context"
    assert table["steps"][0] == 1 and table["steps"][-1] == 2 * MAX_STEPS + 1 and len(table["steps"]) <= MAX_STEPS + 1
    first, second = table["turns"]
    assert (first["replies"]["1"], second["replies"]["1"]) == ([None, "1"], ["问候", "好"])
    assert [*map(int, first["replies"])] == table["steps"] and second["customer"] == "在吗？"


def test_the_page_is_written_after_a_validation_and_seldom_else(tmp_path, monkeypatch):
    log = History(tmp_path)
    log.log(1, {"loss": 1.0})
    assert not (tmp_path / CURVES_FILE).exists()
    log.log(2, {"eval_loss": 1.0})
    assert "The training runs: this page is of step 2." in (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    log.log(3, {"eval_loss": 1.0})  # a page takes a share of the time
    log.log(4, {"loss": 1.0})
    assert "of step 2." in (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    monkeypatch.setattr(history, "PAGE_SHARE", 0)
    log.log(5, {"loss": 1.0})
    assert "of step 2." in (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    log.log(6, {"eval_loss": 1.0})
    assert "of step 6." in (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    monkeypatch.setattr(history, "PAGE_SECONDS", 0)
    log.log(7, {"loss": 1.0})
    assert "of step 7." in (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    log.close()
    page = (tmp_path / CURVES_FILE).read_text(encoding="utf-8")
    assert "7 optimizer steps." in page and "The training runs" not in page


def test_the_page_shows_curves_and_replies(tmp_path, browser):
    log, run = History(tmp_path / "run"), tmp_path / "run"
    for step in range(1, 41):
        log.log(step, {"loss": 100 / step, "grad_norm": 1.0 * step, "own": step, "learning_rate": step * 6.25e-5})
    for step, answer in ((10, MARKUP), (20, MARKUP), (40, "您好，请问有什么可以帮您？")):
        log.log_table("samples", [reply(0, None if step < 40 else "问候", answer), reply(2, "其他", "再见")], step)
    write_json(run / "run.json", {"alerts": [{"rule": "loss_spike", "step": 3, "message": MARKUP}]})
    log.close()
    page, said, asked = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme="dark"), [], []
    for event in ("console", "pageerror"):
        page.on(event, lambda message: said.append(str(message)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / CURVES_FILE).as_uri())
    assert page.locator("#alerts li").inner_text() == f"step 3: {MARKUP}" and page.locator("#planted").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    charts = page.locator("#panels svg")
    assert charts.count() == 3 and charts.first.bounding_box()["width"] > 300
    labels = charts.last.locator("text")
    assert "0.0025" in labels.all_text_contents()
    assert all(each.bounding_box()["x"] >= charts.last.bounding_box()["x"] for each in labels.all())

    # Values under the pointer, by keyboard too
    caption, box = page.locator("#panels figcaption").first, charts.first.bounding_box()
    assert caption.inner_text().split() == ["Loss,", "nats", "per", "token", "optimizer", "step", "40", "loss", "2.5"]
    page.mouse.move(box["x"] + 50, box["y"] + 60)
    assert caption.inner_text().split()[-4:] == ["step", "1", "loss", "100"]
    charts.first.press("ArrowRight")
    assert caption.inner_text().split()[-4:] == ["step", "2", "loss", "50"]
    line = charts.first.locator("path")
    linear = line.get_attribute("d")
    page.check("#log")
    assert page.locator("#panels path").first.get_attribute("d") != linear
    assert page.locator("#others svg").count() == 0
    page.locator("#more summary").click()
    assert page.locator("#others figcaption").inner_text().split()[-2:] == ["own", "40"]

    # Replies beside their references, at each step
    cards, score, slider = page.locator("article"), page.locator(".score"), page.locator("input[type=range]")
    assert cards.count() == 2 and score.inner_text() == "Strategy as in the reference: 1 of 2 turns"
    shown = cards.first.locator(".pair > div")
    assert [each.split("\n")[1] for each in shown.all_inner_texts()] == ["问候", "问候 ✓"]
    slider.press("Home")
    assert page.locator("output").inner_text() == "10" and score.inner_text().endswith(" 0 of 2 turns")
    assert "no strategy ✗" in shown.last.inner_text() and MARKUP in shown.last.inner_text()
    cards.first.locator("summary").click()
    entries = cards.first.locator("li").all_inner_texts()
    assert [each.split("\n")[0] for each in entries] == ["steps 10 to 20", "step 40"]
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
    page.emulate_media(color_scheme="light")
    colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(20, 23, 29)", "rgb(255, 255, 255)"]
    assert said == [] and len(asked) == 1
