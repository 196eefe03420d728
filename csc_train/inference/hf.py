"""A local model as the system under evaluation: greedy decoding, batched over dialogues."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from csc_train.checkpoints.manifest import Manifest, check_manifest, read_manifest
from csc_train.data.dialogue import Dialogue, Turn
from csc_train.data.strategies import Strategy
from csc_train.errors import InputError
from csc_train.files import digest
from csc_train.inference.config import InferenceConfig
from csc_train.inference.generator import Generation, TurnQueue, TurnRequest
from csc_train.inference.kv_cache import DialogueCache
from csc_train.models.families import cache_kinds
from csc_train.models.hub import hub_errors, load_causal_lm
from csc_train.models.tokenizer import tokenizer_hash
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate
from csc_train.template.likelihood import dialogue_log_likelihoods

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


class HFGenerator:
    """Replies with a model that plain `from_pretrained` loads.

    What is computed of a dialogue is kept from turn to turn (see `DialogueCache`). When all turns are answered, one
    forward of each dialogue gives the likelihoods of the 12 labels at all of its turns, where the model chooses
    strategies, and in reference context those of the reference's own turns. They are computed dialogue by dialogue, so
    that they do not depend on what else was answered at the time, and kept to four decimals.

    Attributes:
        stops: tokens that end a reply.

    Args:
        origin: SHA-256 (hex) of what says which model it is, such as its manifest.

    Raises:
        InputError: the model has sliding-window attention.
    """

    def __init__(self, model: PreTrainedModel, template: DialogueTemplate, config: InferenceConfig, origin: str = ""):
        if cache_kinds(model.config) != {"full"}:
            raise InputError(f"{model.name_or_path}: a model with sliding-window attention cannot be evaluated here")
        self.model = model.eval()
        self.template = template
        self.predicts_strategy = template.config.mode == "joint"
        self.config_hash = digest(
            [origin, template.fingerprint, tokenizer_hash(template.tokenizer), config.max_new_tokens, config.dtype]
        )
        self._config = config
        # Of the model's own generation configuration only the end counts: Qwen2.5-Instruct ships a repetition penalty
        # and sampling, which is not greedy decoding.
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
        self.stops = {template.end_of_turn_id, *stops}

    @torch.inference_mode()
    def run(self, queue: TurnQueue) -> None:
        """Answer every turn, batch by batch, then add likelihoods."""
        cache = DialogueCache(self.model, self.template.prefix_ids, self.stops, self._config.max_new_tokens)
        asked: dict[int, tuple[TurnRequest, list[int]]] = {}  # by row of the cache
        while True:
            requests = queue.pop(self._config.batch_size - len(asked))
            prompts = [self._prompt(request) for request in requests]
            rows = cache.add([request.dialogue.id for request in requests], prompts)
            asked |= zip(rows, zip(requests, prompts, strict=True), strict=True)
            if not asked:
                break
            for row, ids in cache.step().items():
                request, prompt = asked.pop(row)
                queue.complete(request, self._said(request, prompt, ids))
        del cache
        if self._config.likelihoods and (queue.context == "reference" or self.predicts_strategy):
            for dialogue in tqdm(queue.dialogues, "likelihoods", unit="dialogue", disable=None):
                self._add_likelihoods(queue, dialogue)

    def _prompt(self, request: TurnRequest) -> list[int]:
        history = [turn if isinstance(turn, Turn) else turn.ids for turn in request.history]
        return self.template.prompt_ids(history, self._given(request))

    def _given(self, request: TurnRequest) -> Strategy | None:
        return request.dialogue.turns[request.turn].strategy if self.template.config.mode == "given" else None

    def _said(self, request: TurnRequest, prompt: list[int], ids: list[int]) -> Generation:
        text = self.template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A later prompt shows this turn as training did: with the strategy that was handed in.
        handed_in = self.template.prompt_ids([], self._given(request))[len(self.template.prompt_ids([])) :]
        return Generation(text, self.template.parse(text), digest(prompt), (*handed_in, *ids))

    def _add_likelihoods(self, queue: TurnQueue, dialogue: Dialogue) -> None:
        """Of the turns of a dialogue that were predicted."""
        said = queue.completed(dialogue)
        reference = queue.context == "reference"
        if all(each.reference_nll is not None if reference else each.label_log_likelihoods for each in said.values()):
            return  # by an earlier run
        targets = []
        if reference:
            example = self.template.encode(dialogue)
            ids, targets = example.input_ids.tolist(), example.trained.nonzero()[0].tolist()
            headed = len(self.template.supporter_header_ids)
            starts = [int(example.turn_offsets[turn]) + headed for turn in said]
        else:
            history = [said[turn].ids if turn in said else gold for turn, gold in enumerate(dialogue.turns)]
            starts = [len(self.template.prompt_ids(history[:turn])) for turn in said]
            ids = self.template.prompt_ids(history[: max(said)])
        if not self.predicts_strategy:
            starts = []
        own, labels = dialogue_log_likelihoods(self.model, self.template, ids, starts, targets)
        for (turn, words), row in itertools.zip_longest(said.items(), labels.tolist()):
            facts = {"label_log_likelihoods": row and tuple(round(value, 4) for value in row)}
            if reference:
                first, end = example.turn_offsets[turn], example.turn_offsets[turn + 1]
                here = [-value for target, value in zip(targets, own.tolist(), strict=True) if first <= target < end]
                facts |= {"reference_nll": round(sum(here), 4), "reference_tokens": len(here)}
            queue.update(dialogue, turn, replace(words, **facts))


def open_final_model(checkpoint: str) -> tuple[DialogueTemplate, Manifest]:
    """The template of a checkpoint that recipes/sft.py wrote, and its manifest; the model is not loaded yet.

    Raises:
        InputError: it is no checkpoint, or its template or tokenizer is not what this code would use.
    """
    manifest = read_manifest(checkpoint)
    if not (Path(checkpoint) / "tokenizer.json").is_file():
        # transformers would make up an empty one.
        raise InputError(f"{checkpoint}: the directory holds no tokenizer (tokenizer.json)")
    with hub_errors(checkpoint, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = TemplateConfig(mode=manifest.mode, language=manifest.language)
    own = manifest.chat_template.endswith(".jinja")  # a user's file, of which the tokenizer's directory has a copy
    name = f"{checkpoint}/chat_template.jinja" if own else manifest.chat_template
    template = DialogueTemplate(tokenizer, name, settings)
    check_manifest(checkpoint, manifest, template.fingerprint, tokenizer_hash(tokenizer))
    return template, manifest


def base_model_path(checkpoint: str, manifest: Manifest) -> str:
    """Where the model that a checkpoint's training started from is: a path or a hub id."""
    beside = Path(checkpoint) / manifest.base_model
    return str(beside) if manifest.base_model.startswith(".") and beside.is_dir() else manifest.base_model


def load_generator(
    path: str,
    template: DialogueTemplate,
    config: InferenceConfig,
    origin: str = "",
    device: torch.device | None = None,
    revision: str | None = None,
) -> HFGenerator:
    """The generator of the model at a path or hub id, talking through `template`.

    Args:
        origin: see `HFGenerator`.
        device: where the whole model goes, such as the one GPU of this process; if not given it is spread over the
            GPUs of this machine, if there are any.

    Raises:
        InputError: as `load_causal_lm`.
    """
    spread = "auto" if torch.cuda.is_available() else None
    placed = {"": device} if device else spread
    model = load_causal_lm(path, revision=revision, dtype=_DTYPES[config.dtype], device_map=placed)
    return HFGenerator(model, template, config, origin)
