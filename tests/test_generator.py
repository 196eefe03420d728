"""The turn queue in both contexts, the baselines, and batched generation by a local model."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import manifest_of, random_dialogue, remember, sampled, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2ForCausalLM

from csc_train.checkpoints.base_model import find_base
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import save_final_model
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.sample_grammar import generate_sample
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.files import digest
from csc_train.inference.baselines import StrategyBaseline
from csc_train.inference.generator import TurnQueue, TurnRequest, generate_predictions, shard_dialogues
from csc_train.inference.hf import (
    HFGenerator,
    load_final_model,
    load_generator,
    read_template,
)
from csc_train.inference.predictions import (
    FailedTurn,
    Prediction,
    PredictionStore,
    build_prediction,
    read_external_replies,
    read_outcomes,
    write_predictions,
)
from csc_train.jsonl import write_jsonl
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.reply import Reply


def dialogue(name, *turns):
    """Supporter turns are (strategy number, text), customer turns are texts."""
    return Dialogue(
        name,
        tuple(
            Turn(Speaker.CUSTOMER, turn)
            if isinstance(turn, str)
            else Turn(Speaker.SUPPORTER, turn[1], STRATEGIES[turn[0] - 1])
            for turn in turns
        ),
    )


SHORT = dialogue("short", (1, "您好"))
MIDDLE = dialogue("middle", (1, "您好"), "订单没到", (5, "很抱歉"), "快点")
LONG = dialogue("long", (1, "欢迎"), "退款", (4, "哪一单？"), "昨天那单", (8, "已退款"), "谢谢", (11, "再见"))
DIALOGUES = [MIDDLE, SHORT, LONG]
STEPS = 6
"""Maximum tokens of a local model's reply."""
TURNS = [("middle", 0), ("middle", 2), ("short", 0), ("long", 0), ("long", 2), ("long", 4), ("long", 6)]


class Recorder:
    """Replies differently at every turn, and records its requests by batch."""

    predicts_strategy = True
    config_hash = "recorder"

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.batches = []

    def run(self, queue):
        while requests := queue.pop(self.batch_size):
            self.batches.append(requests)
            for request in requests:
                queue.complete(request, self.predict(request))

    def predict(self, request):
        return request.prediction(*self.words(request.dialogue.id, request.turn))

    @staticmethod
    def words(name, turn):
        """Raw text, reply and prompt hash."""
        reply = Reply(STRATEGIES[(len(name) + turn) % 12], f"我在{name}的第{turn}句")
        return f"raw {name} {turn}", reply, digest([name, turn])

    @property
    def requests(self):
        return {(request.dialogue.id, request.turn): request for batch in self.batches for request in batch}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("context", ["reference", "generated"])
def test_every_supporter_turn_once_in_order(context, batch_size):
    generator = Recorder(batch_size)
    predictions = generate_predictions(DIALOGUES, generator, context)
    assert [(p.dialogue_id, p.turn) for p in predictions] == TURNS
    assert sorted((r.dialogue.id, r.turn) for batch in generator.batches for r in batch) == sorted(TURNS)
    golds = {name.id: name for name in DIALOGUES}
    for prediction in predictions:
        raw_text, reply, prompt_hash = generator.words(prediction.dialogue_id, prediction.turn)
        gold = golds[prediction.dialogue_id].turns[prediction.turn]
        assert prediction == Prediction(
            dialogue_id=prediction.dialogue_id,
            turn=prediction.turn,
            context=context,
            prompt_hash=prompt_hash,
            raw_text=raw_text,
            strategy=reply.strategy.number,
            response=reply.response,
            reference_strategy=gold.strategy.number,
            reference_response=gold.text,
            config_hash="recorder",
        )


def test_reference_context_is_gold_throughout():
    generator = Recorder(2)
    generate_predictions(DIALOGUES, generator, "reference")
    for request in generator.requests.values():
        assert request.history == request.dialogue.turns[: request.turn]


def test_generated_context_holds_the_systems_replies_and_the_gold_customer_turns():
    generator = Recorder(2)
    own = {each.key: each for each in generate_predictions(DIALOGUES, generator, "generated")}
    assert all(own[key].raw_text == Recorder.words(*key)[0] for key in TURNS)
    assert generator.requests["long", 6].history == (
        own["long", 0], Turn(Speaker.CUSTOMER, "退款"),
        own["long", 2], Turn(Speaker.CUSTOMER, "昨天那单"),
        own["long", 4], Turn(Speaker.CUSTOMER, "谢谢"),
    )  # fmt: skip
    assert generator.requests["middle", 2].history == (own["middle", 0], Turn(Speaker.CUSTOMER, "订单没到"))
    for name in ("long", "middle", "short"):
        assert generator.requests[name, 0].history == ()


def test_dialogues_that_were_begun_come_first_and_one_turn_of_each_at_a_time():
    def batches(context, batch_size):
        generator = Recorder(batch_size)
        generate_predictions(DIALOGUES, generator, context)
        return [[(request.dialogue.id, request.turn) for request in batch] for batch in generator.batches]

    # The n-th reply of a dialogue waits for its own n-1st; long dialogues begin first.
    assert batches("generated", 100) == [
        [("long", 0), ("middle", 0), ("short", 0)], [("long", 2), ("middle", 2)], [("long", 4)], [("long", 6)],
    ]  # fmt: skip
    assert batches("generated", 2) == [
        [("long", 0), ("middle", 0)], [("long", 2), ("middle", 2)], [("long", 4), ("short", 0)], [("long", 6)],
    ]  # fmt: skip
    # The last turns first: all earlier histories are the beginning of theirs.
    assert batches("reference", 2) == [
        [("long", 6), ("middle", 2)], [("long", 4), ("middle", 0)], [("long", 2), ("short", 0)], [("long", 0)],
    ]  # fmt: skip
    # Two turns of a dialogue at a time where there are not enough dialogues.
    assert batches("reference", 100) == [
        [("long", 6), ("middle", 2), ("short", 0), ("long", 4), ("middle", 0), ("long", 2), ("long", 0)]
    ]


@pytest.mark.parametrize("context", ["reference", "generated"])
def test_many_requests_can_wait_for_answers_that_come_in_any_order(context):
    generator = Recorder(1)
    queue = TurnQueue(DIALOGUES, context, generator.config_hash, generator.predicts_strategy)
    rng, waiting, seen = random.Random(3), [], []
    while not queue.finished:
        while taken := queue.pop(1):
            waiting += taken
            seen += taken
        request = waiting.pop(rng.randrange(len(waiting)))
        queue.complete(request, generator.predict(request))
    assert waiting == [] and queue.pop(1) == []
    assert queue.outcomes() == generate_predictions(DIALOGUES, generator, context)
    assert len(seen) == 7


class Flaky(Recorder):
    """Fails at one turn."""

    def run(self, queue):
        while requests := queue.pop(self.batch_size):
            for request in requests:
                failed = (request.dialogue.id, request.turn) == ("long", 2)
                queue.complete(request, request.failure("timeout", "60 s") if failed else self.predict(request))


def test_a_failed_turn_fails_the_rest_of_its_dialogue_only_in_generated_context():
    for context, kinds in {
        "reference": {("long", 2): "timeout"},
        "generated": {("long", 2): "timeout", ("long", 4): "earlier_turn_failed", ("long", 6): "earlier_turn_failed"},
    }.items():
        outcomes = generate_predictions(DIALOGUES, Flaky(2), context)
        assert [(o.dialogue_id, o.turn) for o in outcomes] == TURNS
        assert {(o.dialogue_id, o.turn): o.kind for o in outcomes if isinstance(o, FailedTurn)} == kinds


def test_a_generator_that_leaves_turns_out_is_refused():
    class Lazy(Recorder):
        def run(self, queue):
            queue.pop(2)

    with pytest.raises(RuntimeError, match="7 of 7 turns are neither predicted nor failed"):
        generate_predictions(DIALOGUES, Lazy(1), "reference")
    with pytest.raises(InputError, match="1 have the id of another one"):
        generate_predictions([LONG, LONG], Recorder(1), "reference")


def test_shards_cover_all_dialogues_and_have_about_as_many_turns():
    rng = random.Random(0)
    many = [replace(random_dialogue(rng), id=str(number)) for number in range(40)]
    shares = [shard_dialogues(many, process, 3) for process in range(3)]
    assert sorted(d.id for each in shares for d in each) == sorted(d.id for d in many)
    turns = [sum(len(d.supporter_turns) for d in each) for each in shares]
    assert max(turns) - min(turns) <= 1
    assert shard_dialogues(many[:1], 1, 2) == []


def test_a_reply_without_a_strategy_is_kept_as_unparsed():
    class Silent(Recorder):
        @staticmethod
        def words(name, turn):
            return "嗯", Reply(None, "嗯"), "hash"

    assert [p.strategy for p in generate_predictions(DIALOGUES, Silent(4), "generated")] == [None] * 7


def test_no_dialogues_no_predictions():
    for context in ("reference", "generated"):
        generator = Recorder(4)
        assert generate_predictions([], generator, context) == []
        assert generator.batches == []


# Strategies by turn: 1 4 8, 1 4 11, 1 5 8, 2 4 8. Most frequent: 1, 4 and 8 three times each, so the first of them.
TRAINING = [
    dialogue("a", (1, "您好"), "问", (4, "哪个？"), "那个", (8, "已办")),
    dialogue("b", (1, "您好"), "问", (4, "哪一个？"), "那个", (11, "再见")),
    dialogue("c", (1, "欢迎"), "问", (5, "抱歉"), "好", (8, "已退")),
    dialogue("d", (2, "贵姓"), "问", (4, "哪个？"), "那个", (8, "已办")),
]


def said(strategy, text="我的话"):
    return build_prediction(LONG, 0, "generated", text, Reply(strategy and STRATEGIES[strategy - 1], text), "hash")


def chosen(generator, *histories):
    answers = [generator.predict(TurnRequest(LONG, 0, "generated", tuple(history))) for history in histories]
    return [(answer.strategy, answer.response) for answer in answers]


def test_most_frequent_strategy_with_its_stock_reply():
    generator = StrategyBaseline(TRAINING, order=0)
    assert chosen(generator, (), LONG.turns[:2], LONG.turns[:4]) == [(1, "您好")] * 3
    assert generator.predicts_strategy
    # One more of strategy 4 settles it; its replies are then 哪个？ twice and 哪一个？ twice: the smaller text.
    more = [*TRAINING, dialogue("e", (4, "哪一个？"))]
    assert chosen(StrategyBaseline(more, order=0), ()) == [(4, "哪一个？")]
    assert min("哪个？", "哪一个？") == "哪一个？"


def test_bigram_follows_the_previous_strategy():
    generator = StrategyBaseline(TRAINING, order=1)
    opening, question, customer = LONG.turns[0], LONG.turns[2], LONG.turns[1]
    assert chosen(generator, (), (opening, customer), (opening, customer, question, customer)) == [
        (1, "您好"),  # openings: 1 three times, 2 once
        (4, "哪个？"),  # after 1: 4 twice, 5 once
        (8, "已办"),  # after 4: 8 twice, 11 once
    ]
    never_followed = (Turn(Speaker.SUPPORTER, "再见", STRATEGIES[10]), customer)
    never_seen = (Turn(Speaker.SUPPORTER, "评价", STRATEGIES[8]), customer)
    assert chosen(generator, never_followed, never_seen) == [(1, "您好")] * 2


def test_bigram_believes_the_systems_own_strategy():
    generator = StrategyBaseline(TRAINING, order=1)
    customer = LONG.turns[1]
    assert chosen(generator, (said(1), customer), (said(4), customer), (said(5), customer)) == [
        (4, "哪个？"),
        (8, "已办"),
        (8, "已办"),
    ]
    # A reply without a strategy is followed like the start of a talk: nothing is known of what came before.
    assert chosen(generator, (LONG.turns[2], customer, said(None), customer)) == [(1, "您好")]


def test_bigram_in_both_contexts():
    generator = StrategyBaseline(TRAINING, order=1)
    gold = [p.strategy for p in generate_predictions([LONG], generator, "reference")]
    assert gold == [1, 4, 8, 1]  # after the gold 8, which nothing follows in training: the most frequent
    off_course = dialogue("x", (2, "贵姓"), "问", (11, "再见"), "好", (5, "抱歉"))
    assert [p.strategy for p in generate_predictions([off_course], generator, "reference")] == [1, 4, 1]
    generated = generate_predictions([off_course], generator, "generated")
    assert [p.strategy for p in generated] == [1, 4, 8]
    assert [p.raw_text for p in generated] == ["[礼貌问候]您好", "[细化问题]哪个？", "[解决实施]已办"]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer("qwen2_5")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    return Qwen2ForCausalLM(tiny_config("qwen2", tokenizer, 0.5)).eval()


@pytest.fixture(scope="module")
def odd_dialogues():
    rng = random.Random(5)
    drawn = (random_dialogue(rng) for _ in range(100))
    return [each for each in drawn if len(each.turns) in (1, 3, 5)][:3]


def generator_of(model, tokenizer, mode="joint", **settings):
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig(mode=mode))
    return HFGenerator(model, template, EvaluationConfig(**{"max_new_tokens": STEPS, "batch_size": 5} | settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>先想想[情感管理]", (None, "")),
        ("\n<think>\n先想想\n</think>\n\n[情感管理]抱歉", (5, "抱歉")),
        ("先想想</think>[情感管理]抱歉", (5, "抱歉")),
        ("[情感管理]抱歉<think>", (5, "抱歉<think>")),
    ],
)
def test_thoughts_are_no_reply(text, expected, model, tokenizer, tmp_path, monkeypatch):
    """Whether a local model wrote them or another program."""
    generator = generator_of(model, tokenizer)
    monkeypatch.setattr(generator, "decode", lambda ids: text)
    found = generate_predictions(DIALOGUES, generator, "reference")
    assert {(each.strategy, each.response) for each in found} == {expected}
    assert {each.raw_text for each in found} == {text} and all(each.cut_off for each in found if each.token_ids[5:])
    rows = [{"dialogue_id": name, "turn": turn, "text": text} for name, turn in TURNS]
    write_jsonl(tmp_path / "replies.jsonl", rows)
    found = read_external_replies(tmp_path / "replies.jsonl", DIALOGUES, "reference")
    assert {(each.strategy, each.response) for each in found} == {expected}


def is_greedy(model, prompt, answer, steps, stops):
    """Whether each token of `answer` is the likeliest one in a single unpadded forward pass."""
    with torch.inference_mode():
        scores = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    best = scores.argmax(-1)[len(prompt) - 1 :].tolist()
    return tuple(best[:-1]) == answer and (len(answer) == steps or best[-1] in stops)


def asked(generator, dialogues, context):
    """The predictions, with the (request, answer) pairs that led to them by dialogue and turn."""
    exchanges = {}

    class Listening(TurnQueue):
        def complete(self, request, outcome):
            exchanges[request.dialogue.id, request.turn] = request, outcome
            super().complete(request, outcome)

    queue = Listening(dialogues, context, generator.config_hash, generator.predicts_strategy)
    generator.run(queue)
    return queue.outcomes(), exchanges


@pytest.mark.parametrize("architecture", sampled(["qwen3_5_moe_text", "qwen2", "qwen3_5_text", "qwen3_moe"], 4))
@pytest.mark.parametrize("context", sampled(["generated", "reference"], 2))
def test_batched_generation_equals_one_by_one(tokenizer, odd_dialogues, context, architecture):
    torch.manual_seed(1)
    model = remember(AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, 0.5))).eval()
    batched, exchanges = asked(generator_of(model, tokenizer), odd_dialogues, context)
    single = generate_predictions(odd_dialogues, generator_of(model, tokenizer, batch_size=1), context)
    assert batched == single
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    prompts = {}
    for place, (request, answer) in exchanges.items():
        prompts[place] = template.prompt_ids(
            [turn if isinstance(turn, Turn) else turn.token_ids for turn in request.history]
        )
        assert is_greedy(model, prompts[place], answer.token_ids, STEPS, {tokenizer.eos_token_id})
        assert answer.raw_text == tokenizer.decode(answer.token_ids)
    # Otherwise nothing above was padded, or every prompt got the same answer.
    assert len(set(map(len, prompts.values()))) > 2
    assert len({answer.token_ids for _, answer in exchanges.values()}) > len(exchanges) / 2


@pytest.mark.slow
def test_a_hybrid_computes_no_token_of_a_dialogue_twice(tokenizer):
    """In reference context too, where a prompt does not continue the reply before it."""
    torch.manual_seed(1)
    model = remember(AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text", tokenizer, 0.5))).eval()
    generator, computed = generator_of(model, tokenizer, batch_size=1, likelihoods=False), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].numel()))
    _, exchanges = asked(generator, generate_sample(2, seed=0), "reference")
    prefix, longest, replies = len(generator.template.prefix_ids), {}, 0
    for (dialogue, _), (request, answer) in exchanges.items():
        longest[dialogue] = max(longest.get(dialogue, 0), len(request.prompt_ids(generator.template)) - prefix)
        replies += len(answer.token_ids)
    assert len(exchanges) > len(longest)
    assert sum(computed) <= prefix + sum(longest.values()) + replies


@pytest.mark.slow
def test_likelihoods_that_are_not_wanted_are_left_out_and_added_later(model, tokenizer, odd_dialogues, tmp_path):
    def run(name, **settings):
        generator = generator_of(model, tokenizer, **settings)
        with PredictionStore(tmp_path / name, generator.config_hash) as store:
            return generate_predictions(odd_dialogues, generator, "reference", store)

    full = run("full.jsonl")
    without = [replace(each, label_log_likelihoods=None, reference_nll=None, reference_tokens=None) for each in full]
    assert run("other.jsonl", likelihoods=False) == without != full
    assert run("other.jsonl") == full


def test_prompts_in_reference_context(model, tokenizer, odd_dialogues):
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    golds = {each.id: each for each in odd_dialogues}
    for prediction in generate_predictions(odd_dialogues, generator_of(model, tokenizer), "reference"):
        gold = golds[prediction.dialogue_id]
        assert prediction.prompt_hash == digest(template.prompt_ids(gold.turns[: prediction.turn]))
        # The ids that training puts before this turn's reply.
        example = template.encode(gold)
        start = example.turn_offsets[prediction.turn] + len(template.supporter_header_ids)
        assert prediction.prompt_hash == digest(example.input_ids[:start].tolist())


def test_prompts_in_generated_context_hold_the_generated_ids(model, tokenizer, odd_dialogues):
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    predictions, exchanges = asked(generator_of(model, tokenizer), odd_dialogues, "generated")
    split_differently = 0
    for prediction in predictions:
        gold = next(each for each in odd_dialogues if each.id == prediction.dialogue_id)
        own = {turn: answer for (name, turn), (_, answer) in exchanges.items() if name == gold.id}
        ids = list(template.prefix_ids)
        for index, turn in enumerate(gold.turns[: prediction.turn]):
            if index in own:
                ids += [*template.supporter_header_ids, *own[index].token_ids, *template.supporter_footer_ids]
                again = tokenizer(own[index].raw_text, add_special_tokens=False)["input_ids"]
                split_differently += tuple(again) != own[index].token_ids
            else:
                ids += template.customer_header_ids + tokenizer(turn.text)["input_ids"] + template.customer_footer_ids
        ids += template.supporter_header_ids
        assert prediction.prompt_hash == digest(ids)
    # The point of handing ids on: text of a random model, tokenized again, is other ids.
    assert split_differently


def test_generation_stops_at_the_end_of_turn(model, tokenizer, odd_dialogues):
    def first(generator):
        _, exchanges = asked(generator, odd_dialogues[:1], "generated")
        return exchanges[odd_dialogues[0].id, odd_dialogues[0].supporter_turns[0]][1]

    answer = first(generator_of(model, tokenizer))
    assert len(answer.token_ids) == STEPS
    # Some token that comes up on the way now ends the turn; what was before it is the whole reply.
    place = next(i for i in range(2, STEPS) if answer.token_ids[i] not in answer.token_ids[:i])
    original = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, answer.token_ids[place]])
    stopped = first(generator_of(model, tokenizer))
    assert stopped.token_ids == answer.token_ids[:place]
    assert stopped.raw_text == tokenizer.decode(answer.token_ids[:place])
    # The template's end-of-turn token stops it too, where the model's own configuration knows of no end.
    model.generation_config = GenerationConfig()
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    template.end_of_turn_id = answer.token_ids[place]
    ending = HFGenerator(model, template, EvaluationConfig(max_new_tokens=STEPS))
    model.generation_config = original
    assert first(ending).token_ids == answer.token_ids[:place]


def test_greedy_whatever_the_model_ships(model, tokenizer, odd_dialogues):
    """Qwen2.5-Instruct ships sampling and a repetition penalty; they must not leak into greedy decoding."""
    plain = generate_predictions(odd_dialogues, generator_of(model, tokenizer), "reference")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, repetition_penalty=5.0, eos_token_id=tokenizer.eos_token_id
    )
    try:
        assert generate_predictions(odd_dialogues, generator_of(model, tokenizer), "reference") == plain
    finally:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)


@pytest.mark.slow
def test_mode_given_prompts_with_the_reference_strategy(model, tokenizer, odd_dialogues):
    generator = generator_of(model, tokenizer, mode="given")
    assert not generator.predicts_strategy
    golds = {each.id: each for each in odd_dialogues}
    encode = generator.template.tokenizer.backend_tokenizer.encode
    for context in ("reference", "generated"):
        predictions, exchanges = asked(generator, odd_dialogues, context)
        for prediction in predictions:
            gold = golds[prediction.dialogue_id]
            request, answer = exchanges[gold.id, prediction.turn]
            history = [turn if isinstance(turn, Turn) else turn.token_ids for turn in request.history]
            label = encode(f"[{gold.turns[prediction.turn].strategy.zh}]", add_special_tokens=False).ids
            prompt = generator.template.prompt_ids(history) + label
            assert prediction.prompt_hash == digest(prompt)
            # A later turn of generated context sees the strategy as well, as it did in training.
            assert list(answer.token_ids[: len(label)]) == label
            generated = answer.token_ids[len(label) :]
            assert is_greedy(model, prompt, generated, STEPS, {tokenizer.eos_token_id})
            assert answer.raw_text == tokenizer.decode(generated)
            assert prediction.strategy is None and prediction.response == prediction.raw_text.strip()
    assert generator_of(model, tokenizer, mode="joint").predicts_strategy
    assert not generator_of(model, tokenizer, mode="reply_only").predicts_strategy


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    manifest = manifest_of(template)
    directory = tmp_path / "checkpoint"
    save_final_model(directory, model, tokenizer, template.chat_template, manifest)
    return directory


@pytest.mark.slow
def test_a_saved_model_answers_as_in_memory(model, tokenizer, checkpoint, odd_dialogues):
    few = odd_dialogues[:2]
    settings = EvaluationConfig(max_new_tokens=STEPS)
    template, source = read_template(open_source(str(checkpoint)))
    # On the same device, since answers are compared to the last digit.
    generator = load_generator(str(checkpoint), template, settings, device=model.device)
    expected = generate_predictions(few, generator_of(model, tokenizer), "generated")
    assert generate_predictions(few, generator, "generated") == expected
    # One call loads the same system, which also replies to a history.
    loaded = load_final_model(str(checkpoint), settings, model.device)
    assert generate_predictions(few, loaded, "generated") == [
        replace(each, config_hash=loaded.config_hash) for each in expected
    ]
    for prediction in generate_predictions(few, generator, "reference"):
        history = next(each for each in few if each.id == prediction.dialogue_id).turns[: prediction.turn]
        reply = loaded.reply(history)
        assert (reply.strategy and reply.strategy.number, reply.response) == (prediction.strategy, prediction.response)
    # The base stands beside the checkpoint; another seed, so that one is not taken for the other.
    torch.manual_seed(2)
    base = Qwen2ForCausalLM(model.config)
    base.save_pretrained(checkpoint.parent / "base")
    untrained = load_generator(find_base(checkpoint, source.manifest, "").path, template, settings, device=model.device)
    answers = generate_predictions(few, untrained, "reference")
    assert answers == generate_predictions(few, generator_of(base, tokenizer), "reference")
    assert [p.raw_text for p in answers] != [p.raw_text for p in generate_predictions(few, generator, "reference")]


def test_a_final_model_without_tokenizer_or_with_another_one_is_refused(checkpoint):
    manifest_file = checkpoint / "csc_manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    for what in ("tokenizer", "template"):
        manifest_file.write_text(json.dumps(manifest | {f"{what}_hash": "0" * 64}), encoding="utf-8")
        with pytest.raises(InputError, match=f"the model was trained with another {what}"):
            read_template(open_source(str(checkpoint)))
    manifest_file.write_text(json.dumps(manifest | {"files": {}}), encoding="utf-8")
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="there is no tokenizer") as caught:
        read_template(open_source(str(checkpoint)))
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


PREDICTION = Prediction("行\u20281", 2, "generated", "ab" * 32, "[其它]\n“好”😀", None, "好\n", 12, "再见")


def test_predictions_file_round_trip(tmp_path):
    path = tmp_path / "predictions" / "a.jsonl"
    known = replace(
        PREDICTION, token_ids=(3, 5), label_log_likelihoods=(-0.5,) * 12, reference_nll=1.5, reference_tokens=4
    )
    predictions = [PREDICTION, replace(known, turn=4, strategy=3)]
    failure = FailedTurn("行\u20281", 6, "generated", "timeout", "60 s")
    write_predictions(path, [*predictions, failure])
    assert read_outcomes(path) == [*predictions, failure]
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 4 and lines[3] == b""
    assert json.loads(lines[0])["raw_text"] == PREDICTION.raw_text
    write_predictions(path, [])
    assert read_outcomes(path) == []


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"turn": 1}', '{"unknown": 1}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    write_predictions(path, [PREDICTION])
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: (not JSON|not a JSON object|field \w+).*: delete it"):
        read_outcomes(path, "delete it")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot read: No such file"):
        read_outcomes(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1: not JSON \(not UTF-8 at byte 7\)"):
        read_outcomes(tmp_path / "latin.jsonl", "")


@pytest.fixture
def wide(tokenizer):
    """A model with room for long dialogues, and its forward passes as (rows, tokens of a row, columns)."""
    config = tiny_config("qwen2", tokenizer, 0.5)
    config.max_position_embeddings = 20_000
    torch.manual_seed(1)
    model, passes = Qwen2ForCausalLM(config).eval(), []

    def note(_, args, facts):
        if args:  # the prefix of all prompts
            return
        tokens = facts["input_ids"].numel()
        if layout := facts.get("cache_layout"):
            rows = len(layout.rows.unique())
            passes.append((rows, -(-tokens // rows), max(each.mask.shape[-1] for each in layout.attended)))
        else:
            cached = facts["past_key_values"].get_seq_length() if facts.get("past_key_values") else 0
            passes.append((1, tokens, cached + tokens))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return model, passes


def with_long_turn(dialogue, length, turn=1):
    """The dialogue with one more customer's text of `length` characters, behind that of a turn."""
    turns = list(dialogue.turns)
    turns[turn] = replace(turns[turn], text=turns[turn].text + "退款" * (length // 2))
    return replace(dialogue, id=f"{dialogue.id} long", turns=tuple(turns))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["reference", "generated"])
def test_a_long_turn_costs_no_more_memory_than_a_batch_and_changes_no_other_turn(wide, tokenizer, context):
    model, passes = wide
    others = [LONG, MIDDLE, SHORT, replace(LONG, id="again"), replace(MIDDLE, id="too")]
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    longest = max(len(template.encode(each).input_ids) for each in others)
    settings = {"batch_size": 5, "max_batch_length": longest + 50}
    expected = generate_predictions(others, generator_of(model, tokenizer, **settings), context)
    passes.clear()
    dialogues = [with_long_turn(LONG, 1000), *others]
    found = generate_predictions(dialogues, generator_of(model, tokenizer, **settings), context)
    assert found[len(LONG.supporter_turns) :] == expected
    assert max(columns for _, _, columns in passes) > 2000
    assert max(rows * width for rows, width, _ in passes) <= 5 * (longest + 50)
    labels = 12 * 7 * len(LONG.supporter_turns)
    assert max(width for _, width, _ in passes) <= longest + 50 + labels
    assert all(rows == 1 for rows, _, columns in passes if columns > 2 * longest)
    whole = {"batch_size": 1, "max_batch_length": 10**6}
    alone = generate_predictions(dialogues[:1], generator_of(model, tokenizer, **whole), context)
    for one, other in zip(found, alone, strict=False):
        assert one.token_ids == other.token_ids and one.prompt_hash == other.prompt_hash
        assert one.label_log_likelihoods == pytest.approx(other.label_log_likelihoods, abs=1e-3)
        assert one.reference_nll == pytest.approx(other.reference_nll, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["reference", "generated"])
def test_turns_beyond_the_models_positions_fail_and_all_others_are_predicted(wide, tokenizer, context, tmp_path):
    model, _ = wide
    template = DialogueTemplate(tokenizer, "qwen2_5", TemplateConfig())
    long = with_long_turn(LONG, 1000, turn=3)  # its turns 0 and 2 are before it
    dialogues = [long, dialogue("brief", (1, "您好"), "好", (5, "很抱歉")), SHORT]
    expected = generate_predictions(dialogues, generator_of(model, tokenizer), context)
    # The last position that turn 2 needs is that of its reply; one less, and it fails as well.
    needed = len(template.prompt_ids(long.turns[:2])) + STEPS + 1
    if context == "generated":
        own = {each.turn: each for each in expected if each.dialogue_id == long.id}
        needed = len(template.prompt_ids([own[0].token_ids, long.turns[1]])) + len(own[2].token_ids) + 1
    for positions, failing in ((needed, [4, 6]), (needed - 1, [2, 4, 6])):
        model.config.max_position_embeddings = positions
        generator = generator_of(model, tokenizer)
        with PredictionStore(tmp_path / f"{positions}.jsonl", generator.config_hash) as store:
            found = generate_predictions(dialogues, generator, context, store)
        failed = [each for each in found if isinstance(each, FailedTurn)]
        assert [(each.dialogue_id, each.turn) for each in failed] == [(long.id, turn) for turn in failing]
        assert failed[0].kind == "context_length" and f"model's {positions} positions" in failed[0].message
        assert {each.kind for each in failed[1:]} <= {"context_length", "earlier_turn_failed"}
        others = [each for each in found if each.dialogue_id != long.id]
        assert others == expected[len(LONG.supporter_turns) :]


def test_a_reference_turn_beyond_the_positions_has_no_likelihood(wide, tokenizer):
    model, _ = wide
    long = with_long_turn(LONG, 1000, turn=2)
    model.config.max_position_embeddings = 1500
    first, second, *failed = generate_predictions([long], generator_of(model, tokenizer), "reference")
    assert first.reference_nll is not None and second.reference_nll is second.reference_tokens is None
    assert second.label_log_likelihoods is not None and [each.kind for each in failed] == ["context_length"] * 2
