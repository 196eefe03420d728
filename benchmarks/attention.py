"""Measure the speed and exactness of the attention implementations on one shared-prefix pack.

python benchmarks/attention.py                                     # on a GPU
python benchmarks/attention.py --hidden 256 --heads 4 --length 2048  # small, on a CPU
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from transformers import AutoConfig, AutoModelForCausalLM

from csc_train.models.attention.flex import FLEX_ATTENTION
from csc_train.models.attention.select import collator_layout
from csc_train.models.attention.varlen import VARLEN_ATTENTION
from csc_train.packing.collator import IGNORE_INDEX, PackCollator

PREFIX, BODY = 568, 752
"""Tokens of the system prompt, and of a dialogue without it: the means of the RoleCS-like set."""


def compare(
    attentions: list[str], *, hidden: int, heads: int, length: int, repeats: int, device: torch.device
) -> list[dict]:
    """Forward and backward pass of two decoder layers on one pack of `length` tokens, by attention.

    Returns:
        For each attention: the median seconds of a pass, the peak GPU memory in GB, and the largest relative error (max
        norm) of the loss and of any parameter's gradient against the dense mask in float32; bf16 autocast on a GPU,
        float32 elsewhere. Or why it did not run.
    """
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 7),
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    bodies = [BODY] * ((length - PREFIX) // BODY)
    lengths = [PREFIX, *bodies]
    pack = {
        "input_ids": torch.randint(4096, (sum(lengths),)),
        "loss_weights": [0.0] * PREFIX + [0.0, *[1.0] * (BODY - 1)] * len(bodies),
        "document_lengths": lengths,
        "prefix_length": PREFIX,
    }

    def passes(attention: str, repeats: int, autocast: bool) -> tuple[list[torch.Tensor], list[float]]:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        model.load_state_dict(weights)
        model.to(device).train()
        collator = PackCollator(collator_layout(attention, "shared_prefix"), 0, additive=attention == "eager")
        batch: Any = send_to_device(collator([pack]), device)
        labels = batch.pop("labels")
        del batch["loss_weights"]  # all 0 or 1
        seconds = []
        for _ in range(repeats):
            model.zero_grad()
            _wait(device)
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = model(**batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORE_INDEX)
            loss.backward()
            _wait(device)
            seconds.append(time.perf_counter() - begin)
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())], seconds

    reference, _ = passes("sdpa", 1, autocast=False)
    rows = []
    for attention in attentions:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            # The first two passes compile and warm up.
            values, seconds = passes(attention, repeats + 2, autocast=device.type == "cuda")
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            rows.append({"attention": attention, "failed": str(error).splitlines()[0]})
            continue
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(values, reference, strict=True)]
        row = {"attention": attention, "seconds": statistics.median(seconds[2:]), "error": max(errors)}
        if device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "settings": vars(arguments),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attentions": compare([VARLEN_ATTENTION, FLEX_ATTENTION, "sdpa", "eager"], **vars(arguments), device=device),
    }
    print(json.dumps(result, indent=1))
