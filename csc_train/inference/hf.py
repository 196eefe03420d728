"""Replies of a Hugging Face model that runs in this process: greedy decoding in batches of dialogues."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from transformers import PreTrainedModel

from csc_train.checkpoints.locate import ModelSource, open_source
from csc_train.checkpoints.manifest import Manifest, check_manifest
from csc_train.data.dialogue import Dialogue, Turn
from csc_train.data.strategies import Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import CONTEXT_LENGTH, TurnQueue, TurnRequest
from csc_train.inference.kv_cache import DialogueCache
from csc_train.inference.predictions import TurnOutcome
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from csc_train.models.attention.select import check_delta_kernel
from csc_train.models.config import ModelConfig
from csc_train.models.families import cache_kinds
from csc_train.models.hub import adapter_base, find_file, hub_errors, load_causal_lm, read_model_config
from csc_train.models.inspection import check_tokenizer, inspect_model
from csc_train.models.onednn import use_onednn
from csc_train.models.tokenizer import load_tokenizer, tokenizer_hash
from csc_train.plugins import load_recorded_plugins
from csc_train.progress import ProgressBar
from csc_train.template.chat_templates import chat_template_name, recorded_name
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.likelihood import batch_log_likelihoods, dialogue_log_likelihoods
from csc_train.template.reply import Reply

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


class HFGenerator:
    """A model that `from_pretrained` loads, with a dialogue template.

    The cache of a dialogue is kept from turn to turn (see `DialogueCache`). After all replies, one forward
    pass per dialogue computes likelihoods, rounded to four decimals: those of the 12 strategies if the model chooses
    strategies, and in reference context those of the reference turns. They do not depend on other dialogues.

    Memory is bounded: a prompt or dialogue of more than `max_batch_length` tokens is computed alone, by forward passes
    of that length. A turn that needs more positions than the model has fails.

    Attributes:
        stop_ids: tokens that end a reply.

    Args:
        model_hash: SHA-256 (hex) that identifies the weights, such as that of the manifest.

    Raises:
        InputError: the model has sliding-window attention.
    """

    def __init__(
        self, model: PreTrainedModel, template: DialogueTemplate, config: InferenceConfig, model_hash: str = ""
    ):
        kinds = cache_kinds(model.config)
        if "window" in kinds:
            raise InputError(f"{model.name_or_path}: sliding-window attention is not supported: use another model")
        self._can_cut_back = "recurrent" not in kinds
        self.model = model.eval()
        self.template = template
        self.predicts_strategy = template.config.mode == "joint"
        self.config_hash = digest(
            [model_hash, template.fingerprint, tokenizer_hash(template.tokenizer), config.max_new_tokens, config.dtype]
        )
        self._config = config
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        # Only the end tokens of the model's generation configuration count. Qwen2.5-Instruct also sets sampling and a
        # repetition penalty, which would not be greedy decoding.
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
        self.stop_ids = {template.end_of_turn_id, *stops}

    def new_cache(self) -> DialogueCache:
        """An empty cache for batched decoding."""
        return DialogueCache(
            self.model,
            self.template.prefix_ids,
            self.stop_ids,
            self._config.max_new_tokens,
            max_length=self._positions,
            max_width=self._config.max_batch_length,
        )

    @torch.inference_mode()
    def reply(self, history: Sequence[Turn], strategy: Strategy | None = None) -> Reply:
        """Reply to one dialogue.

        Args:
            history: the turns so far; the last one is usually the customer's.
            strategy: the strategy to reply with; required in mode `given`, otherwise the model chooses.
        """
        cache = self.new_cache()
        (row,) = cache.add(["dialogue"], [self.template.prompt_ids(history, strategy)])
        text = self.decode(cache.step()[row])
        return self.template.parse(text) if strategy is None else Reply(strategy, text.strip())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens included."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.template.tokenizer.decode(list(token_ids), **options))

    @torch.inference_mode()
    def run(self, queue: TurnQueue) -> None:
        """Reply at every turn, batch by batch, then add likelihoods."""
        cache, long_cache = self.new_cache(), None
        in_flight: dict[int, tuple[TurnRequest, list[int]]] = {}  # by row of the cache
        while (
            requests := queue.pop(self._config.batch_size - len(in_flight), last_first=self._can_cut_back)
        ) or in_flight:
            batch = []
            for request in requests:
                prompt = request.prompt_ids(self.template)
                if len(prompt) >= self._positions:
                    queue.complete(request, self._outcome(request, prompt, []))
                elif len(prompt) > self._config.max_batch_length:
                    long_cache = long_cache or self.new_cache()
                    long_cache.add([request.dialogue.id], [prompt])
                    (ids,) = long_cache.step().values()
                    queue.complete(request, self._outcome(request, prompt, ids))
                else:
                    batch.append((request, prompt))
            rows = cache.add([request.dialogue.id for request, _ in batch], [prompt for _, prompt in batch])
            in_flight |= zip(rows, batch, strict=True)
            for row, ids in cache.step().items() if in_flight else ():
                queue.complete(in_flight[row][0], self._outcome(*in_flight.pop(row), ids))
        del cache, long_cache
        if self._config.likelihoods and (queue.context == "reference" or self.predicts_strategy):
            for dialogue in ProgressBar(queue.dialogues, "likelihoods", unit="dialogue"):
                self._add_likelihoods(queue, dialogue)

    @torch.inference_mode()
    def score_texts(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, float]]:
        """Negative log-likelihoods of texts in nats, in batches of texts of about the same length, as they are ready.

        A text of more tokens than the model has positions is scored in windows of that many, each of which begins with
        the last token of the one before. A window of more than `max_batch_length` tokens runs alone.

        Args:
            texts: of each its ids, and the indices of those to score; nothing predicts index 0.

        Yields:
            The index of a text, and the sum over its scored tokens.
        """
        windows = [
            (number, start, ids[start : start + self._positions])
            for number, (ids, _) in enumerate(texts)
            for start in range(0, max(len(ids) - 1, 1), self._positions - 1)
        ]
        sums, left = [0.0] * len(texts), Counter(number for number, *_ in windows)
        room = self._config.max_batch_length
        windows.sort(key=lambda window: len(window[2]))
        while windows:
            longest = len(windows[-1][2])
            batch = [windows.pop() for _ in range(min(len(windows), self._config.batch_size, max(1, room // longest)))]
            ids = [each for *_, each in batch]
            if longest > room:
                places = range(1, longest)
                found = [dialogue_log_likelihoods(self.model, self.template, ids[0], (), places, room)[0]]
            else:
                found = batch_log_likelihoods(self.model, ids)
            for (number, start, own), values in zip(batch, found, strict=True):
                scored = [place - start - 1 for place in texts[number][1] if start < place < start + len(own)]
                sums[number] -= values.double()[scored].sum().item()
                left[number] -= 1
                if not left[number]:
                    yield number, sums[number]

    def _outcome(self, request: TurnRequest, prompt: list[int], ids: list[int]) -> TurnOutcome:
        if len(prompt) + len(ids) >= self._positions:
            return request.failure(CONTEXT_LENGTH, f"history and reply exceed the model's {self._positions} positions")
        text = self.decode(ids)
        # Later prompts show this turn as training did: with the given strategy.
        given = request.given_strategy(self.template.config.mode)
        token_ids = (*(self.template.label_ids[given.number] if given else ()), *ids)
        details = {"token_ids": token_ids, "cut_off": len(ids) == self._config.max_new_tokens}
        return request.prediction(text, self.template.parse(text), digest(prompt), **details)

    def _add_likelihoods(self, queue: TurnQueue, dialogue: Dialogue) -> None:
        """Compute the likelihoods of all predicted turns of a dialogue."""
        predictions = queue.predictions_so_far(dialogue)
        reference = queue.context == "reference"
        computed = "reference_nll" if reference else "label_log_likelihoods"
        if all(getattr(prediction, computed) is not None for prediction in predictions.values()):
            return  # an earlier run did it
        targets = []
        if reference:
            example = self.template.encode(dialogue)
            ids = example.input_ids[: self._positions].tolist()
            targets = example.trained[: len(ids)].nonzero()[0].tolist()
            starts = [int(example.turn_offsets[turn]) + len(self.template.header_ids(turn)) for turn in predictions]
        else:
            own_ids = {turn: prediction.token_ids for turn, prediction in predictions.items()}
            history = [own_ids.get(turn, customer) for turn, customer in enumerate(dialogue.turns)]
            starts = [len(self.template.prompt_ids(history[:turn])) for turn in predictions]
            ids = self.template.prompt_ids(history[: max(predictions)])
        if not self.predicts_strategy:
            starts = []
        token_likelihoods, labels = dialogue_log_likelihoods(
            self.model, self.template, ids, starts, targets, self._config.max_batch_length
        )
        for prediction, row in itertools.zip_longest(predictions.values(), labels.tolist()):
            details = {"label_log_likelihoods": row and tuple(round(value, 4) for value in row)}
            first, end = example.turn_offsets[prediction.turn : prediction.turn + 2] if reference else (0, 0)
            if first < end <= len(ids):  # else not all of the reference turn has positions
                values = zip(targets, token_likelihoods.tolist(), strict=True)
                nll = [-value for target, value in values if first <= target < end]
                details |= {"reference_nll": round(sum(nll), 4), "reference_tokens": len(nll)}
            queue.update(replace(prediction, **details))


def read_template(source: ModelSource) -> tuple[DialogueTemplate, ModelSource]:
    """Read the template of a model or a training checkpoint, without its weights.

    A model that another program wrote is inspected first, as a base model is before its training.

    Returns:
        The template; and `source` with its hashes, if another program wrote it.

    Raises:
        InputError: the template or the tokenizer differs from the one of this code; or a model of another program
            cannot be used.
    """
    directory, manifest = str(source.path), source.manifest
    load_recorded_plugins(manifest.config.get("plugins", ()))
    base, revision = adapter_base(directory) or (directory, None)
    own = find_file(directory, "tokenizer.json")
    tokenizer = load_tokenizer(directory if own else base, None if own else revision)
    name = recorded_name(manifest.chat_template, source.finished)
    if manifest.is_plain:
        config = ModelConfig(path=base, revision=revision, name=base, tokenizer=directory if own else None)
        found = inspect_model(config, download=True).require()
        check_tokenizer(config, found, tokenizer)
        name = chat_template_name(manifest.chat_template, tokenizer, found.dims.model_type)
    template = DialogueTemplate(tokenizer, name, TemplateConfig(mode=manifest.mode, language=manifest.language))
    hashes = {"template_hash": template.fingerprint, "tokenizer_hash": tokenizer_hash(tokenizer)}
    if manifest.is_plain:
        return template, replace(source, manifest=replace(manifest, **hashes, chat_template=name))
    check_manifest(directory, manifest, *hashes.values())
    return template, source


def load_generator(
    path: str,
    template: DialogueTemplate,
    config: InferenceConfig,
    model_hash: str = "",
    device: torch.device | None = None,
    revision: str | None = None,
    setting: str = "evaluation.delta_kernel",
) -> HFGenerator:
    """Load the model at a path or hub id.

    Args:
        model_hash: see `HFGenerator`.
        device: device of the whole model, such as this process's GPU; None spreads it over the machine's GPUs, if any.
        setting: the name of `config.delta_kernel` for messages.

    Raises:
        InputError: as `load_causal_lm` and `check_delta_kernel`.
    """
    base, own_revision = adapter_base(path) or (path, revision)
    with hub_errors(base, "model"):
        kinds = getattr(read_model_config(base, own_revision), "layer_types", None) or ()
    check_delta_kernel(config.delta_kernel, kinds, device and device.type, setting)
    device_map = {"": device} if device else "auto" if torch.cuda.is_available() else None
    model = load_causal_lm(path, revision=revision, dtype=_DTYPES[config.dtype], device_map=device_map)
    use_onednn(model)
    prepare_delta_nets(model, config.delta_kernel)
    return HFGenerator(model, template, config, model_hash)


def load_final_model(
    directory: str,
    config: InferenceConfig | None = None,
    device: torch.device | None = None,
    plain: Manifest | None = None,
) -> HFGenerator:
    """Load a model with its template, ready to reply: one of recipes/sft.py or recipes/export.py, or a plain one.

    Args:
        plain: the manifest of a model that another program wrote (see `plain_manifest`).

    Raises:
        InputError: as `open_source`, `read_template` and `load_causal_lm`.
    """
    template, source = read_template(open_source(directory, False, plain))
    config, model_hash = config or InferenceConfig(), digest(asdict(source.manifest))
    return load_generator(directory, template, config, model_hash, device, setting="delta_kernel")
