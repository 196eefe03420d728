"""Measure training on one CUDA GPU: exactness, attention, whole optimizer steps beside TRL's, memory, hours of a run.

make bench-gpu PYTHON=python3           # six minutes on an H200; installs nothing
python benchmarks/gpu.py --wheels DIR   # with packages that the machine lacks, as wheels in DIR (see README.md)
python benchmarks/gpu.py --rehearse     # every section on a CPU with tiny dimensions; its figures mean nothing

What matters most comes first. Each figure is written to results/gpu.json as soon as it is there. A second call measures
what is missing: sections that failed or found no time, and those of other code, settings or devices. The models have
Qwen2.5's dimensions and random weights.
"""

import argparse
import contextlib
import gzip
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).parent
UNPACKED = tempfile.mkdtemp(prefix="wheels-") if "--wheels" in sys.argv[:-1] else ""
"""Where the wheels of `--wheels` are unpacked, to be imported from there; the caller's to delete."""
if UNPACKED:
    for wheel in sorted(Path(sys.argv[sys.argv.index("--wheels") + 1]).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(UNPACKED)
sys.path[:0] = [*filter(None, [UNPACKED]), str(HERE.parent)]

# This process must not touch the GPU, nor have threads of its own: others begin as copies of it.
os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"gpu.py: {sys.executable} has no torch: give a Python that has it, as in PYTHON=.venv/bin/python")

if not torch.cuda.is_available() and not {"--rehearse", "--help", "-h"} & set(sys.argv):
    sys.exit("gpu.py measures a CUDA GPU, and torch finds none here; --rehearse goes through it on a CPU")
try:
    import datasets
    import numpy
    import transformers
    from accelerate.utils import send_to_device
    from generators import MAX_NEW_TOKENS, BatchedGenerator, SequentialGenerator, WithoutLikelihoods
    from measure import (
        EXCHANGES,
        EXPERT_SHAPE,
        HYBRID_SHAPE,
        LENGTHS,
        PREFIX,
        SHAPES,
        SMALL_TOKENIZER,
        Report,
        body_lengths,
        random_examples,
        random_model,
        ratios,
        seconds,
        side_by_side,
        spread,
        trl_trainer,
    )
    from packed_varlen import PACKED_VARLEN
    from transformers import AutoTokenizer, Trainer, TrainerCallback
    from transformers.trainer_utils import SaveStrategy
    from turns import CONTEXT, Side, SideError, in_process, sides_of, take_turns

    from csc_train.data.sample_grammar import generate_sample
    from csc_train.errors import InputError
    from csc_train.files import digest, file_digest, read_json
    from csc_train.inference.config import InferenceConfig
    from csc_train.inference.generator import generate_predictions
    from csc_train.inference.kv_cache import DialogueCache
    from csc_train.models.attention.gated_delta_net import (
        DeltaLevel,
        build_delta_levels,
        build_levels,
        has_fla,
        prepare_delta_nets,
        run_levels,
    )
    from csc_train.models.attention.select import select_attention
    from csc_train.models.attention.varlen import varlen_attention
    from csc_train.models.config import AdapterConfig, ArchitectureConfig, ModelConfig
    from csc_train.models.families import build_model_config
    from csc_train.models.loading import load_model, lora_config
    from csc_train.models.precision import resolve_precision, weight_dtype
    from csc_train.packing.bin_packing import subset_sum_packing
    from csc_train.packing.collator import PackCollator, run_bounds
    from csc_train.packing.config import PackingConfig
    from csc_train.packing.dataset import PackedDataset, pack_dialogues
    from csc_train.runs.provenance import code_digest
    from csc_train.template.config import TemplateConfig
    from csc_train.template.dialogue_template import DialogueTemplate
    from csc_train.training.config import TrainerConfig, ZeroConfig
    from csc_train.training.loss import score_tokens
    from csc_train.training.memory import GIB
    from csc_train.training.profiling import ACTIVE, TRACE, WAIT, WARM_UP, ProfilerCallback, time_shares
    from csc_train.training.train_metrics import peak_flops
    from csc_train.training.trainer import build_trainer, training_arguments
except ModuleNotFoundError as error:
    sys.exit(f"gpu.py: {error}: benchmarks/README.md lists the wheels that a bare machine needs; give them by --wheels")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
OWN_PREFIX = 309
"""Ids of the project's own prompt under Qwen2.5's tokenizer."""
EPOCHS, DIALOGUES = 3, 11_232
"""Of a training on RoleCS; the paper publishes no epochs, and conf/trainer/full.yaml names the source of three."""
MAX_RECOMPILES = 2
ERROR_LIMIT = 1e-2
"""Norm of the error over that of the value, against float64: what bf16 stays below and a wrong mask does not."""
DELTA_ERROR_LIMIT = 3e-2
"""The same of a gated delta net with bf16 weights, against float32: it is a whole layer with five products."""
HYBRID, EXPERTS = "0.8b", "30b-a3b"
"""The names of the hybrid shape, and of that with experts."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    shapes: dict[str, dict[str, Any]] = field(default_factory=lambda: SHAPES)
    hybrid: dict[str, Any] = field(default_factory=lambda: HYBRID_SHAPE)
    hybrid_layers: tuple[int, int] = (4, 8)
    """Layers of the two models whose waits are compared."""
    experts: dict[str, Any] = field(default_factory=lambda: EXPERT_SHAPE)
    padded: int = 8
    """Dialogues of TRL's padded batch."""
    max_length: int = 8192
    shortened: int = 1
    """By how much dialogues and prefixes are shortened."""
    dialogues: int = 400
    warm_up: int = 3
    turns: int = 3
    steps: int = 2
    """Measured in a turn of a side."""
    attention_repeats: int = 15
    evaluated: tuple[int, int] = (128, 2)
    """Dialogues in generated context, and how many of them are generated one prompt at a time."""
    reply_tokens: int = MAX_NEW_TOKENS
    """The most tokens of a reply there."""
    fp8_layers: int = 6
    """Layers of the 7B that is trained whole in bf16 and fp8: all of them take more than one GPU's memory."""
    peak: float | None = None
    """FLOP/s for MFU; defaults to the data sheet's of this GPU."""


_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 2100, "max_position_embeddings": 512}  # fmt: skip
REHEARSAL = Settings(
    shapes={"1.5b": _TINY | {"tie_word_embeddings": True}, "7b": _TINY | {"tie_word_embeddings": False}},
    hybrid=_TINY
    | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    experts=_TINY
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    padded=2,
    max_length=512,
    shortened=16,
    dialogues=40,
    warm_up=1,
    turns=1,
    steps=2,
    attention_repeats=2,
    evaluated=(2, 1),
    reply_tokens=3,
    fp8_layers=1,
    peak=1e12,
)


class Sections(Report):
    """A report that is written after every figure, and knows which sections it has."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Begin or go on with the report at `path`.

        Args:
            settings: what decides all results: sizes, code, device, and the commit, if it is given.
        """
        earlier = read_json(path) if path.exists() else {}
        super().__init__(settings, earlier.get("sections", {}), settings["device"])
        deciding = {name: value for name, value in settings.items() if name != "commit"}
        self.decides = {"settings": digest(deciding)[:12]} | {name: settings[name] for name in ("device", "torch")}
        self.path, self.skipped, self.failed = path, 0, 0

    def add(self, name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
        """Record a result, and write it."""
        super().add(name, value, least, most)
        self.write(self.path)

    def measure(self, name: str, how: str, action: Callable[[], None], end: float, needs: float) -> None:
        """Measure a section unless it is there; what it raises is recorded, and the next one can go on.

        Args:
            how: the method and its assumptions.
            end: by `time.monotonic`, when no section may work any more.
            needs: seconds that it takes on an H200.
        """
        found = self.sections.get(name, {})
        if found.get("settings") == self.decides and found["results"].get("status", {}).get("value") == "done":
            print(f"\n{name}: measured before", flush=True)
            return
        if time.monotonic() + needs > end:
            self.skipped += 1
            print(f"\n{name}: no time is left for it; a second call measures it", flush=True)
            return
        self.section(name, how, **self.decides)
        self.add("status", "begun")
        process = CONTEXT.Process(target=self._act, args=(action,))
        process.start()
        process.join()
        self.sections = read_json(self.path)["sections"]
        self.results = self.sections[name]["results"]
        if self.results["status"]["value"] == "begun":
            self.add("status", f"failed: the process ended with {process.exitcode}")
        self.failed += self.results["status"]["value"] != "done"

    def _act(self, action: Callable[[], None]) -> None:
        """What the process of a section does."""
        started = time.monotonic()
        try:
            action()
            status = "done"
        except Exception as error:
            status = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        self.add("seconds of this section", time.monotonic() - started)
        self.add("status", status)


def main() -> None:
    """Go through the sections in order."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="go through every section on a CPU, tiny")
    parser.add_argument("--minutes", type=float, default=6, help="begin no section that would end after this")
    parser.add_argument("--sections", nargs="+", default=[""], help="only sections whose names begin so")
    parser.add_argument("--output", type=Path, help="defaults to results/gpu.json; a rehearsal's to a temporary one")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import from, without installing them")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    options = parser.parse_args()
    end = STARTED + 60 * options.minutes
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    settings = REHEARSAL if options.rehearse else Settings()
    if options.rehearse:
        torch.set_num_threads(1)
        end = float("inf")
    output = options.output or (
        Path(tempfile.mkdtemp()) / "gpu.json" if options.rehearse else HERE / "results" / "gpu.json"
    )
    sources = sorted(HERE.glob("*.py"))
    report = Sections(
        output,
        asdict(settings) | {
            "rehearsal": options.rehearse,
            "commit": options.commit,
            "code": digest([code_digest(), *map(file_digest, sources)]),
            "device": gpu_name() or "cpu",
            "torch": torch.__version__,
        },
    )  # fmt: skip
    bench = Bench(report, settings, end)
    if DEVICE.type == "cuda" and not has_fla():
        print("hybrid: skipped, flash-linear-attention is not here: give its wheels by --wheels (see README.md)")
    for name, (how, action, needs) in bench.sections().items():
        if name.startswith(tuple(options.sections)):
            report.measure(name, how, action, end, needs)
    print(f"\n{output}: {report.failed} sections failed, {report.skipped} found no time")
    sys.exit(1 if report.failed else 0)


def gpu_name() -> str | None:
    """The name of the GPU, asked by another process; None without one."""
    if not torch.cuda.is_available():
        return None
    try:
        return in_process(torch.cuda.get_device_name)
    except RuntimeError as error:
        sys.exit(f"gpu.py: a process cannot use CUDA: {error}; has an imported package used it before?")


def case_adapter(shape: str) -> AdapterConfig:
    """How a model is trained: the 7B and that with experts by LoRA, the 1.5B and the hybrid whole."""
    return AdapterConfig(kind="lora" if shape in ("7b", EXPERTS) else "full")


class Bench:
    """The sections."""

    def __init__(self, report: Sections, settings: Settings, end: float = float("inf")):
        """Prepare.

        Args:
            end: by `time.monotonic`; behind it, trainings take no more steps than they must.
        """
        self.report, self.settings, self.end = report, settings, end
        self.tokenizer = AutoTokenizer.from_pretrained(SMALL_TOKENIZER)
        self.sides: dict[str, Side] = {}
        """Those of the comparison that is made now."""
        self.shapes = settings.shapes | {HYBRID: settings.hybrid, EXPERTS: settings.experts}
        self.peak = settings.peak or peak_flops(report.settings["device"]) or float("nan")

    def sections(self) -> dict[str, tuple[str, Callable[[], None], float]]:
        """By name: the method, what measures it, and the seconds that it takes on an H200."""
        found: dict[str, tuple[str, Callable[[], None], float]] = {
            "exactness": (EXACTNESS, self.exactness, 15),
            "attention": (ATTENTION, self.attention, 15),
            "waits": (WAITS, self.waits, 20),
        }
        for shape, needs in (("1.5b", 50), ("7b", 60)):
            found[f"steps: {shape}, {PREFIX} ids"] = (STEPS, lambda shape=shape: self.shared_and_plain(shape), needs)
            found[f"steps: {shape}, {OWN_PREFIX} ids"] = (STEPS, lambda shape=shape: self.beside_trl(shape), needs)
        found["steps: 7b, hours"] = (HOURS, self.hours, 0)
        for shape in ("1.5b", "7b"):
            found[f"profile: {shape}"] = (PROFILE, lambda shape=shape: self.profile(shape), 20)
        for shape in ("1.5b", "7b"):
            found[f"steps: {shape}, TRL as it comes"] = (STEPS, lambda shape=shape: self.beside_default_trl(shape), 50)
        found["head"] = (HEAD, self.head, 20)
        found["generated context"] = (GENERATED, self.generated_context, 60)
        variants: dict[str, tuple[str, dict[str, Any]]] = {
            f"alone: {shape}, {' '.join(f'{key}={value}' for key, value in changed.items()) or 'as shipped'}": (
                shape, changed
            )
            for shape, choices in {
                "1.5b": [
                    {}, {"compile": "off"}, {"gradient_checkpointing": "off"}, {"gradient_checkpointing": "selective"},
                    {"gradient_checkpointing": "full"},
                ],
                "7b": [{}, {"compile": "off"}],
                "7b whole": [{"precision": "bf16"}, {"precision": "fp8"}],
            }.items()
            for changed in choices
        }  # fmt: skip
        if importlib.util.find_spec("deepspeed"):
            variants["alone: 1.5b, zero=off"] = "1.5b", {"zero": "off"}
        if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            variants["alone: 1.5b, compile=off with liger-kernel"] = "1.5b", {"compile": "off", "liger": True}
        for name, (shape, changed) in variants.items():
            found[name] = (ALONE, lambda shape=shape, changed=changed: self.alone(shape, **changed), 20)
        found |= {
            "experts: exactness": (EXPERTS_EXACTNESS, self.experts_exactness, 20),
            "experts: products": (EXPERTS_PRODUCTS, self.experts_products, 30),
            f"experts: steps, {PREFIX} ids": (EXPERTS_STEPS, lambda: self.shared_and_plain(EXPERTS), 60),
            "experts: waits": (WAITS, lambda: self.waits(EXPERTS), 30),
        }
        if DEVICE.type == "cpu" or has_fla():
            found |= {
                "hybrid: exactness": (HYBRID_EXACTNESS, self.hybrid_exactness, 30),
                f"hybrid: steps, {PREFIX} ids": (HYBRID_STEPS, lambda: self.shared_and_plain(HYBRID), 60),
                "hybrid: layer": (HYBRID_LAYER, self.hybrid_layer, 30),
                "hybrid: waits": (WAITS, lambda: self.waits(HYBRID, self.settings.hybrid_layers), 40),
                f"hybrid: TRL, {PREFIX} ids": (HYBRID_STEPS, self.beside_padded_trl, 60),
            }
        return found

    # Attention

    def exactness(self) -> None:
        """Output and gradients of the attention operator against a dense mask in float64; then those of the head."""
        for shape in self.settings.shapes:
            for prefix in (0, OWN_PREFIX, PREFIX):
                lengths = [each // self.settings.shortened for each in (900, 640, 32, 480)]
                prefix = prefix // self.settings.shortened
                states, metadata = self.row([[prefix, *lengths] if prefix else lengths], [prefix], shape)
                expected = dense_attention(states, dense_mask(lengths, prefix))
                found = self.operator(states, metadata)
                where = f"{shape}, prefix {prefix}"
                for name, one, other in zip(("output", *"qkv"), found, expected, strict=True):
                    self.report.add(f"{where}: error of {name}", relative_error(one, other), most=ERROR_LIMIT)
                moved = {name: metadata[name].clone() for name in ("cu_seqlens_q", "cu_seqlens_k")}
                for each in moved.values():
                    each[1 + (prefix > 0)] += 1
                moved |= {name: metadata[name] + 1 for name in ("max_q", "max_k")}
                planted = self.operator(states, metadata | moved)
                errors = [relative_error(one, other) for one, other in zip(planted, expected, strict=True)]
                seen = max(float("inf") if math.isnan(error) else error for error in errors)
                self.report.add(f"{where}: with a boundary off by one", seen, least=1.5 * ERROR_LIMIT)
            self.head_exactness(shape)
        if missed := [name for name, each in self.report.results.items() if each.get("met") is False]:
            raise RuntimeError(f"{len(missed)} of the errors are not as they must be: {missed[0]}")

    def head_exactness(self, shape: str) -> None:
        """Loss and gradients of the head against plain logits in float64."""
        from csc_train.training.loss import CHUNK, score_tokens

        width, vocabulary, rows = self.settings.shapes[shape]["hidden_size"], 4096, CHUNK + 500
        sizes = {"device": DEVICE, "dtype": DTYPE}
        hidden, weight = torch.randn(rows, width, **sizes), torch.randn(vocabulary, width, **sizes) * width**-0.5
        targets, weights = torch.randint(vocabulary, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)

        def ours(targets: torch.Tensor) -> list[torch.Tensor]:
            operands = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            loss = score_tokens(operands[0], operands[1], targets, weights).loss
            return [loss.detach(), *torch.autograd.grad(loss, operands)]

        exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        losses = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
        loss = (losses * weights).sum()
        expected = [loss.detach(), *torch.autograd.grad(loss, exact)]
        for name, one, other in zip(("loss", "hidden states", "weights"), ours(targets), expected, strict=True):
            self.report.add(f"{shape}, head: error of {name}", relative_error(one, other), most=ERROR_LIMIT)
        planted = relative_error(ours(targets.roll(1))[2], expected[2])
        self.report.add(f"{shape}, head: of weights with targets off by one", planted, least=1.5 * ERROR_LIMIT)

    def attention(self) -> None:
        """Time of two layers' attention on a full row."""
        for shape in self.settings.shapes:
            rows = {}
            for strategy in ("shared_prefix", "best_fit"):
                packs = self.packs(shape, PREFIX, strategy)
                collator = PackCollator("varlen", 0, bounds=run_bounds([packs], 1))
                rows[strategy] = self.states(collator([packs[0]]), shape)
            taken = side_by_side(
                {name: lambda row=row: [self.operator(*row) for _ in range(2)] for name, row in rows.items()},
                self.settings.attention_repeats,
                warm_up=3,
            )
            for name, seconds in taken.items():
                self.report.add(f"{shape}: {name}, ms", spread(1000 * each for each in seconds))
            self.report.add(f"{shape}: shared / plain", ratios(taken["shared_prefix"], taken["best_fit"]))

    def row(self, lengths: list[list[int]], prefixes: list[int], shape: str) -> tuple[list[torch.Tensor], dict]:
        """Random states of a row of these documents, and its metadata."""
        packs = [
            {"input_ids": [1] * sum(each), "loss_weights": [0.0] * (sum(each) - 1) + [1.0], "document_lengths": each,
             "prefix_length": prefix}
            for each, prefix in zip(lengths, prefixes, strict=True)
        ]  # fmt: skip
        return self.states(PackCollator("varlen", 0)(packs), shape)

    def states(self, batch: dict[str, Any], shape: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Random queries, keys, values and gradient of the output, [1, heads, length, head_dim], for a batch's row."""
        dims = self.settings.shapes[shape]
        heads, length = dims["num_attention_heads"], batch["input_ids"].shape[1]
        head_dim = dims["hidden_size"] // heads
        sizes = (heads, dims["num_key_value_heads"], dims["num_key_value_heads"], heads)
        states = [torch.randn(1, size, length, head_dim, device=DEVICE, dtype=DTYPE) for size in sizes]
        metadata = batch["varlen_metadata"]
        moved = {key: each.to(DEVICE) if torch.is_tensor(each) else each for key, each in metadata.items()}
        return [each.requires_grad_() for each in states[:3]] + states[3:], moved

    def operator(self, states: list[torch.Tensor], metadata: dict[str, Any]) -> list[torch.Tensor]:
        """Output of our attention, [1, heads, length, head_dim], and gradients of queries, keys and values."""
        query, key, value, gradient = states
        output, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, varlen_metadata=metadata)
        output = output.transpose(1, 2)
        return [output, *torch.autograd.grad(output, (query, key, value), gradient)]

    # Gated delta nets

    def delta_net(self, dtype: torch.dtype) -> torch.nn.Module:
        """A gated delta net of the hybrid's dimensions with seeded random weights; its states last for many tokens."""
        torch.manual_seed(0)
        changed = {"num_hidden_layers": 1, "vocab_size": len(self.tokenizer)}
        architecture = ArchitectureConfig(**self.settings.hybrid | changed)
        config = build_model_config(architecture, self.tokenizer)
        config.layer_types = ["linear_attention"]
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        layer: Any = model.model.layers[0].linear_attn
        layer.dt_bias.data.fill_(-4)
        prepare_delta_nets(layer, kernel="torch" if dtype is torch.float32 or DEVICE.type == "cpu" else "fla")
        return layer.to(DEVICE, dtype)

    def hybrid_exactness(self) -> None:
        """Output and gradients of a gated delta net over a row, against each dialogue by itself in float32."""
        lengths = [each // self.settings.shortened for each in (900, 640, 32, 480)]
        width = self.settings.hybrid["hidden_size"]
        for prefix in (0, OWN_PREFIX // self.settings.shortened, PREFIX // self.settings.shortened):
            pack = [prefix, *lengths] if prefix else lengths
            levels = build_delta_levels([pack], [prefix])
            starts = numpy.cumsum([0, *pack])
            documents = [range(*each) for each in itertools.pairwise(starts.tolist())]
            alone = [[*documents[0], *each] if prefix and number else each for number, each in enumerate(documents)]
            hidden, gradient = torch.randn(2, sum(pack), width, device=DEVICE, dtype=DTYPE)
            rows = [build_levels([[(each, -1)]]) for each in alone]
            skipped = [len(each) - len(own) for each, own in zip(alone, documents, strict=True)]
            expected = self.passes(torch.float32, hidden, gradient, rows, skipped)
            found = self.passes(DTYPE, hidden, gradient, [levels], [0])
            names = ("output", "hidden states", "in_proj_qkv", "conv1d", "in_proj_a")
            for name, one, other in zip(names, found, expected, strict=True):
                error = relative_error(one, other)
                self.report.add(f"prefix {prefix}: error of {name}", error, most=DELTA_ERROR_LIMIT)
            wrong = {"as one document": build_delta_levels([[sum(pack)]], [0])}
            if prefix:
                wrong["without the prefix's state"] = build_delta_levels([pack], [0])
            for name, levels in wrong.items():
                planted = self.passes(DTYPE, hidden, gradient, [levels], [0])
                errors = [relative_error(one, other) for one, other in zip(planted, expected, strict=True)]
                self.report.add(f"prefix {prefix}: {name}", max(errors), least=1.5 * DELTA_ERROR_LIMIT)
        if missed := [name for name, each in self.report.results.items() if each.get("met") is False]:
            raise RuntimeError(f"{len(missed)} of the errors are not as they must be: {missed[0]}")

    def passes(
        self,
        dtype: torch.dtype,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        rows: list[list[DeltaLevel]],
        skipped: list[int],
    ) -> list[torch.Tensor]:
        """Output of a gated delta net, [tokens, width], and the gradients of hidden states and some weights.

        Args:
            rows: levels that are run one after the other.
            skipped: of each of them, the first tokens, whose output is another's.
        """
        layer: Any = self.delta_net(dtype)
        inputs = hidden.to(dtype, copy=True).requires_grad_()
        operands = [inputs, layer.in_proj_qkv.weight, layer.conv1d.weight, layer.in_proj_a.weight]
        output = torch.zeros_like(inputs)
        for levels, first in zip(rows, skipped, strict=True):
            own = torch.cat([level.token_index for level in levels])[first:].to(DEVICE)
            output = output.index_add(0, own, run_levels(layer, inputs, on_device(levels))[0][own])
        return [output.detach(), *torch.autograd.grad(output, operands, gradient.to(dtype))]

    def hybrid_layer(self) -> None:
        """Time of a gated delta net on a full row, by the kernel and by torch's functions."""
        actions = {}
        kernels = {"fla": DTYPE} if DEVICE.type == "cuda" else {}
        for strategy in ("shared_prefix", "best_fit"):
            pack = self.packs(HYBRID, PREFIX, strategy)[0]
            levels = on_device(
                build_delta_levels([list(map(int, pack["document_lengths"]))], [int(pack["prefix_length"])])
            )
            sizes = len(pack["input_ids"]), self.settings.hybrid["hidden_size"]
            states = torch.randn(2, *sizes, device=DEVICE, dtype=DTYPE)
            for kernel in (*kernels, "torch"):
                layer = self.delta_net(DTYPE)
                prepare_delta_nets(layer, kernel)

                def run(layer=layer, levels=levels, states=states) -> None:
                    inputs = states[0].clone().requires_grad_()
                    output, _ = run_levels(layer, inputs, levels)
                    torch.autograd.grad(output, [inputs, *layer.parameters()], states[1])

                actions[f"{strategy}, {kernel}"] = run
        taken = side_by_side(actions, self.settings.attention_repeats, warm_up=3)
        for name, seconds in taken.items():
            self.report.add(f"{name}: ms", spread(1000 * each for each in seconds))
        for kernel in (*kernels, "torch"):
            found = ratios(taken[f"shared_prefix, {kernel}"], taken[f"best_fit, {kernel}"])
            self.report.add(f"{kernel}: shared / plain", found)
        for strategy in ("shared_prefix", "best_fit") if kernels else ():
            found = ratios(taken[f"{strategy}, torch"], taken[f"{strategy}, fla"])
            self.report.add(f"{strategy}: torch / fla", found)

    # Experts

    def experts_call(self, tokens: int, dtype: torch.dtype = DTYPE) -> tuple[Any, list[torch.Tensor]]:
        """One layer's experts with seeded random weights.

        Returns:
            Them, and for random tokens hidden states, the experts that each token uses, their weights, and a gradient.
        """
        torch.manual_seed(0)
        changed = {"num_hidden_layers": 1, "vocab_size": len(self.tokenizer)}
        config = build_model_config(ArchitectureConfig(**self.settings.experts | changed), self.tokenizer)
        with DEVICE:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
            hidden, gradient = torch.randn(2, tokens, config.hidden_size, dtype=DTYPE).to(dtype)
            scores, chosen = torch.randn(tokens, config.num_experts).softmax(-1).topk(config.num_experts_per_tok)
        weights = (scores / scores.sum(-1, keepdim=True)).to(dtype)
        return model.model.layers[0].mlp.experts.to(dtype), [hidden.requires_grad_(), chosen, weights, gradient]

    @staticmethod
    def experts_passes(experts: Any, call: list[torch.Tensor], implementation: str) -> list[torch.Tensor]:
        """Output, [tokens, width], and gradients of hidden states, weights of the choice and both expert tensors."""
        hidden, chosen, weights, gradient = call
        experts.config._experts_implementation = implementation
        weights = weights.detach().requires_grad_()
        output = experts(hidden, chosen, weights)
        inputs = [hidden, weights, experts.gate_up_proj, experts.down_proj]
        return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]

    def experts_exactness(self) -> None:
        """Output and gradients of grouped products, against a loop over the experts in float32."""
        tokens = self.settings.max_length // 8
        expected = self.experts_passes(*self.experts_call(tokens, torch.float32), "eager")
        experts, call = self.experts_call(tokens)
        names = ("output", "hidden states", "router's weights", "gate and up", "down")
        for name, one, other in zip(names, self.experts_passes(experts, call, "grouped_mm"), expected, strict=True):
            self.report.add(f"error of {name}", relative_error(one, other), most=ERROR_LIMIT)
        call[1] = call[1].roll(1, 0)
        planted = self.experts_passes(experts, call, "grouped_mm")
        errors = [relative_error(one, other) for one, other in zip(planted, expected, strict=True)]
        self.report.add("with the next token's experts", min(errors), least=1.5 * ERROR_LIMIT)
        if missed := [name for name, each in self.report.results.items() if each.get("met") is False]:
            raise RuntimeError(f"{len(missed)} of the errors are not as they must be: {missed[0]}")

    def experts_products(self) -> None:
        """Time of one layer's experts on a full row, by grouped products and by a loop over the experts."""
        tokens = self.settings.max_length
        experts, call = self.experts_call(tokens)
        names = ("grouped_mm", "eager")
        actions = {name: lambda name=name: self.experts_passes(experts, call, name) for name in names}
        taken = side_by_side(actions, self.settings.attention_repeats, warm_up=3)
        weights = sum(each[0].numel() for each in experts.parameters())
        flops = 6 * tokens * call[1].shape[1] * weights
        for name, seconds in taken.items():
            self.report.add(f"{name}: ms", spread(1000 * each for each in seconds))
            self.report.add(f"{name}: MFU", spread(flops / (each * self.peak) for each in seconds))
        self.report.add("eager / grouped_mm", ratios(taken["eager"], taken["grouped_mm"]))

    # The head

    def head(self) -> None:
        """Time and peak memory of the loss over a row's trained positions, by every head that is there."""
        for shape, dims in self.settings.shapes.items():
            packs = self.packs(shape, PREFIX, "shared_prefix")
            trained = int(numpy.count_nonzero(packs[0]["loss_weights"]))
            whole = case_adapter(shape).kind == "full"
            sizes = {"device": DEVICE, "requires_grad": True}
            hidden = torch.randn(trained, dims["hidden_size"], dtype=DTYPE, **sizes)
            weight = torch.randn(dims["vocab_size"], dims["hidden_size"], device=DEVICE) * dims["hidden_size"] ** -0.5
            weight = weight.requires_grad_() if whole else weight.to(DTYPE)
            targets = torch.randint(dims["vocab_size"], (trained,), device=DEVICE)
            losses: dict[str, float] = {}

            def passes(name: str, loss_of: Callable[..., torch.Tensor], operands=(hidden, weight, targets),
                       losses=losses) -> None:  # fmt: skip
                hidden, weight, targets = operands
                with torch.autocast(DEVICE.type, DTYPE):
                    loss = loss_of(hidden, weight, targets)
                torch.autograd.grad(loss, [each for each in (hidden, weight) if each.requires_grad])
                losses[name] = loss.detach()

            heads = available_heads()
            actions = {name: lambda name=name, head=head, run=passes: run(name, head) for name, head in heads.items()}
            self.report.add(f"{shape}: trained positions", trained)
            for name, seconds in side_by_side(actions, self.settings.attention_repeats, warm_up=3).items():
                self.report.add(f"{shape}: {name}, ms", spread(1000 * each for each in seconds))
                self.report.add(f"{shape}: {name}, loss over ours", float(losses[name]) / float(losses["ours"]))
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    actions[name]()
                    peak = torch.cuda.max_memory_allocated() - before
                    self.report.add(f"{shape}: {name}, peak GiB", peak / GIB)

    # Evaluation

    def generated_context(self) -> None:
        """Turns a second in generated context, equal tokens, and the seconds of our forward passes by their kind."""
        count, few = self.settings.evaluated
        dialogues = generate_sample(count, seed=0)
        template = DialogueTemplate(self.tokenizer, "qwen2_5", TemplateConfig())
        words = len(self.tokenizer)
        model = random_model(
            self.settings.shapes["1.5b"] | {"initializer_range": 0.3, "max_position_embeddings": 32768}, "sdpa", DTYPE
        ).eval()
        stops = numpy.random.default_rng(0).choice(numpy.arange(256, words), words // 10, replace=False)
        model.generation_config.eos_token_id = stops.tolist()
        settings = InferenceConfig(batch_size=count, max_new_tokens=self.settings.reply_tokens)
        kinds = {"ours": WithoutLikelihoods, "padded batches": BatchedGenerator, "one at a time": SequentialGenerator}
        found: dict[str, dict[Any, Any]] = {}

        def run(name: str, dialogues: list) -> None:
            outcomes: Any = generate_predictions(dialogues, kinds[name](model, template, settings), "generated")
            found[name] = {each.key: each.token_ids for each in outcomes}

        for name in kinds:
            run(name, dialogues[:1])  # a warm-up
        parts = {name: dialogues[:few] if name == "one at a time" else dialogues for name in kinds}
        actions = {name: lambda name=name: run(name, parts[name]) for name in kinds}
        taken = side_by_side(actions, 2, warm_up=0)
        rates = {name: [len(found[name]) / each for each in times] for name, times in taken.items()}
        for name, each in rates.items():
            self.report.add(f"{name}: turns/s", spread(each))
        for name in ("padded batches", "one at a time"):
            self.report.add(f"ours / {name}", ratios(rates["ours"], rates[name]))
        for name in ("ours", "padded batches"):
            equal = [found[name][turn] == ids for turn, ids in found["one at a time"].items()]
            self.report.add(f"{name}: turns with equal tokens, percent", 100 * sum(equal) / len(equal))
        spent = {"prefill": [0.0], "decoding": [0.0]}
        usual = DialogueCache._forward

        def timed(cache: DialogueCache, rows: Any) -> list[int]:
            tokens: list[int] = []
            prefill = any(cache._rows[number].num_missing > 1 for number in rows)
            spent["prefill" if prefill else "decoding"].append(seconds(lambda: tokens.extend(usual(cache, rows))))
            return tokens

        setattr(DialogueCache, "_forward", timed)  # noqa: B010  in the process of this section
        whole = seconds(actions["ours"])
        for name, each in spent.items():
            self.report.add(f"ours: {name}, share of the time", sum(each) / whole)
            self.report.add(f"ours: {name}, forward passes", len(each) - 1)
            self.report.add(f"ours: {name}, ms a pass", 1000 * sum(each) / max(1, len(each) - 1))

    # Trainings

    def packs(self, shape: str, prefix: int, strategy: str) -> PackedDataset:
        """The packs of some dialogues that are at least nine tenths full."""
        settings = self.settings
        packs, _ = pack_dialogues(self.examples(shape, prefix), PackingConfig(strategy, settings.max_length))
        full = [n for n, lengths in enumerate(packs.document_lengths) if sum(lengths) >= 0.9 * settings.max_length]
        items, prefixes = ([every[n] for n in full] for every in (packs.pack_items, packs.prefix_lengths))
        return PackedDataset(packs.dialogues, items, prefixes, packs.loss_weights)

    def examples(self, shape: str, prefix: int) -> list:
        """Dialogues of random ids with the lengths of the file behind a prefix."""
        settings = self.settings
        bodies = body_lengths(settings.dialogues, settings.shortened).clip(2 * EXCHANGES)
        vocabulary = self.shapes[shape]["vocab_size"]
        return random_examples(bodies.tolist(), prefix // settings.shortened, vocabulary)

    def model(self, shape: str, attention: str, adapter: AdapterConfig, precision: str, layers: int | None = None):
        """A model of a shape's dimensions with random weights, as recipes/sft.py loads one."""
        changed = {"num_hidden_layers": layers} if layers else {}
        architecture = ArchitectureConfig(**self.shapes[shape] | changed)
        config = ModelConfig(init="random", tokenizer=str(SMALL_TOKENIZER), architecture=architecture)
        with DEVICE:
            return load_model(config, self.tokenizer, weight_dtype(precision, adapter.kind), 0, attention)

    def ours(
        self,
        shape: str,
        prefix: int,
        strategy: str,
        adapter: AdapterConfig,
        layers: int | None = None,
        liger: bool = False,
        zero: str = "auto",
        **changed: Any,
    ) -> Callable[[str], Trainer]:
        """Makes the recipe's trainer, as recipes/sft.py does, one pack a step.

        Args:
            layers: of the model; defaults to the shape's.
            liger: norms, SwiGLU and rotary embedding by liger-kernel.
            zero: the stage; auto is off where there is no DeepSpeed.
            changed: of the trainer's settings.
        """

        def make(directory: str) -> Trainer:
            config = TrainerConfig(**{"packs_per_step": 1, "max_steps": 10**4, "save_steps": 10**5} | changed)
            packs = self.packs(shape, prefix, strategy)
            dims = self.shapes[shape]
            head_dim = dims.get("head_dim") or dims["hidden_size"] // dims["num_attention_heads"]
            attention = select_attention("auto", strategy, config.precision, head_dim)
            stage = ZeroConfig(zero).resolved(adapter.kind, resolve_precision(config.precision))
            if zero == "auto" and not importlib.util.find_spec("deepspeed"):
                stage = ZeroConfig("off")
            arguments = training_arguments(config, Path(directory), 1, stage)
            arguments.save_strategy = SaveStrategy.NO
            if liger:
                arguments.use_liger_kernel = True
                arguments.liger_kernel_config = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            model = self.model(shape, attention, adapter, config.precision, layers)
            return build_trainer(model, self.tokenizer, packs, arguments, strategy, adapter)

        return make

    def theirs(self, shape: str, prefix: int, attention: str, **options: Any) -> Callable[[str], Trainer]:
        """Makes TRL's trainer with its own packing, one pack a step, recomputing activations if another side does.

        Args:
            options: of SFTConfig.
        """

        def make(directory: str) -> Trainer:
            adapter = case_adapter(shape)
            recomputed = any(side.facts["gradient checkpointing"] != "off" for side in self.sides.values())
            model = self.model(shape, attention, adapter, "auto")
            trainer: Any = trl_trainer(
                model,
                self.examples(shape, prefix),
                self.settings.max_length,
                directory,
                peft_config=None if adapter.kind == "full" else lora_config(adapter, model),
                max_steps=10**4,
                save_strategy="no",
                **{"activation_checkpointing": recomputed} | options,
            )
            if not trainer.args.packing:
                return trainer
            lengths = trainer.train_dataset["seq_lengths"]
            full = [n for n, pack in enumerate(lengths) if sum(pack) >= 0.9 * self.settings.max_length]
            trainer.train_dataset = trainer.train_dataset.select(full)
            return trainer

        return make

    def shared_and_plain(self, shape: str) -> None:
        """A shared prefix and plain packs, of the longer prompt."""
        adapter = case_adapter(shape)
        rates, use = self.compare({
            "shared prefix": self.ours(shape, PREFIX, "shared_prefix", adapter),
            "plain packs": self.ours(shape, PREFIX, "best_fit", adapter),
        })  # fmt: skip
        goal = 1.45 if shape == "1.5b" else None
        self.report.add("shared prefix / plain packs", ratios(rates["shared prefix"], rates["plain packs"]), least=goal)
        goals = (None, None) if shape in (HYBRID, EXPERTS) else (0.45, 0.9)
        self.report.add("plain packs: MFU", spread(use["plain packs"]), least=goals[0])
        beside = ratios(use["shared prefix"], use["plain packs"])
        self.report.add("MFU, shared prefix / plain packs", beside, least=goals[1])

    def beside_trl(self, shape: str) -> None:
        """The project's own prompt: ours as shipped, and TRL's packing with the same kernel."""
        adapter = case_adapter(shape)
        rates, _ = self.compare({
            "shared prefix": self.ours(shape, OWN_PREFIX, "shared_prefix", adapter),
            "plain packs": self.ours(shape, OWN_PREFIX, "best_fit", adapter),
            "TRL, same kernel": self.theirs(shape, OWN_PREFIX, PACKED_VARLEN),
        })  # fmt: skip
        self.report.add("shared prefix / plain packs", ratios(rates["shared prefix"], rates["plain packs"]))
        self.report.add("shared prefix / TRL", ratios(rates["shared prefix"], rates["TRL, same kernel"]), least=1.5)

    def beside_default_trl(self, shape: str) -> None:
        """Ours as shipped, and TRL's packing as it comes."""
        rates, _ = self.compare({
            "shared prefix": self.ours(shape, OWN_PREFIX, "shared_prefix", case_adapter(shape)),
            "TRL as it comes": self.theirs(shape, OWN_PREFIX, "sdpa", activation_checkpointing=True),
        })  # fmt: skip
        self.report.add("shared prefix / TRL", ratios(rates["shared prefix"], rates["TRL as it comes"]))

    def beside_padded_trl(self) -> None:
        """A hybrid: ours as shipped, and TRL's padded batches, which keep documents apart."""
        size = self.settings.padded
        rates, _ = self.compare({
            "shared prefix": self.ours(HYBRID, PREFIX, "shared_prefix", case_adapter(HYBRID)),
            "TRL, padded": self.theirs(HYBRID, PREFIX, "sdpa", packing=False, per_device_train_batch_size=size),
        })  # fmt: skip
        self.report.add("shared prefix / TRL", ratios(rates["shared prefix"], rates["TRL, padded"]))

    def compare(self, makers: dict[str, Callable[[str], Trainer]]) -> tuple[dict[str, list], dict[str, list]]:
        """Trained tokens a second and MFU by side and step, in turn, or one side after the other if memory is short."""
        try:
            return self.in_turn(makers)
        except SideError as error:
            if "out of memory" not in str(error).lower() or len(makers) == 1:
                raise
        self.report.add("order", "one side after the other: not all fit into memory")
        rates, use = {}, {}
        for name, make in makers.items():
            for all_sides, own in zip((rates, use), self.in_turn({name: make}), strict=True):
                all_sides |= own
        return rates, use

    def in_turn(self, makers: dict[str, Callable[[str], Trainer]]) -> tuple[dict[str, list], dict[str, list]]:
        """As `compare`, with all sides in memory; reports each side."""
        settings, rates, use = self.settings, {}, {}
        self.sides = {}
        with sides_of(makers, settings.max_length, self.sides):
            take_turns(self.sides, settings.warm_up, settings.turns, settings.steps, self.end)
        for name, side in self.sides.items():
            rates[name], use[name] = self.report_side(name, side)
        late = sum(step.graphs for side in self.sides.values() for step in side.steps)
        recompiles = max(0, *(side.graphs - 1 for side in self.sides.values()))
        self.report.add("graphs compiled after the warm-up", late, most=0)
        self.report.add("recompiles, most of a side", recompiles, most=MAX_RECOMPILES)
        if recompiles > MAX_RECOMPILES:
            raise RuntimeError(f"a side compiled {recompiles} graphs more than one: at most {MAX_RECOMPILES} may be")
        return rates, use

    def report_side(self, name: str, side: Side) -> tuple[list[float], list[float]]:
        """Report a side's steps; its trained tokens a second and MFU, step by step."""
        rates = [step.trained / step.seconds for step in side.steps]
        use = [step.flops / (step.seconds * self.peak) for step in side.steps]
        facts, add = side.facts, self.report.add
        chosen = ("attention", "gradient checkpointing", "compiled", "ZeRO stage")
        add(f"{name}: settings", ", ".join(f"{fact} {facts[fact]}" for fact in chosen))
        add(f"{name}: trained tokens/s", spread(rates))
        add(f"{name}: tokens/s", spread(step.tokens / step.seconds for step in side.steps))
        add(f"{name}: seconds a step", spread(step.seconds for step in side.steps))
        add(f"{name}: MFU", spread(use))
        add(f"{name}: graphs compiled", side.graphs)
        if facts["plan"]:
            add(f"{name}: planned peak, GiB", facts["plan"] / GIB)
        if facts["peak"]:
            add(f"{name}: peak, GiB", facts["peak"] / GIB)
            if facts["plan"]:
                add(f"{name}: planned / peak", facts["plan"] / facts["peak"])
        return rates, use

    def waits(self, shape: str = "1.5b", layers: tuple[int, int] = (2, 4)) -> None:
        """How often a step waits for the GPU, by the difference of many layers and few."""
        few, many = (in_process(lambda count=count: self.count_waits(shape, count)) for count in layers)
        by_layer = (many.total() - few.total()) / (layers[1] - layers[0]) / Waits.STEPS
        self.report.add("waits a layer in a step", by_layer, most=0)
        self.report.add("waits a step besides", few.total() / Waits.STEPS - layers[0] * by_layer)
        places = ", ".join(f"{place} x {number}" for place, number in many.most_common(8))
        self.report.add(f"where, with {layers[1]} layers in {Waits.STEPS} steps", places or "nowhere")

    def count_waits(self, shape: str, layers: int) -> Counter[str]:
        """The waits of `Waits.STEPS` steps by place."""
        with tempfile.TemporaryDirectory() as directory:
            settings = {"max_steps": 4, "logging_steps": 4}
            trainer = self.ours(shape, PREFIX, "shared_prefix", case_adapter(shape), layers, **settings)(directory)
            waits = Waits()
            trainer.add_callback(waits)
            trainer.train()
        return waits.places

    def alone(self, shape: str, **changed: Any) -> None:
        """One training alone; a rehearsal only sees that fp8 is refused."""
        if DEVICE.type == "cpu" and changed.get("precision") == "fp8":
            try:
                TrainerConfig(precision="fp8")
                resolve_precision("fp8")
            except InputError as refusal:
                return self.report.add("refused", str(refusal))
        layers = self.settings.fp8_layers if shape == "7b whole" else None
        adapter = AdapterConfig() if layers else case_adapter(shape)
        rates, _ = self.compare(
            {"plain packs": self.ours(shape.split()[0], PREFIX, "best_fit", adapter, layers, **changed)}
        )
        first = next(name for name in self.sections() if name.startswith(f"alone: {shape},"))
        reference = self.report.sections.get(first, {}).get("results", {}).get("plain packs: trained tokens/s")
        if reference:
            self.report.add(
                f"trained tokens/s / {first}", spread(each / reference["median"] for each in rates["plain packs"])
            )

    def profile(self, shape: str) -> None:
        """Shares of time by kernel family."""
        with tempfile.TemporaryDirectory() as directory:
            steps = {"max_steps": WAIT + WARM_UP + ACTIVE}
            trainer = self.ours(shape, OWN_PREFIX, "shared_prefix", case_adapter(shape), **steps)(directory)
            trainer.add_callback(ProfilerCallback(Path(directory)))
            trainer.train()
            with gzip.open(Path(directory) / TRACE, "rt", encoding="utf-8") as file:
                shares = time_shares(json.load(file)["traceEvents"])
        for family, share in shares.items():
            self.report.add(family, share)

    def hours(self) -> None:
        """Hours of the paper's training, from the measured seconds of a pack."""
        results = self.report.sections[f"steps: 7b, {OWN_PREFIX} ids"]["results"]
        bodies = body_lengths(None, self.settings.shortened)
        prefix, length = OWN_PREFIX // self.settings.shortened, self.settings.max_length
        counts = {
            "shared prefix": len(subset_sum_packing(bodies, length - prefix)),
            "plain packs": len(subset_sum_packing(bodies + prefix, length)),
        }
        counts["TRL, same kernel"] = counts["plain packs"]
        assert len(bodies) == DIALOGUES, LENGTHS
        for name, packs in counts.items():
            self.report.add(f"{name}: packs", packs)
            hours = EPOCHS * packs * results[f"{name}: seconds a step"]["median"] / 3600
            self.report.add(f"{name}: hours of the 7B by LoRA on one GPU", hours)


class Waits(TrainerCallback):
    """Counts by place how often the CPU waits for the GPU within steps, the first ones not counted."""

    STEPS = 2

    def __init__(self):
        self.places: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()
        self._caught: list[warnings.WarningMessage] = []

    def on_step_begin(self, args, state, control, **_) -> None:
        """Begin to count."""
        if state.global_step >= state.max_steps - self.STEPS and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **_) -> None:
        """Count."""
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._stack.close()
        for each in self._caught:
            if "synchronizing" in str(each.message):
                self.places[f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"] += 1
        self._caught = []


def available_heads() -> dict[str, Callable[..., torch.Tensor]]:
    """Heads by name: the summed loss of hidden states [n, width] under weights [vocabulary, width] and targets [n]."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def ours(hidden, weight, targets):
        return score_tokens(hidden, weight, targets, torch.ones(len(targets), device=DEVICE)).loss

    def theirs(hidden, weight, targets):
        tiles = _CHUNKED_LOGPROB_CHUNK_SIZE
        arguments = (hidden, weight, None, targets, 1.0, tiles, None, 1.0, ("entropy", "is_top1"))
        return -_ChunkedLogProbFunction.apply(*arguments)[0].sum()

    def logits(hidden, weight, targets):
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight).float(), targets, reduction="sum"
        )

    heads = {"ours": ours, "TRL": theirs, "all logits": logits}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
        from torch.nn.functional import linear_cross_entropy
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        def chunked(hidden, weight, targets):
            options = LinearCrossEntropyOptions(batch_chunk_size=1024, chunking_method=None)
            return linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum", options=options)

        heads["torch, chunked"] = chunked
    if DEVICE.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut  # pyright: ignore[reportMissingImports]

        heads["cut-cross-entropy"] = lambda hidden, weight, targets: cut(
            hidden, weight.to(hidden.dtype), targets, reduction="sum"
        )
    return heads


def dense_mask(lengths: list[int], prefix: int) -> torch.Tensor:
    """bool [length, length]: which keys each token of a row sees; the row begins with the prefix, if there is one."""
    starts = prefix + numpy.concatenate([[0], numpy.cumsum(lengths)])
    mask = torch.zeros(int(starts[-1]), int(starts[-1]), dtype=torch.bool)
    for start, end in [(0, prefix), *itertools.pairwise(starts)]:
        mask[start:end, :prefix] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return mask.to(DEVICE)


def dense_attention(states: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """As `Bench.operator`, by a dense mask in float64."""
    query, key, value, gradient = (each.detach().double() for each in states)
    inputs = [each.requires_grad_() for each in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(groups, 1) for each in inputs[1:])
    scores = (query @ keys.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~mask, float("-inf"))
    output = scores.softmax(-1) @ values
    return [output, *torch.autograd.grad(output, inputs, gradient)]


def on_device(levels: list[DeltaLevel]) -> list[DeltaLevel]:
    """The levels with their tensors on this machine's device."""
    moved = [send_to_device(level._asdict(), DEVICE) for level in levels]
    return [DeltaLevel(**each) for each in moved]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(((value.double() - expected).norm() / expected.norm()).detach())


EXACTNESS = (
    "Output and gradients of the attention operator on random bf16 states of a row of documents, against a dense mask "
    "in float64 on the same numbers: norm of the error over that of the value. The last figure is the largest error "
    "with a document's end moved by one token, which must be seen. The same of the head's loss and gradients, against "
    "plain logits, and with other targets."
)
ATTENTION = (
    "Forward and backward pass of two layers' attention on the first full row of a shared prefix and of plain packs, "
    "in turn, gathering included; random bf16 states. A shared row trains more dialogues."
)
WAITS = (
    "Warnings of torch.cuda.set_sync_debug_mode between the begin and the end of an optimizer step of our trainer: "
    "those of a model with more layers less those of one with fewer, over the layers between and the steps."
)
HEAD = (
    "Loss and gradients of one full shared-prefix row's trained positions, forward and backward pass in turn: bf16 "
    "hidden states, fp32 weights under autocast for the 1.5B, frozen bf16 weights for the 7B. Ours and TRL's also give "
    "entropy and top-1 accuracy; the others do not. Peak: memory above the operands."
)
GENERATED = (
    "Sample dialogues in generated context by a Qwen2.5-1.5B with random weights in bf16, which stops at any of a "
    "tenth of its tokens; one warm-up dialogue, then in turn. Ours: one batch with a cache that is kept from turn to "
    "turn, likelihoods left out. Padded batches: `generate` for the next turns of all dialogues. One at a time: "
    "`generate` for one prompt, on the first dialogues. Equal tokens: with one at a time; in bf16 the batch changes "
    "the rounding. Shares of one more run of ours that waits for the GPU after each forward pass."
)
STEPS = (
    "Whole optimizer steps of one pack by each trainer's own `train`, each trainer a process, in turns of two steps: "
    "collation, forward, backward, clipping, AdamW, logging. The 1.5B whole; the 7B by LoRA of rank 16 on bf16 "
    "weights. Ours: the recipe's trainer with default settings (ZeRO stage 1: bf16 weights with an fp32 copy; off: "
    "fp32 weights under autocast). TRL, same kernel: SFTTrainer, packing=True, bfd, weights as ours under stage off, "
    "its model's attention by the kernel that ours uses, activation checkpointing on if ours recomputes. TRL as it "
    "comes: sdpa with transformers' mask, activation checkpointing on. Packs under nine tenths full are left out on "
    "every side. MFU: 6 x weights of linear layers x tokens (LoRA: 4 x, and 6 x adapters), the head's for trained "
    "tokens only, and attention by document, half of a square for causal ones; what is recomputed is not counted. "
    "Planned peak: `estimate_memory` without its reserve; peak: what torch allocated."
)
HYBRID_EXACTNESS = (
    "Output of one gated delta net of Qwen3.5-0.8B's dimensions and gradients of its input and weights: a row of "
    "documents in bf16, by flash-linear-attention on a GPU, against each document with its prefix alone in float32 by "
    "torch's functions: norm of the error over that of the value. Behind them, the largest error with the row as one "
    "document, and with documents that do not continue the prefix, which must be seen."
)
HYBRID_LAYER = (
    "Forward and backward pass of one gated delta net on the first full row of a shared prefix and of plain packs, in "
    "turn, convolution and projections included; by flash-linear-attention and by torch's functions. A shared row "
    "trains more dialogues."
)
HYBRID_STEPS = (
    "As the sections of steps, for the text model of Qwen3.5-0.8B trained whole. TRL, padded: SFTTrainer, "
    "packing=False, batches of random dialogues padded to the longest, sdpa, and in the delta nets the kernels that "
    "transformers finds."
)
EXPERTS_EXACTNESS = (
    "Output and gradients of one layer's experts of Qwen3-30B-A3B's dimensions for random tokens, choices and scores: "
    "grouped products in bf16 against a loop over the experts in float32: norm of the error over that of the value. "
    "The last figure is the least error if each token has the experts of the one before it, which must be seen."
)
EXPERTS_PRODUCTS = (
    "Forward and backward pass of one layer's experts on a full row of random tokens, all gradients, by grouped "
    "products and by a loop over the experts, in turn. MFU: 6 x weights of a token's experts x tokens."
)
EXPERTS_STEPS = (
    "As the sections of steps, for a quarter of Qwen3-30B-A3B's layers, by LoRA of rank 16 on attention and bf16 "
    "weights. Experts count in MFU as far as a token uses them."
)
PROFILE = (
    f"Share of the GPU's time by kernel family over {ACTIVE} optimizer steps of one shared-prefix pack, by "
    "`trainer.profile`; idle: no kernel runs."
)
ALONE = (
    "Plain packs as in the sections of steps, without another training in memory. 7b whole: a few layers of the 7B, "
    "all weights trained."
)
HOURS = (
    f"{DIALOGUES:,} dialogues of the lengths file in {EPOCHS} epochs: packs x seconds of a step of one pack, as the "
    "sections of steps measured them."
)

if __name__ == "__main__":
    main()
