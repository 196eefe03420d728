"""A local model as the system under evaluation: greedy decoding, batched over dialogues."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from csc_train.checkpoint import Manifest, check_manifest, read_manifest, tokenizer_hash
from csc_train.dialogue import Turn
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.evaluation.predict import Request, Said
from csc_train.files import digest
from csc_train.hub import readable
from csc_train.strategies import Strategy
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


class HFPolicy:
    """Replies with a model that plain `from_pretrained` loads."""

    def __init__(self, model: PreTrainedModel, template: DialogueTemplate, config: EvaluationConfig):
        self.model = model.eval()
        self.template = template
        self.batch_size = config.batch_size
        self.strategies_apply = template.config.mode == "joint"
        stops = model.generation_config.eos_token_id
        stops = {template.end_of_turn_id, *(stops if isinstance(stops, list) else [stops] if stops is not None else [])}
        self._stops = sorted(stops)
        # In place of the model's own, not beside it: `generate` fills what is left open from the model's, and
        # Qwen2.5-Instruct ships a repetition penalty, which is not greedy decoding.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=template.tokenizer.pad_token_id,
        )

    @torch.inference_mode()
    def reply(self, requests: Sequence[Request]) -> list[Said]:
        """Generate a reply to each request, greedily."""
        prompts = [self._prompt(request) for request in requests]
        longest = max(map(len, prompts))
        pad = self.template.tokenizer.pad_token_id
        # Padding on the left, so that every reply starts in the same column.
        input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.model.device
        output = self.model.generate(input_ids.to(device), attention_mask=mask.to(device))
        generated = output[:, longest:].tolist()
        return [self._said(*answer) for answer in zip(requests, prompts, generated, strict=True)]

    def _prompt(self, request: Request) -> list[int]:
        history = [turn if isinstance(turn, Turn) else turn.ids for turn in request.history]
        return self.template.prompt_ids(history, self._given(request))

    def _given(self, request: Request) -> Strategy | None:
        return request.dialogue.turns[request.turn].strategy if self.template.config.mode == "given" else None

    def _said(self, request: Request, prompt: list[int], ids: list[int]) -> Said:
        end = next((position for position, token in enumerate(ids) if token in self._stops), len(ids))
        ids = ids[:end]
        text = self.template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A later prompt shows this turn as training did: with the strategy that was handed in.
        handed_in = self.template.prompt_ids([], self._given(request))[len(self.template.prompt_ids([])) :]
        return Said(text, self.template.parse(text), digest(prompt), (*handed_in, *ids))


def open_checkpoint(checkpoint: str) -> tuple[DialogueTemplate, Manifest]:
    """The template of a checkpoint that recipes/sft.py wrote, and its manifest; the model is not loaded yet.

    Raises:
        InputError: it is no checkpoint, or its template or tokenizer is not what this code would use.
    """
    manifest = read_manifest(checkpoint)
    if not (Path(checkpoint) / "tokenizer.json").is_file():
        # transformers would make up an empty one.
        raise InputError(f"{checkpoint}: the directory holds no tokenizer (tokenizer.json)")
    with readable(checkpoint, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = TemplateConfig(mode=manifest.mode, language=manifest.language)
    template = DialogueTemplate(tokenizer, manifest.chat_template, settings)
    check_manifest(checkpoint, manifest, template.fingerprint, tokenizer_hash(tokenizer))
    return template, manifest


def base_of(checkpoint: str, manifest: Manifest) -> str:
    """Where the model that a checkpoint's training started from is: a path or a hub id."""
    beside = Path(checkpoint) / manifest.base_model
    return str(beside) if manifest.base_model.startswith(".") and beside.is_dir() else manifest.base_model


def load_policy(
    path: str, template: DialogueTemplate, config: EvaluationConfig, revision: str | None = None
) -> HFPolicy:
    """The policy of the model at a path or hub id, talking through `template`.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    with readable(path, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=_DTYPES[config.dtype],
            # Spread over the GPUs of this machine where one is too small.
            device_map="auto" if torch.cuda.is_available() else None,
        )
    return HFPolicy(model, template, config)
