"""Measure what saves cost a training: 50 steps of a model of 100 M parameters with 5 training checkpoints.

python benchmarks/saving.py --old CHECKOUT     # beside 5fab51a; six minutes on two idle cores
python benchmarks/saving.py --quick            # a smoke test in seconds; its results mean nothing

Prints each result and writes benchmarks/results/saving.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2560, "vocab_size": 21000, "tie_word_embeddings": True,
}  # fmt: skip
"""Some 100 M parameters."""
QUICK = {**SHAPE, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 2000}
STEPS, SAVES, TOKENS = 50, 5, 96
SIDES = ("background", "foreground", "old")
"""This build's two ways, and the other build."""


def train_on_request(side: str, quick: bool) -> None:
    """Train once for each line on the standard input; answer with the seconds. Runs in either build."""
    import torch
    from measure import pack_trainer, random_examples, random_model

    try:
        from csc_train.packing.dataset import pack_dialogues as pack
    except ImportError:  # 5fab51a
        from csc_train.packing.packed_dataset import pack_examples as pack  # pyright: ignore[reportMissingImports]
    from csc_train.packing.config import PackingConfig

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = QUICK if quick else SHAPE
    packs, _ = pack(random_examples([TOKENS // 2] * STEPS, TOKENS // 2, 2000), PackingConfig("off", max_length=TOKENS))
    for line in sys.stdin:
        directory = line.strip()
        trainer: Any = pack_trainer(random_model(shape, "sdpa"), packs, "off", directory)
        trainer.args.max_steps, trainer.args.save_steps, trainer.args.save_total_limit = STEPS, STEPS // SAVES, 2
        trainer.args.save_in_background = {"background": "true"}.get(side, "false")
        at_saves, at_end = watch(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        (newest,) = Path(directory).glob(f"checkpoint-{STEPS}")
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        answer = {"seconds": seconds, "saves": at_saves, "end": sum(at_end), "bytes": size}
        answer["loss"] = trainer.state.log_history[-2]["loss"]
        print(json.dumps(answer), file=answers, flush=True)
        shutil.rmtree(directory)


def watch(trainer: Any) -> tuple[list[float], list[float]]:
    """The seconds between a step with a save and the next, and those at the end of training; filled while it trains."""
    after, end = trainer._maybe_log_save_evaluate, trainer._finalize_training
    at_saves, at_end = [], []

    def timed(call: Any, taken: list[float], counts: Any):
        def wrapped(*arguments: Any, **options: Any) -> Any:
            saves, started = counts(), time.perf_counter()
            result = call(*arguments, **options)
            if saves:
                taken.append(time.perf_counter() - started)
            return result

        return wrapped

    trainer._maybe_log_save_evaluate = timed(after, at_saves, lambda: trainer.control.should_save)
    trainer._finalize_training = timed(end, at_end, lambda: True)
    return at_saves, at_end


class Side:
    """A process that trains in one way of one build."""

    def __init__(self, side: str, checkout: Path, quick: bool):
        path = os.pathsep.join(map(str, (checkout, checkout / "benchmarks")))
        command = [sys.executable, "-P", __file__, "--side", side, *(["--quick"] * quick)]
        self.process = subprocess.Popen(
            command, cwd=checkout, env=os.environ | {"PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def train(self, directory: Path) -> dict[str, Any]:
        """Train once."""
        assert self.process.stdin and self.process.stdout
        print(directory, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Let the sides train in turns, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="an older build")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "saving.json")
    options = parser.parse_args()
    if options.side:
        return train_on_request(options.side, options.quick)
    from measure import Report, ratios, spread

    rounds = 1 if options.quick else options.rounds
    builds = {"background": ROOT, "foreground": ROOT} | ({"old": options.old.absolute()} if options.old else {})
    sides = {name: Side(name, checkout, options.quick) for name, checkout in builds.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name, side in sides.items():
                runs[name].append(side.train(Path(folder) / name))
                print(f"  round {number}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    for side in sides.values():
        side.end()
    report = Report({"quick": options.quick, "rounds": rounds}, {})
    report.section(
        "saves of a training",
        f"{STEPS} optimizer steps of one pack of {TOKENS} tokens, with {SAVES} training checkpoints, the last after "
        "the last step; one process, AdamW in fp32. Background and foreground are this build's save_in_background=true "
        "and false. Sides take turns, each in a process of its own. A save blocks from the end of its step to the next "
        "step; the end of training waits for the last save.",
        shape=QUICK if options.quick else SHAPE, steps=STEPS, saves=SAVES, tokens=TOKENS,
        load_before=os.getloadavg()[0], old="5fab51a" if options.old else None,
    )  # fmt: skip
    report.add("bytes of a checkpoint", runs["background"][0]["bytes"])
    wall = {name: [each["seconds"] for each in done] for name, done in runs.items()}
    blocked = {name: [sum(each["saves"]) for each in done] for name, done in runs.items()}
    waited = {name: [sum(each["saves"]) + each["end"] for each in done] for name, done in runs.items()}
    for name in sides:
        report.add(f"{name}: seconds of the training", spread(wall[name]))
        report.add(f"{name}: seconds blocked by {SAVES} saves", spread(blocked[name]))
        report.add(f"{name}: the same with the end of training", spread(waited[name]))
    for name in list(sides)[1:]:
        report.add(f"background / {name}: training", ratios(wall["background"], wall[name]), most=1.0)
        report.add(f"background / {name}: blocked by saves", ratios(blocked["background"], blocked[name]), most=0.4)
        report.add(f"background / {name}: with the end of training", ratios(waited["background"], waited[name]))
    losses = {each["loss"] for name in ("background", "foreground") for each in runs[name]}
    report.add("equal losses in the background and the foreground", len(losses) == 1)
    report.write(options.output)


if __name__ == "__main__":
    main()
