"""Validation during training: loss, strategy accuracy, replies to a fixed set of turns, and whole dialogues.

Every process makes the same number of forward passes: under ZeRO stage 3 each pass gathers weights from all processes,
so a process with one pass more would wait forever.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import peft
import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedModel, Trainer
from trl.models.utils import unwrap_model_for_generation

from csc_train.data.dialogue import Dialogue
from csc_train.data.strategies import STRATEGIES, Strategy
from csc_train.errors import InputError
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import generate_predictions, shard_dialogues
from csc_train.models.sharded_parameters import is_sharded, lacking_memory
from csc_train.packing.config import PackingConfig
from csc_train.packing.dataset import pack_dialogues
from csc_train.packing.loss_weights import LossWeights
from csc_train.template.dialogue_template import DialogueTemplate, TokenizedDialogue
from csc_train.template.likelihood import dialogue_log_likelihoods
from csc_train.tracking.history import GENERATED_TABLE, SAMPLES_TABLE
from csc_train.training.config import ValidationConfig

logger = logging.getLogger(__name__)


class ValidationTurn(NamedTuple):
    """A supporter turn: the index of its dialogue, and its index in `Dialogue.turns`."""

    dialogue: int
    turn: int


class Validator:
    """Evaluates a model on the validation dialogues while it is trained.

    Attributes:
        packs: for the loss, weighted as the training data.
        total_weight: the sum of their loss weights.
        turns: whose strategies are predicted; empty if the template leaves the model no choice.
        samples: turns that get a generated reply.
        generated: dialogues all of whose turns get one, in generated context.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        tokenized: Sequence[TokenizedDialogue],
        template: DialogueTemplate,
        config: ValidationConfig,
        packing: PackingConfig,
        loss_weights: LossWeights,
        log_table: Callable[[str, list[dict[str, Any]], int], None],
    ):
        """Pack the dialogues and draw turns from them.

        Args:
            tokenized: the dialogues, tokenized by `template`.
            packing: that of the training data; turns that end after its `max_length` are not drawn.
            loss_weights: those of the training data.
            log_table: takes the name, the rows and the step of a table.

        Raises:
            InputError: no dialogue is left for the loss or to be generated, or no turn for `metric_for_best_model`.
        """
        self.dialogues, self.tokenized, self.template = dialogues, tokenized, template
        self.config, self.log_table = config, log_table
        try:
            self.packs, _ = pack_dialogues(tokenized, packing, loss_weights)
        except InputError as error:
            raise InputError(f"validation dialogues: {error}; validation.eval_steps=0 trains without them") from error
        self.total_weight = sum(
            float(self.packs[index]["loss_weights"].sum(dtype=float)) for index in range(len(self.packs))
        )
        candidates = [
            [
                ValidationTurn(index, turn)
                for turn in dialogue.strategies.nonzero()[0].tolist()
                if dialogue.turn_offsets[turn + 1] <= packing.max_length
            ]
            for index, dialogue in enumerate(tokenized)
        ]
        # The same turns each time and in each run on these dialogues. Strategies are predicted for whole dialogues: one
        # forward pass predicts all those of a dialogue.
        rng = numpy.random.default_rng(0)
        drawn = [turn for index in rng.permutation(len(candidates)).tolist() for turn in candidates[index]]
        self.turns = drawn[: config.num_turns] if template.config.mode == "joint" else []
        if config.metric_for_best_model == "strategy_accuracy" and not self.turns:
            raise InputError(
                "validation.metric_for_best_model=strategy_accuracy: no supporter turn ends within packing.max_length: "
                "raise packing.max_length"
            )
        self.samples = sorted(drawn[index] for index in rng.permutation(len(drawn))[: config.num_samples].tolist())
        order = rng.permutation(len(dialogues)).tolist() if config.generated_dialogues else ()
        whole = {
            dialogues[index].id: dialogues[index]
            for index in order
            if candidates[index] and len(candidates[index]) == len(dialogues[index].supporter_turns)
        }
        self.generated = list(whole.values())[: config.generated_dialogues]
        if config.generated_dialogues:
            if not self.generated:
                raise InputError(
                    f"validation.generated_dialogues={config.generated_dialogues}: no validation dialogue fits "
                    "packing.max_length: raise packing.max_length, or choose 0"
                )
            # Before the layers are compiled: it registers an attention, which would make them compile again.
            import csc_train.inference.hf  # noqa: F401

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Compute all metrics but the loss, and log the tables of replies; every process calls this.

        Returns:
            On every process `strategy_accuracy`: the share of `turns` whose reference strategy has the most likely of
            the 12 labels; missing without turns. With `generated`, as `_generate_dialogues`, and `generation_seconds`
            of all replies, the time to gather sharded weights included.
        """
        tables = {}
        with _plain_inference(trainer.model), torch.no_grad():
            metrics = {"strategy_accuracy": self._strategy_accuracy(trainer)} if self.turns else {}
            started, whole, sharded = time.perf_counter(), contextlib.nullcontext(), is_sharded(trainer.model)
            if (generates := self._can_generate(trainer, sharded)) and sharded:
                whole = unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator)
            with whole:
                if self.samples:
                    tables[SAMPLES_TABLE] = self._sample_rows(trainer, synced=sharded and not generates)
                if generates:
                    found, tables[GENERATED_TABLE] = self._generate_dialogues(trainer)
                    metrics |= found
            if generates:
                metrics["generation_seconds"] = time.perf_counter() - started
        for name, rows in tables.items():
            if trainer.is_world_process_zero():
                self.log_table(name, rows, trainer.state.global_step)
        return metrics

    def _can_generate(self, trainer: Trainer, sharded: bool) -> bool:
        """Whether dialogues are generated now; the same on every process."""
        if not (self.generated and sharded):
            return bool(self.generated)
        lacking: Any = trainer.accelerator.gather(lacking_memory(trainer.model, trainer.args.device))
        if (worst := lacking.max().item()) > 0:
            logger.info(
                f"note: step {trainer.state.global_step}: no dialogues are generated, since the whole weights need "
                f"{worst:.1f} GiB more on a GPU: set validation.generated_dialogues=0, or use more GPUs"
            )
        return worst <= 0

    def _generate_dialogues(self, trainer: Trainer) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Reply to all turns of `generated`, each process to its own dialogues; none waits for another.

        Returns:
            If the model chooses strategies, `generated_strategy_accuracy`: the share of turns whose reply names the
            reference strategy. And the rows of the table.
        """
        from csc_train.inference.hf import HFGenerator

        model: Any = trainer.model
        base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        own = shard_dialogues(self.generated, trainer.args.process_index, trainer.args.world_size)
        config = InferenceConfig(max_new_tokens=self.config.max_new_tokens, likelihoods=False)
        outcomes = generate_predictions(own, HFGenerator(base, self.template, config), "generated") if own else []
        by_turn = {outcome.key: outcome for outcome in gather_object([*outcomes])}
        rows, hits = [], []
        for dialogue in self.generated:
            for turn in dialogue.supporter_turns:
                found = by_turn[dialogue.id, turn]
                number, text = getattr(found, "strategy", None), getattr(found, "response", "")
                rows.append(self._row(dialogue, turn, number and STRATEGIES[number - 1], text))
                hits.append(number == dialogue.turns[turn].strategy.number)
        joint = self.template.config.mode == "joint"
        return {"generated_strategy_accuracy": sum(hits) / len(hits)} if joint else {}, rows

    def accuracy(self, model: torch.nn.Module) -> float:
        """The strategy accuracy of another model, on its device, by this process alone."""
        with torch.no_grad():
            hits = sum(int(self._count_hits(model, turns)) for turns in self._turns_by_dialogue())
        return hits / len(self.turns)

    def prompt(self, turn: ValidationTurn) -> list[int]:
        """The token ids that the model predicts a turn from, with the reference history."""
        dialogue, template = self.tokenized[turn.dialogue], self.template
        before = dialogue.input_ids[: dialogue.turn_offsets[turn.turn]].tolist()
        given = template.label_ids[int(dialogue.strategies[turn.turn])] if template.config.mode == "given" else []
        return [*before, *template.header_ids(turn.turn), *given]

    def _strategy_accuracy(self, trainer: Trainer) -> float:
        """One dialogue per forward pass; a process with fewer dialogues repeats the first one, uncounted."""
        rank, processes = trainer.args.process_index, trainer.args.world_size
        dialogues = self._turns_by_dialogue()
        hits = torch.tensor(0, device=trainer.args.device)
        for index in range(rank, -(-len(dialogues) // processes) * processes, processes):
            found = self._count_hits(trainer.model, dialogues[index] if index < len(dialogues) else dialogues[0])
            if index < len(dialogues):
                hits += found
        reduced: Any = trainer.accelerator.reduce(hits)
        return reduced.item() / len(self.turns)

    def _turns_by_dialogue(self) -> list[list[ValidationTurn]]:
        return [list(turns) for _, turns in itertools.groupby(self.turns, lambda turn: turn.dialogue)]

    def _count_hits(self, model: torch.nn.Module, turns: list[ValidationTurn]) -> torch.Tensor:
        """Turns of one dialogue whose reference strategy is the most likely, by one forward pass."""
        dialogue = self.tokenized[turns[0].dialogue]
        starts = [len(self.prompt(turn)) for turn in turns]
        ids = dialogue.input_ids[: starts[-1]].tolist()
        _, likelihoods = dialogue_log_likelihoods(model, self.template, ids, starts)
        numbers = torch.tensor([strategy.number for strategy in STRATEGIES])[likelihoods.argmax(dim=1).cpu()]
        reference = torch.tensor([int(dialogue.strategies[turn.turn]) for turn in turns])
        return (numbers == reference).sum()

    def _sample_rows(self, trainer: Trainer, synced: bool) -> list[dict[str, Any]]:
        """The rows of the table of samples, on every process; `synced`: each forward pass gathers weights."""
        own = self.samples[trainer.args.process_index :: trainer.args.world_size]
        # A process without a sample takes part with the first one.
        texts = self._generate(trainer, [self.prompt(turn) for turn in own or self.samples[:1]], synced)
        answers = dict(gather_object([*zip(own, texts, strict=False)]))
        replies = {turn: self.template.parse(answers[turn]) for turn in self.samples}
        return [
            self._row(self.dialogues[turn.dialogue], turn.turn, reply.strategy, reply.response)
            for turn, reply in replies.items()
        ]

    def _row(self, dialogue: Dialogue, turn: int, strategy: Strategy | None, response: str) -> dict[str, Any]:
        reference, language = dialogue.turns[turn], self.template.config.language
        return {
            "dialogue_id": dialogue.id,
            "turn": turn,
            "customer": dialogue.turns[turn - 1].text if turn else "",
            "reference_strategy": reference.strategy.name(language),
            "strategy": strategy and strategy.name(language),
            "reference_response": reference.text,
            "response": response,
        }

    def _generate(self, trainer: Trainer, prompts: list[list[int]], synced: bool) -> list[str]:
        """Greedy replies to prompts, as text; every process calls this, with its own prompts."""
        longest, end = max(map(len, prompts)), self.template.end_of_turn_id
        tokenizer = self.template.tokenizer
        # Padding on the left, so that every reply starts in the same column.
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model: Any = trainer.model
        generated = model.generate(
            input_ids=ids.to(trainer.args.device),
            attention_mask=mask.to(trainer.args.device),
            do_sample=False,
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            synced_gpus=synced and trainer.args.world_size > 1,
        )
        replies = (itertools.takewhile(lambda token: token != end, row) for row in generated[:, longest:].tolist())
        return [
            str(tokenizer.decode(list(reply), skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for reply in replies
        ]


def last_validation_metrics(history: list[dict[str, float]], step: int) -> dict[str, float]:
    """The metrics of the last validation up to a step, and its `step`; empty without one.

    Args:
        history: a trainer's `log_history`.
    """
    names = {"eval_loss": "loss", "eval_strategy_accuracy": "strategy_accuracy", "step": "step"}
    entries = [entry for entry in history if "eval_loss" in entry and entry["step"] <= step]
    return {name: entries[-1][key] for key, name in names.items() if key in entries[-1]} if entries else {}


@contextlib.contextmanager
def _plain_inference(model: PreTrainedModel | peft.PeftModel) -> Iterator[None]:
    """Switch to sdpa attention, which needs no packs, and to greedy generation without the model's own penalties."""
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    attention, generation = base.config._attn_implementation, base.generation_config
    base.set_attn_implementation("sdpa")
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        base.generation_config = generation
