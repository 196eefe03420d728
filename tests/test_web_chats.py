"""Chats that the customer opens, with several messages in a row: trained, evaluated, exported, judged and talked to."""

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import load_recipe, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker
from csc_train.data.readers import read_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.hf import load_final_model
from csc_train.inference.predictions import read_outcomes
from csc_train.runs.claim import release_all

pytestmark = pytest.mark.slow
TRAINING = [
    "model=qwen2_5_7b", "model.path=base", "trainer=lora", "data=files", "data.train.path=chats.jsonl",
    "data.evaluation.path=held_out.jsonl", "trainer.max_steps=2", "trainer.learning_rate=0.03",
    "trainer.packs_per_step=2", "packing.max_length=1200",
    "tracking=off", "validation.eval_steps=1", "validation.num_turns=8", "validation.num_samples=1",
    "run.directory=run",
]  # fmt: skip
TOKENS = "max_new_tokens=16"
EVALUATION = [
    "checkpoint=run", f"evaluation.{TOKENS}", "metrics.profiles=[zh]", "metrics.bootstrap_resamples=100",
    "run.directory=evaluation",
]  # fmt: skip
CONTEXTS = ("reference", "generated")


def web_chat(dialogue: Dialogue) -> dict:
    """The row of a dialogue without its greeting; each turn of two clauses is two messages."""
    row, greeting, messages = dialogue.row(), dialogue.turns[0], []
    assert greeting.speaker is Speaker.SUPPORTER
    for number, turn in enumerate(row["dialogue"][1:]):
        first, clause, rest = turn["text"].partition("，")
        texts = [first + clause, rest] if rest else [first]
        labels = [turn["strategy"], "其它" if number % 4 == 1 else turn["strategy"]] if turn["strategy"] else ["", ""]
        messages += [turn | {"text": text, "strategy": label} for text, label in zip(texts, labels, strict=False)]
    return row | {"dialogue": messages}


def run(recipe: str, *arguments: str) -> None:
    load_recipe(recipe).main(compose(recipe, list(arguments)))


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a base, chats, a training on them in `run`, and its evaluation."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("chats"))
    tokenizer = small_tokenizer("qwen2_5")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("qwen2", tokenizer, 0.5)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    chats = [json.dumps(web_chat(each)) + "\n" for each in generate_sample(14, 0)]
    Path("chats.jsonl").write_text("".join(chats[:8]), "utf-8")
    Path("held_out.jsonl").write_text("".join(chats[8:]), "utf-8")
    run("sft", *TRAINING)
    run("evaluate", *EVALUATION)
    yield
    release_all()
    os.chdir(before)


def test_they_are_joined_and_trained_whole(workplace):
    assert not list(Path("run").glob("rejected*"))
    for chat, row in zip(read_dialogues("held_out.jsonl", strict=True), lines("held_out.jsonl"), strict=True):
        assert chat.turns[0].speaker is Speaker.CUSTOMER and len(chat.turns) < len(row["dialogue"])
        assert "".join(turn.text for turn in chat.turns).replace(" ", "") == "".join(
            turn["text"] for turn in row["dialogue"]
        )
    losses = [row["loss"] for row in lines("run/history.jsonl") if "loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    with pytest.raises(InputError, match=r"every row is rejected; .*the same speaker twice in a row"):
        run("sft", *TRAINING, "data.merge_turns=off", "run.directory=other")


def test_both_contexts_begin_with_the_customer(workplace):
    chats = {chat.id: chat for chat in read_dialogues("evaluation/dialogues.jsonl", strict=True)}
    kept = [turn for row in lines("evaluation/dialogues.jsonl") for turn in row["dialogue"]]
    assert any(turn.get("accepted", [])[1:] for turn in kept)
    template = load_final_model("run/model").template
    first = {}
    for context in CONTEXTS:
        outcomes = read_outcomes(f"evaluation/predictions/trained-{context}.jsonl")
        assert [each.turn for each in outcomes] == [turn for chat in chats.values() for turn in chat.supporter_turns]
        assert all(len(each.label_log_likelihoods) == 12 for each in outcomes)
        first[context] = [each.prompt_hash for each in outcomes if each.turn == 1]
    assert first["reference"] == first["generated"]
    assert first["reference"] == [digest(template.prompt_ids(chat.turns[:1])) for chat in chats.values()]
    assert len(set(first["reference"])) > 1


def test_they_are_exported_and_talked_to(workplace, monkeypatch, capsys):
    run("export", "source=run", "output=exported")
    (chat, *_) = read_dialogues("evaluation/dialogues.jsonl")
    said = [turn.text for turn in chat.turns if turn.speaker is Speaker.CUSTOMER]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in said)))
    capsys.readouterr()
    run("chat", "checkpoint=exported", "opening=customer", TOKENS, "save=talk.jsonl")
    output = capsys.readouterr().out
    assert output.lstrip().startswith(f"客户> {said[0]}")
    (talk,) = read_dialogues("talk.jsonl", strict=True)
    own = [
        each for each in read_outcomes("evaluation/predictions/trained-generated.jsonl") if each.dialogue_id == chat.id
    ]
    replies = [turn.text for turn in talk.turns if turn.speaker is Speaker.SUPPORTER]
    # An empty reply removes the customer's message, so only whole conversations are compared.
    assert replies == [each.response for each in own][: len(replies)] and len(replies) >= 2


def test_they_are_compared_judged_and_read_by_people(workplace, fault_server):
    pair = ["evaluation", "evaluation", "system_a=untrained base"]
    run("compare", *pair, "metrics.profiles=[zh]", "permutations=1000", "run.directory=compared")
    asked = []

    def answer(body):
        asked.append(body["messages"][-1]["content"])
        return '{"reason": "-", "better": "1"}'

    fault_server.answer = answer
    server = ["llm=openai", f"llm.base_url={fault_server.base_url}", "llm.model=x", "llm.api_key_env=null"]
    few = ["judge.tasks=[pairwise]", "judge.num_turns=4", "judge.permutations=1000", "judge.bootstrap_resamples=100"]
    run("judge", *pair, *server, *few, "run.directory=judged")
    assert asked and all(question.startswith("<上文>\n客户：") for question in asked)
    run("human_eval", "export", *pair, "human.num_items=4", "run.directory=form")
    (page,) = Path("form").glob("*.html")
    histories = re.findall(r'"history": ?\[\[(\w+),', page.read_text("utf-8"))
    assert histories and set(histories) == {"false"}  # the customer's
    assert "report.html" in os.listdir("evaluation")
