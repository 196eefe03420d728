"""Perplexity on general texts: exact against a plain forward pass, kept, shared by ranks, tested by text."""

import json
import math
import os
import random
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import load_recipe, manifest_of, random_dialogue, remember, small_tokenizer, tiny_config
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from csc_train.checkpoints.manifest import save_final_model, write_manifest
from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn, data_digest
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.comparison import compare
from csc_train.evaluation.config import MetricsConfig
from csc_train.evaluation.general import TextScore, encode_texts, read_texts, run_scores, score_texts
from csc_train.evaluation.scoring import score_predictions
from csc_train.inference.config import InferenceConfig
from csc_train.inference.hf import HFGenerator
from csc_train.inference.predictions import Prediction
from csc_train.jsonl import write_jsonl
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "两加二？"},
    {"role": "assistant", "content": "四。"}, {"role": "user", "content": "And the square of it?"},
    {"role": "assistant", "content": "16, since 4 x 4 = 16."},
]  # fmt: skip
ROWS = [
    {"text": "The river rises in the hills and turns south below the old town. " * 6},
    {"text": "春天来了，花开了。"}, {"messages": CHAT}, {"text": "x"}, {"text": "Rain is likely in the evening."},
    *({"text": f"{number} 个苹果，{number} pears and a <|im_end|> in a text"} for number in range(9)),
]  # fmt: skip


def template_of(name):
    return DialogueTemplate(small_tokenizer(name), name, TemplateConfig())


def tiny(architecture, tokenizer, seed=1):
    torch.manual_seed(seed)
    return remember(AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, 0.3))).eval()


@pytest.fixture
def file(tmp_path):
    write_jsonl(tmp_path / "general.jsonl", ROWS)
    return str(tmp_path / "general.jsonl")


def plain_nll(model, ids, scored):
    """Nats of each scored token, by one forward pass over the text alone."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return [-logits[place - 1, ids[place]].item() for place in scored]


SCENES = {"qwen2_5": "qwen2", "llama3_1": "llama", "qwen3_5": "qwen3_5_text", "qwen3": "qwen3_moe"}


@pytest.mark.parametrize("name", SCENES)
@torch.inference_mode()
def test_each_likelihood_is_that_of_a_plain_forward_pass(name, file):
    """Whatever the batch: of several texts with padding, of one, and by pieces of 40 tokens with a cache."""
    template = template_of(name)
    model = tiny(SCENES[name], template.tokenizer)
    texts = encode_texts(read_texts(file), template)
    expected = [math.fsum(plain_nll(model, text.ids, text.scored)) for text in texts]
    asked = [(text.ids, text.scored) for text in texts]
    for settings in ({"batch_size": 5}, {"batch_size": 1}, {"max_batch_length": 40}):
        generator = HFGenerator(model, template, InferenceConfig(**settings))
        found = dict(generator.score_texts(asked))
        for number, text in enumerate(texts):
            error = abs(found[number] - expected[number]) / max(len(text.scored), 1)
            assert error < (1e-6 if settings != {"max_batch_length": 40} else 1e-5), (number, settings)
    # Negative controls: five tokens of padding, or all messages of the chat, are seen.
    padded, chat = [*texts[1].ids, *[0] * 5], texts[2].ids
    wrong = dict(generator.score_texts([(padded, range(1, len(padded))), (chat, range(1, len(chat)))]))
    assert wrong[0] > expected[1] + 1 and wrong[1] > expected[2] + 1


def test_a_long_text_is_scored_in_windows_that_share_a_token(file):
    template = template_of("qwen2_5")
    model = tiny("qwen2", template.tokenizer)
    (ids, scored), *_ = [(text.ids, text.scored) for text in encode_texts(read_texts(file), template)]
    generator = HFGenerator(model, template, InferenceConfig())
    generator._positions = 24
    windows = [ids[start : start + 24] for start in range(0, len(ids) - 1, 23)]
    assert len(windows) > 2 and sum(map(len, windows)) - len(windows) == len(ids) - 1 == len(scored)
    with torch.inference_mode():
        expected = math.fsum(sum(plain_nll(model, part, range(1, len(part)))) for part in windows)
    found = dict(generator.score_texts([(ids, scored), (ids[:1], [])]))
    assert found == {0: pytest.approx(expected, rel=1e-6), 1: 0}


@pytest.mark.parametrize("name", SCENES)
def test_of_a_chat_the_replies_and_the_ends_of_their_turns_are_scored(name, file):
    template = template_of(name)
    texts = encode_texts(read_texts(file), template)
    assert texts[2].ids == template.tokenizer.encode(template._render(CHAT), add_special_tokens=False)
    end = template.tokenizer.decode([template.end_of_turn_id])
    assert template.tokenizer.decode([texts[2].ids[place] for place in texts[2].scored]) == "".join(
        f"{each['content']}{end}" for each in CHAT if each["role"] == "assistant"
    )
    assert texts[3].scored == range(1, len(texts[3].ids)) and texts[0].ids == template.tokenizer.encode(ROWS[0]["text"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "evaluation.general={}: it holds no text: give it rows of text, or of messages"),
        ([{"text": "a"}, {"text": 5}], "{}, line 2: field text: Input should be a valid string: "),
        ([{"txt": "a"}], "{}, line 1: field text: missing: give one of the two: "),
        ([{"text": "a", "messages": CHAT}], "{}, line 1: field text: beside messages: give one of the two: "),
        ([{"text": " \n"}], "{}, line 1: field text: empty: "),
        ([{"text": "\ud800"}], "{}, line 1: field text: lone surrogate, which UTF-8 cannot hold: "),
        ([{"messages": CHAT[:2]}], "{}, line 1: field messages: none is of the assistant, and only those are scored: "),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "{}, line 1: field messages.0.role: Input should be "),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, rows, said):
    path = tmp_path / "bad.jsonl"
    write_jsonl(path, rows, ascii_only=True)
    with pytest.raises(InputError) as error:
        read_texts(str(path))
    assert str(error.value).startswith(said.format(path)) and "\n" not in str(error.value)


def test_a_missing_file_and_a_chat_that_a_template_refuses_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot read: No such file or directory"):
        read_texts(str(tmp_path / "none.jsonl"))
    write_jsonl(tmp_path / "twice.jsonl", [{"text": "a"}, {"messages": [*CHAT, CHAT[0]]}])
    template = template_of("llama3_1")
    template.chat_template = template.chat_template + "{{ raise_exception('No system message here') }}"
    with pytest.raises(InputError, match=r"twice\.jsonl, line 2: field messages: the chat template cannot .* message"):
        encode_texts(read_texts(str(tmp_path / "twice.jsonl")), template)


def scores(nll, tokens):
    return [TextScore(key, f"text {key}", *pair, "") for key, pair in enumerate(zip(nll, tokens, strict=True))]


SPOKEN = [Prediction("d1", 1, "reference", "", "a", 1, "a", 1, "a")]
DIALOGUES = {"d1": Dialogue("d1", (Turn(Speaker.CUSTOMER, "a"), Turn(Speaker.SUPPORTER, "a", STRATEGIES[0])))}


def test_the_perplexity_and_its_interval_by_hand():
    config = MetricsConfig(profiles=[], bootstrap_resamples=400)
    texts = scores([2.0, 6.0, 3.0] * 4, [4, 2, 1] * 4)
    found = score_predictions(SPOKEN, DIALOGUES, config, texts=texts)["likelihood"]["general perplexity"]
    assert found.value == pytest.approx(math.exp(11 / 7)) and (found.unit, found.direction) == ("per token", "lower")
    draws = numpy.random.default_rng(0).integers(12, size=(400, 12))
    nll, tokens = (numpy.array([2.0, 6.0, 3.0] * 4)[draws], numpy.array([4, 2, 1] * 4)[draws])
    values = numpy.exp(nll.sum(axis=1) / tokens.sum(axis=1))
    assert (found.low, found.high) == pytest.approx(tuple(numpy.quantile(values, [0.025, 0.975])))
    rest = {"evaluation.general names them": (), "the other one": None, "no text has two": scores([0], [0])}
    for reason, texts in rest.items():
        found = score_predictions(SPOKEN, DIALOGUES, config, texts=texts)["likelihood"]["general perplexity"]
        assert found.value is None and reason in found.reason


def test_two_systems_are_paired_by_text_and_once():
    worse = numpy.array([1.5, 2.5, 3.5] * 4)
    texts = scores(worse, [2] * 12), scores(worse - 1, [2] * 12)
    a = {context: [replace(each, context=context) for each in SPOKEN] for context in ("reference", "generated")}
    rows = compare(a, a, MetricsConfig(profiles=[]), 2000, texts=texts)
    once, again = [row for row in rows if row.metric == "general perplexity"]
    assert (once.context, once.turns, once.left_out) == ("reference", 12, 0) and "other one" in again.reason
    assert once.difference == pytest.approx(math.exp(15 / 12) - math.exp(9 / 12))
    # All texts differ in one direction: of 2**12 assignments, two are as extreme.
    assert once.low > 0 and once.p_value < 0.005 and once.verdict == "A is higher"
    others = scores(worse, [3] * 12), scores(worse[:11], [2] * 11), [replace(each, text_hash="") for each in texts[0]]
    for other in others:
        rows = compare(a, a, MetricsConfig(profiles=[]), 1000, texts=(texts[0], other))
        row = next(row for row in rows if row.metric == once.metric)
        assert row.p_value is None and "not over the same items" in row.reason


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a base, a model trained from it, dialogues and general texts."""
    directory = tmp_path_factory.mktemp("general")
    template, rng = template_of("qwen2_5"), random.Random(5)
    dialogues = [replace(random_dialogue(rng), id=str(number), source="test") for number in range(4)]
    write_dialogues(directory / "train.jsonl", dialogues[:2])
    write_dialogues(directory / "evaluation.jsonl", dialogues[2:])
    write_jsonl(directory / "general.jsonl", ROWS)
    facts = {"data_hash": data_digest(dialogues[:2]), "config": {}}
    for seed, name in enumerate(("base", "model")):
        options = template.tokenizer, template.chat_template, manifest_of(template, **facts)
        save_final_model(directory / name, tiny("qwen2", template.tokenizer, seed), *options)
    write_manifest(directory, manifest_of(template, **facts))  # as the run of a training, in which the evaluations lie
    before = os.getcwd()
    os.chdir(directory)
    yield directory
    os.chdir(before)


SETTINGS = [
    "checkpoint=model", "data=files", "data.train.path=train.jsonl", "data.evaluation.path=evaluation.jsonl",
    "evaluation.base=base", "evaluation.max_new_tokens=2", "evaluation.general=general.jsonl", "metrics.profiles=[zh]",
    "metrics.bootstrap_resamples=100", "run.if_exists=resume",
    "evaluation.contexts=[reference]", "evaluation.likelihoods=false",
]  # fmt: skip


def evaluate(*overrides):
    load_recipe("evaluate").main(compose("evaluate", list(overrides)))


def perplexities(run):
    results = json.loads((run / "results.json").read_text())["results"]
    return {name: row["reference"]["likelihood"]["general perplexity"]["value"] for name, row in results.items()}


@pytest.mark.slow
def test_an_evaluation_scores_base_and_model_goes_on_where_it_was_killed_and_knows_its_texts(place, monkeypatch):
    score, asked = HFGenerator.score_texts, []

    def killed(generator, texts):
        asked.append(len(texts))
        for count, found in enumerate(score(generator, texts)):
            if len(asked) == 2 and count == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(HFGenerator, "score_texts", killed)
    run = place / "runs" / "one"
    with pytest.raises(KeyboardInterrupt):
        evaluate(*SETTINGS, f"run.directory={run}")
    evaluate(f"run={run}", "resume=true")
    assert asked == [len(ROWS), len(ROWS), len(ROWS) - 5]
    assert [each.name for each in sorted((run / "general").iterdir())] == ["trained.jsonl", "untrained base.jsonl"]
    found = perplexities(run)
    assert list(found.values())[:2] == [None, None] and found["trained"] != found["untrained base"] > 1
    template = template_of("qwen2_5")
    texts = encode_texts(read_texts("general.jsonl"), template)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
        nll = math.fsum(math.fsum(plain_nll(model, text.ids, text.scored)) for text in texts)
    assert found["trained"] == pytest.approx(math.exp(nll / sum(len(text.scored) for text in texts)), rel=1e-6)
    assert "general perplexity ↓" in (run / "table.md").read_text()
    card = ModelCard.load(place / "model" / "README.md")
    assert "general perplexity ↓" in card.content and len(card.data.eval_results) > 3
    (run / "general" / "trained.jsonl").unlink()  # lost: found out, and scored again
    evaluate(f"run={run}", "resume=true")
    evaluate(f"run={run}", "score_only=true")
    again = perplexities(run)
    assert all(again[name] == (found[name] and pytest.approx(found[name], rel=1e-6)) for name in found)
    assert asked[3:] == [len(ROWS)]
    write_jsonl("general.jsonl", ROWS[1:])
    with pytest.raises(InputError, match=r"the run started with other data \(general\)"):
        evaluate(f"run={run}", "resume=true")


def test_a_bad_file_is_named_before_a_model_is_looked_for(place):
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(InputError, match=r"^broken\.jsonl, line 2: field text: "):
        evaluate(*SETTINGS, "checkpoint=nowhere", "evaluation.general=broken.jsonl", "run.directory=runs/bad")
    assert not (place / "runs" / "bad").exists()


class Rank:
    """As much of the state of a process as the scoring of texts asks for."""

    num_processes = 2

    def __init__(self, number):
        self.process_index, self.is_main_process = number, number == 0

    def wait_for_everyone(self):
        """The other rank, which came first."""


def test_two_ranks_share_the_texts(tmp_path, file):
    template = template_of("qwen2_5")
    texts = encode_texts(read_texts(file), template)
    generator = HFGenerator(tiny("qwen2", template.tokenizer), template, InferenceConfig())
    for number in (1, 0):
        score_texts(tmp_path, generator, texts, Rank(number), "trained")
    found = run_scores(tmp_path, "trained")
    assert [each.key for each in found] == list(range(len(ROWS))) and len(list((tmp_path / "general").iterdir())) == 1
    alone = dict(generator.score_texts([(text.ids, text.scored) for text in texts]))
    for each in found:
        assert each.nll == pytest.approx(alone[each.key], rel=1e-5) and each.tokens == len(texts[each.key].scored)
    with pytest.raises(InputError, match="of other settings"):
        score_texts(tmp_path, generator, texts[1:], Rank(0), "trained")
