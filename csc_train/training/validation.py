"""What is measured on held-out dialogues while training: the loss, the accuracy of strategies, and a few replies.

Every process takes part in every forward pass and makes as many of them as the others: under ZeRO-3 each one gathers
weights from all, so one that ran alone, or once more than the others, would wait for ever.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import peft
import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, GenerationConfig, PreTrainedModel

from csc_train.data.dialogue import Dialogue
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.jsonl import keep_table
from csc_train.models.sharded_parameters import is_sharded
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.loss_weights import LossWeights
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue
from csc_train.template.likelihood import dialogue_log_likelihoods
from csc_train.training.config import ValidationConfig

if TYPE_CHECKING:
    from csc_train.training.trainer import PackTrainer

SAMPLES_FILE = "samples"
"""The table of replies to the same held-out turns, by step."""
NUMBERS = [strategy.number for strategy in STRATEGIES]


class ValidationTurn(NamedTuple):
    """A supporter turn: the number of its dialogue, and its place in `Dialogue.turns`."""

    dialogue: int
    turn: int


class Validator:
    """Held-out dialogues as a training measures itself on them.

    Attributes:
        packs: for the loss; weighted as those that are trained on.
        weight: the sum of their loss weights.
        turns: whose strategies are predicted; none where the template leaves the model no choice.
        samples: turns that are replied to.
        log_table: keeps a table: its name, columns, rows and step.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        examples: Sequence[TokenizedDialogue],
        template: DialogueTemplate,
        config: ValidationConfig,
        packing: PackingConfig,
        loss_weights: LossWeights,
        directory: Path,
    ):
        """Pack the dialogues and draw turns from them.

        Args:
            examples: the dialogues, encoded by `template`.
            packing: as the training's; turns that end behind its `max_length` are not drawn.
            loss_weights: the loss weights of the training's packs.
            directory: for the table of `samples`.

        Raises:
            InputError: nothing is left to measure a loss on, or the metric that the best state is chosen by.
        """
        self.dialogues, self.examples, self.template = dialogues, examples, template
        self.config = config
        self.log_table = functools.partial(keep_table, directory)
        try:
            self.packs, _ = pack_dialogues(examples, packing, loss_weights)
        except InputError as error:
            raise InputError(f"held-out dialogues: {error}; validation.eval_steps=0 trains without them") from error
        self.weight = sum(
            float(self.packs[number]["loss_weights"].sum(dtype=float)) for number in range(len(self.packs))
        )
        fitting = [
            [
                ValidationTurn(number, turn)
                for turn in example.strategies.nonzero()[0].tolist()
                if example.turn_offsets[turn + 1] <= packing.max_length
            ]
            for number, example in enumerate(examples)
        ]
        # The same turns every time, in every run on these dialogues. Whole dialogues are drawn for the strategies: one
        # forward pass predicts all of a dialogue's.
        draw = numpy.random.default_rng(0)
        drawn = [turn for number in draw.permutation(len(fitting)).tolist() for turn in fitting[number]]
        self.turns = drawn[: config.num_turns] if template.config.mode == "joint" else []
        if config.metric_for_best_model == "strategy_accuracy" and not self.turns:
            raise InputError(
                "validation.metric_for_best_model=strategy_accuracy: no supporter turn ends within packing.max_length"
            )
        self.samples = sorted(drawn[place] for place in draw.permutation(len(drawn))[: config.num_samples].tolist())

    def measure(self, trainer: "PackTrainer") -> dict[str, float]:
        """Measure all but the loss, and write `samples`; called on every process, which all return the same.

        Returns:
            `strategy_accuracy`: the share of `turns` at whose place the label of the turn's own strategy is the most
            likely of the 12. Nothing where there are no turns.
        """
        with _plain(trainer.model), torch.no_grad():
            measured = {"strategy_accuracy": self._accuracy(trainer)} if self.turns else {}
            if self.samples:
                replies = self._replies(trainer)
                if trainer.is_world_process_zero():
                    columns = list(replies[0])
                    rows = [list(reply.values()) for reply in replies]
                    self.log_table(SAMPLES_FILE, columns, rows, trainer.state.global_step)
        return measured

    def prompt(self, turn: ValidationTurn) -> list[int]:
        """The ids from which the model predicts a turn, the gold history before it."""
        example, template = self.examples[turn.dialogue], self.template
        before = example.input_ids[: example.turn_offsets[turn.turn]].tolist()
        given = template.label_ids[int(example.strategies[turn.turn])] if template.config.mode == "given" else []
        return [*before, *template.supporter_header_ids, *given]

    def _accuracy(self, trainer: "PackTrainer") -> float:
        """A dialogue a forward pass; a process that has fewer than others takes the first again, uncounted."""
        rank, processes = trainer.args.process_index, trainer.args.world_size
        dialogues = [list(turns) for _, turns in itertools.groupby(self.turns, lambda turn: turn.dialogue)]
        right = torch.tensor(0, device=trainer.args.device)
        for place in range(rank, -(-len(dialogues) // processes) * processes, processes):
            turns = dialogues[place] if place < len(dialogues) else dialogues[0]
            example = self.examples[turns[0].dialogue]
            starts = [len(self.prompt(turn)) for turn in turns]
            ids = example.input_ids[: starts[-1]].tolist()
            _, likelihoods = dialogue_log_likelihoods(trainer.model, self.template, ids, starts)
            gold = torch.tensor([int(example.strategies[turn.turn]) for turn in turns], device=right.device)
            predicted = torch.tensor(NUMBERS, device=right.device)[likelihoods.argmax(dim=1)]
            if place < len(dialogues):
                right += (predicted == gold).sum()
        return trainer.accelerator.reduce(right).item() / len(self.turns)

    def _replies(self, trainer: "PackTrainer") -> list[dict[str, Any]]:
        """The rows of the table, on every process."""
        rank, processes = trainer.args.process_index, trainer.args.world_size
        mine = self.samples[rank::processes]
        # A process without a turn of its own takes part all the same.
        texts = generate(trainer, self.template, [self.prompt(turn) for turn in mine or self.samples[:1]])
        answers = dict(gather_object([*zip(mine, texts, strict=False)]))
        return [self._row(turn, answers[turn]) for turn in self.samples]

    def _row(self, turn: ValidationTurn, text: str) -> dict[str, Any]:
        dialogue = self.dialogues[turn.dialogue]
        gold, reply, language = dialogue.turns[turn.turn], self.template.parse(text), self.template.config.language
        return {
            "dialogue_id": dialogue.id,
            "turn": turn.turn,
            "reference_strategy": gold.strategy.name(language),
            "strategy": reply.strategy and reply.strategy.name(language),
            "reference_response": gold.text,
            "response": reply.response,
        }


def generate(trainer: "PackTrainer", template: DialogueTemplate, prompts: list[list[int]]) -> list[str]:
    """Greedy replies to prompts, as text; every process calls this together, with prompts of its own."""
    longest = max(map(len, prompts))
    pad = template.tokenizer.pad_token_id
    # Padding on the left, so that every reply starts in the same column.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = trainer.model.generate(
        input_ids=ids.to(trainer.args.device),
        attention_mask=mask.to(trainer.args.device),
        do_sample=False,
        max_new_tokens=trainer.validator.config.max_new_tokens,
        eos_token_id=template.end_of_turn_id,
        pad_token_id=pad,
        use_cache=True,
        synced_gpus=is_sharded(trainer.model) and trainer.args.world_size > 1,
    )
    end = template.end_of_turn_id
    rows = (itertools.takewhile(lambda token: token != end, row) for row in generated[:, longest:].tolist())
    decode = template.tokenizer.decode
    return [decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


def last_validation_metrics(history: list[dict[str, float]], step: int) -> dict[str, float]:
    """What was measured at a step, or at the last step before it at which anything was, and `step`.

    Args:
        history: a trainer's log.
    """
    names = {"eval_loss": "loss", "eval_strategy_accuracy": "strategy_accuracy", "step": "step"}
    measured = [entry for entry in history if "eval_loss" in entry and entry["step"] <= step]
    return {name: measured[-1][key] for key, name in names.items() if key in measured[-1]} if measured else {}


class EarlyStopping(EarlyStoppingCallback):
    """Ends the training when the best measurement has not been bettered for as many as `patience` asks.

    The count is kept in saved states, the one at the end included.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Train no further from a state that was saved at the end. (transformers would warn here that the best model
        is not loaded, which `export.trained_model` does.)"""
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Count, and save the state at the end."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save |= control.should_training_stop


@contextlib.contextmanager
def _plain(model: PreTrainedModel | peft.PeftModel) -> Iterator[None]:
    """A model with attention that needs no packs and takes any mask, and greedy generation without the penalties that
    some models' configurations ask for."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    attention, generation = base.config._attn_implementation, base.generation_config
    base.set_attn_implementation("sdpa")
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        base.generation_config = generation
