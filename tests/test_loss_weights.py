"""The loss weight of each token, by hand; and the trainer's loss, by its formula."""

import itertools
import pickle

import numpy
import pytest
import torch
from conftest import small_tokenizer, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.models.config import AdapterConfig
from csc_train.packing.collator import PackCollator
from csc_train.packing.config import LossConfig, PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.loss_weights import LossWeights, count_token_types, count_trained_turns
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue, TokenType
from csc_train.training.config import TrainerConfig
from csc_train.training.trainer import build_trainer, training_arguments

C, S, R = TokenType


def example(*turns: tuple[int, list[TokenType]]) -> TokenizedDialogue:
    """A prefix of two tokens, then turns of (number of strategy, token_types of tokens)."""
    token_types = [C, C, *itertools.chain.from_iterable(token_types for _, token_types in turns)]
    return TokenizedDialogue(
        numpy.arange(len(token_types), dtype=numpy.int32),
        numpy.array(token_types, dtype=numpy.uint8),
        numpy.cumsum([2, *(len(token_types) for _, token_types in turns)]).astype(numpy.int32),
        numpy.array([number for number, _ in turns], dtype=numpy.uint8),
    )


# Strategy 1 with two trained tokens, a customer's turn, strategy 5 with four.
ONE = example((1, [C, S, R]), (0, [C, C]), (5, [C, S, R, R, R]))
TURNS = numpy.bincount([1] * 6 + [5] * 2 + [6] * 1, minlength=13)  # mean of the three that occur: 3


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"strategy_weight": 3.0}, [3, 1, 3, 1, 1, 1]),
        ({"reply_weight": 0.0}, [1, 0, 1, 0, 0, 0]),
        ({"weighting": "turns"}, [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ({"weighting": "turns", "strategy_weight": 3.0}, [3 / 4, 1 / 4, 3 / 6, 1 / 6, 1 / 6, 1 / 6]),
        ({"weighting": "inverse_frequency"}, [0.5, 0.5, 1.5, 1.5, 1.5, 1.5]),
        ({"weighting": "inverse_frequency", "max_factor": 1.25, "reply_weight": 2.0}, [0.5, 1, 1.25, 2.5, 2.5, 2.5]),
        ({"weighting": "by_strategy", "strategy_factors": {"情感管理": 2.5}}, [1, 1, 2.5, 2.5, 2.5, 2.5]),
        ({"weighting": "by_strategy", "strategy_factors": {"1": 0.0, "策略5 情感管理": 4.0}}, [0, 0, 4, 4, 4, 4]),
    ],
)
def test_weights_are_those_of_the_formula(config, weights):
    found = LossWeights(LossConfig(**config), TURNS)(ONE)
    assert found.dtype == numpy.float32
    assert found[ONE.trained].tolist() == pytest.approx(weights)
    assert not found[~ONE.trained].any()


def test_a_strategy_that_never_occurs_has_no_part_in_the_mean():
    assert LossWeights(LossConfig("inverse_frequency"), TURNS).factors.tolist() == [
        1, 0.5, 1, 1, 1, 1.5, 3, 1, 1, 1, 1, 1, 1,
    ]  # fmt: skip


def test_only_trained_turns_are_counted():
    untrained = example((1, [C, S, R]), (0, [C]), (5, [C, C]))
    assert count_trained_turns(count_token_types(untrained), untrained.strategies).tolist() == [0, 1] + [0] * 11
    assert count_trained_turns(count_token_types(ONE), ONE.strategies).tolist() == [0, 1, 0, 0, 0, 1] + [0] * 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weighting": "turn"}, r"^loss\.weighting=turn: .* Did you mean 'turns'\?"),
        ({"max_factor": 0.5}, r"^loss\.max_factor=0\.5: must be at least 1"),
        (
            {"weighting": "by_strategy", "strategy_factors": {"1": -1.0}},
            r"^loss\.strategy_factors\.1=-1\.0: must be at least 0",
        ),
        ({"strategy_factors": {"1": 2.0}}, r"^loss\.strategy_factors is set, but loss\.weighting=tokens"),
        ({"strategy_weight": 0.0, "reply_weight": 0.0}, "nothing would be trained"),
        (
            {"weighting": "by_strategy", "strategy_factors": {"情感": 2.0}},
            r"^loss\.strategy_factors: unknown strategy '情感'",
        ),
        (
            {"weighting": "by_strategy", "strategy_factors": {"5": 2.0, "情感管理": 1.0}},
            r"^loss\.strategy_factors names strategy 5 twice",
        ),
    ],
)
def test_invalid_factors_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        LossWeights(LossConfig(**config), TURNS)


def test_the_token_types_of_each_mode():
    """The label, its bracket included, is the strategy's; the reply ends with the end-of-turn token."""
    turns = (
        Turn(Speaker.SUPPORTER, "您好", STRATEGIES[0]),
        Turn(Speaker.CUSTOMER, "在吗"),
        Turn(Speaker.SUPPORTER, "请放心", STRATEGIES[4]),
    )
    for mode, strategy in (("joint", ["[礼貌问候]", "[情感管理]"]), ("given", None), ("reply_only", None)):
        template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode=mode))
        one = template.encode(Dialogue("d", turns))
        of = {kind: one.input_ids[one.token_types == kind].tolist() for kind in TokenType}
        assert template.tokenizer.decode(of[S]) == "".join(strategy or [])
        assert template.tokenizer.decode(of[R]) == "您好<|im_end|>请放心<|im_end|>"
        assert one.strategies.tolist() == [1, 0, 5]
        by_turn = [one.token_types[start:end].any() for start, end in itertools.pairwise(one.turn_offsets)]
        assert by_turn == [True, False, True]


def test_a_dialogue_without_weight_is_dropped_and_the_shares_are_of_weights():
    other = example((5, [C, S, R]))
    config = LossConfig("by_strategy", strategy_factors={"5": 0.0, "1": 2.0})
    packs, report = pack_dialogues([other, ONE, other], PackingConfig("best_fit", max_length=30), config)
    assert packs.pack_items == [[(1, 0, len(ONE.input_ids))]]
    assert (report.dropped, report.trained_tokens, report.strategies) == (2, 2, {"礼貌问候": 1.0})
    _, report = pack_dialogues([other, ONE], PackingConfig("best_fit", max_length=30), LossConfig("turns"))
    assert report.strategies == {"礼貌问候": pytest.approx(1 / 3), "情感管理": pytest.approx(2 / 3)}
    with pytest.raises(InputError, match="leave no trained token"):
        pack_dialogues([other], PackingConfig("best_fit", max_length=30), config)


class LogitRows(TorchDispatchMode):
    """The most rows of vocabulary size in a tensor that an operation returned."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (self.vocabulary,):
                self.most = max(self.most, one.numel() // self.vocabulary)
        return result


@pytest.mark.slow
def test_one_forward_and_no_logits_of_all_tokens(tmp_path):
    """TRL's head works in tiles of 4,096 tokens: with more of them, no tensor may hold logits for all."""
    tokenizer = small_tokenizer("qwen2_5")
    tokens = 5000
    config = tiny_config("qwen2", tokenizer, 0.1, max_position_embeddings=tokens)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    examples = [example((1, [C, S, R])), example((1, [C, S, *[R] * (tokens // 2)]))]
    for one in examples:
        one.input_ids[:] %= model.config.vocab_size
    packs, _ = pack_dialogues(examples * 2, PackingConfig("off", max_length=tokens), LossConfig("turns"))
    config = TrainerConfig(packs_per_step=4, micro_batch_size=4, precision="fp32", gradient_checkpointing="off")
    trainer = build_trainer(
        model,
        tokenizer,
        packs,
        packing="best_fit",
        arguments=training_arguments(config, tmp_path, processes=1),
        adapter=AdapterConfig(),
    )
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append("body"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    batch = PackCollator("varlen", 0)([packs[index] for index in range(len(packs))])
    with LogitRows(model.config.vocab_size) as logits:
        trainer.training_step(model, dict(batch), num_items_in_batch=batch["loss_weights"].sum())
    assert calls == ["body"]
    assert 0 < logits.most < batch["input_ids"].numel()
    with LogitRows(model.config.vocab_size) as logits, torch.no_grad():
        model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False)
    assert logits.most == batch["input_ids"].numel()  # a plain forward builds them, and is seen to


PLUGIN = """
import numpy
from csc_train.packing.loss_weights import loss_weighting

@loss_weighting({name!r})
def doubled(config, turns):
    factors = numpy.ones(len(turns))
    factors[1] = 2 * config.max_factor
    return factors
"""


def test_a_loss_weighting_from_outside_the_package_is_chosen_by_name(tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text(PLUGIN.format(name="first_strategy_doubled"), encoding="utf-8")
    for _ in range(2):  # a configuration is built several times
        config = compose("sft", ["loss.weighting=first_strategy_doubled", f"plugins=[{file}]", "loss.max_factor=2"])
    weights = LossWeights(config.loss, TURNS)
    assert weights.factors.tolist() == [1, 4, *[1] * 11]
    assert pickle.loads(pickle.dumps(weights))(ONE).tolist() == weights(ONE).tolist()
    with pytest.raises(InputError, match="Did you mean 'first_strategy_doubled'"):
        LossConfig("first_strategy_double")


@pytest.mark.slow
def test_a_loss_weighting_that_cannot_be_added_is_named(tmp_path):
    file = tmp_path / "taken.py"
    file.write_text(PLUGIN.format(name="turns"), encoding="utf-8")
    with pytest.raises(InputError, match=r"^plugins=.*taken\.py: loss weighting turns: the name is taken"):
        compose("sft", [f"plugins=[{file}]"])
    with pytest.raises(InputError, match=r"^plugins=none\.py: no such file"):
        compose("sft", ["plugins=[none.py]"])
