"""Generators that evaluation in generated context is compared with: one prompt at a time, and padded batches."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from csc_train.inference.generator import TurnQueue
from csc_train.inference.hf import HFGenerator
from csc_train.models.attention.gated_delta_net import prepare_delta_nets
from csc_train.models.onednn import use_onednn

MAX_NEW_TOKENS = 40
"""Maximum tokens of a reply, as in the demo."""


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on a CPU as `load_generator` prepares it; a model on a GPU is not changed there."""
    if model.device.type != "cpu":
        return model
    model = copy.deepcopy(model)
    prepare_delta_nets(model)
    use_onednn(model)
    return model


class WithoutLikelihoods(HFGenerator):
    """Generates without computing likelihoods."""

    def _add_likelihoods(self, *_) -> None:
        pass


class BatchedGenerator(WithoutLikelihoods):
    """Generates the next turns of a batch of dialogues by `generate`, padded, without a cache between turns."""

    batch_size: int | None = None
    """Turns of a batch; defaults to the settings'."""

    def run(self, queue: TurnQueue) -> None:
        """Reply at every turn."""
        model: Any = self.model
        while requests := queue.pop(self.batch_size or self._config.batch_size):
            prompts = [request.prompt_ids(self.template) for request in requests]
            width = max(map(len, prompts))
            output = model.generate(
                torch.tensor([[0] * (width - len(each)) + each for each in prompts], device=model.device),
                attention_mask=torch.tensor(
                    [[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=model.device
                ),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self._config.max_new_tokens,
                    eos_token_id=sorted(self.stop_ids),
                    pad_token_id=0,
                ),
            )
            for request, prompt, ids in zip(requests, prompts, output[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
                queue.complete(request, self._outcome(request, prompt, ids[:end]))


class SequentialGenerator(BatchedGenerator):
    """Generates one turn at a time, without a cache between turns."""

    batch_size = 1
