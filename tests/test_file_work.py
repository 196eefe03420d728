"""What a rank asks of the file system until its first step does not depend on how many ranks there are."""

import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, small_tokenizer, tiny_config
from processes import run_script, start_ranks
from transformers import AutoModelForCausalLM

from csc_train.config.compose import compose, to_container
from csc_train.data.readers import write_dialogues
from csc_train.data.sample_grammar import generate_sample
from csc_train.files import write_text
from csc_train.runs.directory import as_yaml
from csc_train.tokenized_cache import ARRAYS

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SETTINGS = (
    "debug=cpu_tiny", "model.init=pretrained", "model.path=base", "model.tokenizer=null", "data.sample_dialogues=null",
    "data.train.path=d.jsonl", "trainer.packs_per_step=24", "trainer.micro_batch_size=1",
    "tokenization.cache_dir=cache",
)  # fmt: skip
WRITES = ("write", "pwrite64", "writev", "mkdir", "unlink", "rename", "renameat", "ftruncate")
KINDS = dict.fromkeys(("read", "pread64", "readv"), "read") | dict.fromkeys(WRITES, "write")
KINDS |= {"openat": "open", "getdents64": "list", "execve": "start"}
"""The system calls that are counted; all others on a path are looks at a file (stat)."""


def file_work(log: Path, directory: Path) -> dict[str, Counter]:
    """Calls by file below a directory, and programs started, by kind; hashes in names are left out."""
    found = defaultdict(Counter)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (call := re.match(r"\d+ +(\w+)\((.*)", line)) or ("ENOENT" in line and call[1] == "execve"):
            continue
        opened, named = re.match(r'(?:\w+<([^>]*)>)?(?:, )?(?:"([^"]*)")?', call[2]).groups(default="")
        path = os.path.normpath(directory / opened / named)
        if call[1] == "execve" or (":[" not in opened and path.startswith(f"{directory}{os.sep}")):
            place = re.sub(r"\b[0-9a-f]{16}\b|\brun\d", "*", os.path.relpath(path, directory))
            found[place][KINDS.get(str(call[1]), "look")] += 1
    return dict(found)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> dict[int, list[dict[str, Counter]]]:
    """By the number of ranks, what each asked for: a frozen configuration, dialogues in the cache, a base model."""
    strace = shutil.which("strace")
    if not strace and not os.environ.get("CI"):
        pytest.skip("no strace")
    if subprocess.run([strace or "strace", "-qq", "-e", "trace=none", "true"], capture_output=True).returncode:
        pytest.skip("no process may be traced here")
    here = tmp_path_factory.mktemp("work").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        write_dialogues(here / "d.jsonl", generate_sample(40, 0))
        tokenizer = small_tokenizer("qwen2_5")
        tokenizer.save_pretrained(here / "base")
        AutoModelForCausalLM.from_config(tiny_config("qwen2", tokenizer, 0.2)).save_pretrained(here / "base")
        assert run_script(ROOT / "recipes" / "prepare.py", *SETTINGS).returncode == 0
        found = {}
        for ranks in (2, 8):
            frozen = compose("sft", [*SETTINGS, f"run.directory=run{ranks}"])
            (here / f"run{ranks}").mkdir()
            write_text(here / f"run{ranks}" / "resolved.yaml", as_yaml(to_container(frozen)))
        logs = tmp_path_factory.mktemp("logs")
        for ranks in (2, 8):
            started = start_ranks(
                ROOT / "tests" / "workers" / "traced_start.py", logs / str(ranks), ROOT / "recipes" / "sft.py",
                f"run=run{ranks}", "resume=true", ranks=ranks,
            )  # fmt: skip
            done = [rank.wait() for rank in started]
            assert not any(each.returncode for each in done), [each.stderr[-2000:] for each in done]
            found[ranks] = [file_work(logs / f"{ranks}.{rank}", here) for rank in range(ranks)]
        return found


def test_another_rank_adds_only_its_own_reads(work):
    first, *others = [rank for ranks in work.values() for rank in ranks[1:]]
    assert len(others) == 7 and all(each == first for each in others)


def test_only_the_first_rank_hashes_lists_and_writes_files_and_starts_programs(work):
    main, other = ({kind: {file: calls[kind] for file, calls in rank.items() if calls[kind]} for kind in
                    ("open", "list", "write", "start")} for rank in work[2])  # fmt: skip
    assert other["write"] == other["start"] == {}
    assert other["list"].keys() == {"base"}  # by transformers, which looks for the files of a tokenizer
    own = {file: count for file, count in other["open"].items() if not file.startswith("base")}
    arrays = {f"cache/*/{name}.bin": 2 for name in ARRAYS}  # an entry of training, and one of validation
    assert own == {"*/resolved.yaml": 2, "d.jsonl": 1} | arrays  # a configuration is checked and composed
    assert max(count for file, count in other["open"].items()) <= 3
    # What the others leave to it is seen, so that it would be seen of them.
    assert main["start"] and main["write"] and "cache" not in main["list"] and "*" in main["list"]
    assert all(main["open"][file] == 2 * count for file, count in arrays.items())
    assert main["open"]["cache/*/manifest.json"] == 2
