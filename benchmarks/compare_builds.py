"""Compare the speed of two builds: steps or evaluations of each in turn, each build in a process of its own.

python benchmarks/compare_builds.py CHECKOUT            # this build beside the one in another checkout
python benchmarks/compare_builds.py CHECKOUT --demo 40  # also the first steps of the demo's training, step by step
python benchmarks/compare_builds.py CHECKOUT --rounds 0 --generated 5  # only evaluation in generated context

Both builds run the training section of their own benchmarks/packing.py, with this script's interpreter and libraries;
steps of the same name have the same dialogues. So have the demo's steps. Generated
context is that of each build's own benchmarks/evaluation.py. Prints each result and writes
benchmarks/results/compare_builds.json.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process of the other build imports its own
    from measure import Report

ROOT = Path(__file__).parent.parent
SIDES = ("shared prefix", "plain packs")
GOAL = 1.7
CONTROL_BATCH = 96
"""Dialogues of a batch of the old build, beside its own 128: what its tokens owe to rounding."""


class Build:
    """A process that takes steps of one build."""

    def __init__(self, checkout: Path, *options: str):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "benchmarks")))}
        command = [sys.executable, "-P", __file__, str(checkout), *options]
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self, request: str) -> Any:
        """What the process answers to a request."""
        assert self.process.stdin and self.process.stdout
        print(request, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def take_steps(checkout: Path, quick: bool) -> None:
    """Answer requests on the standard input: the build, its settings, or a step of a side and its seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.argv = ["packing.py"]
    packing = runpy.run_path(str(checkout / "benchmarks" / "packing.py"))
    packing["datasets"].disable_progress_bars()
    settings = packing["QUICK"] if quick else packing["Settings"]()
    packing["torch"].set_num_threads(settings.threads)

    def serve(sides: dict[str, Any], rounds: int) -> None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        answer: Any = {"commit": commit, "threads": settings.threads, "model": settings.model}
        for request in map(str.strip, sys.stdin):
            if request != "about":
                started = time.perf_counter(), time.process_time()
                sides[request]()
                seconds = time.perf_counter() - started[0], time.process_time() - started[1]
                answer = *seconds, sides[request].trained[-1], sides[request].losses[-1]
            print(json.dumps(answer), file=answers, flush=True)
        sys.exit()

    training = packing["training"]
    training.__globals__["side_by_side"] = serve
    with tempfile.TemporaryDirectory() as directory:
        training(None, settings, directory)


def compare_steps(report: "Report", old: Path, rounds: int, quick: bool) -> None:
    """Trained tokens a second of the training section's sides."""
    from measure import ratios, spread

    options = ["--steps", *(["--quick"] * quick)]
    builds = {"old": Build(old, *options), "new": Build(ROOT, *options)}
    about = {name: build.answer("about") for name, build in builds.items()}
    speeds = {(side, name, kind): [] for side in SIDES for name in builds for kind in ("", "CPU ")}
    apart = dict.fromkeys(SIDES, 0.0)
    for number in range(1 + rounds):  # the first is not counted
        for side in SIDES:
            losses = []
            for name, build in builds.items():
                seconds, cpu_seconds, trained, loss = build.answer(side)
                losses.append(loss)
                print(f"  turn {number}, {side}, {name}: {seconds:.1f} s, loss {loss:.6f}", file=sys.stderr, flush=True)
                if number:
                    speeds[side, name, ""].append(trained / seconds)
                    speeds[side, name, "CPU "].append(trained / cpu_seconds)
            apart[side] = max(apart[side], abs(losses[1] - losses[0]) / losses[0])
    report.section(
        "optimizer steps",
        "Trained tokens a second of whole optimizer steps, one pack each, as in the training section of packing.py. "
        "Two processes, one of each build, take turns step by step; a ratio compares the two steps of a turn. CPU "
        "seconds are those of all threads: on a busy machine they say more. Losses apart: the largest relative "
        "difference of the losses of a turn.",
        old=about["old"]["commit"],
        rounds=rounds,
        threads=about["new"]["threads"],
        model=about["new"]["model"],
    )
    for side, kind in itertools.product(SIDES, ("", "CPU ")):
        for name in builds:
            report.add(f"{side}, {name}: trained tokens/{kind}s", spread(speeds[side, name, kind]))
        new, before = speeds[side, "new", kind], speeds[side, "old", kind]
        report.add(f"{side}: new / old by {kind}time", ratios(new, before), least=GOAL)
    for side in SIDES:
        report.add(f"{side}: losses apart", apart[side], most=1e-5)
    end(builds)


def end(builds: dict[str, Build]) -> None:
    """End the processes."""
    for build in builds.values():
        build.process.communicate()


def take_demo_steps(checkout: Path) -> None:
    """Train the demo; each request on the standard input lets it take a step, whose seconds are the answer."""
    from transformers.trainer_callback import CallbackHandler

    usual, answers, sys.stdout = CallbackHandler.on_step_end, sys.stdout, sys.stderr
    started = []

    def on_step_end(*arguments):
        control = usual(*arguments)
        if started:
            seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            print(json.dumps(seconds), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started[:] = time.perf_counter(), time.process_time()
        return control

    setattr(CallbackHandler, "on_step_end", on_step_end)  # noqa: B010
    for recipe in ("write_sample.py", "sft.py"):
        with tempfile.TemporaryDirectory() as directory, contextlib.suppress(SystemExit):
            demo = ["experiment=demo", "tracking=off", f"run.directory={directory}/demo"]
            sys.argv = [recipe, *(demo if recipe == "sft.py" else [])]
            runpy.run_path(str(checkout / "recipes" / recipe), run_name="__main__")


def compare_demos(report: "Report", old: Path, steps: int) -> None:
    """Seconds of the demo's first steps, the very first not counted."""
    from measure import ratios, spread

    builds = {"old": Build(old, "--demo-steps"), "new": Build(ROOT, "--demo-steps")}
    taken = {name: [build.answer("step") for _ in range(1)] for name, build in builds.items()}
    for _ in range(steps):
        for name, build in builds.items():
            taken[name].append(build.answer("step"))
    end(builds)
    report.section(
        "demo",
        "Seconds of the demo's first optimizer steps, logging included. Two processes, one of each build, take turns "
        "step by step; a ratio compares the two steps of a turn.",
        steps=steps,
    )
    for place, kind in enumerate(("", "CPU ")):
        seconds = {name: [each[place] for each in found[1:]] for name, found in taken.items()}
        for name, each in seconds.items():
            report.add(f"{name}: {kind}seconds a step", spread(each))
        report.add(f"new / old by {kind}time", ratios(seconds["new"], seconds["old"]), most=0.75)


class _Captured(Exception):
    """Holds what generates, in place of its measurement."""


def take_generations(checkout: Path, quick: bool) -> None:
    """Answer requests on the standard input: the build, or one evaluation with a dtype and a number of threads."""
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.argv = ["evaluation.py"]
    names = runpy.run_path(str(checkout / "benchmarks" / "evaluation.py"))["generation"].__globals__
    import torch

    predict = "generate_predictions" if "generate_predictions" in names else "predict"  # today's name, and 5fab51a's
    usual, outcomes, sides = names[predict], [], {}

    def record(*arguments: Any) -> list:
        outcomes[:] = usual(*arguments)
        return outcomes

    def capture(actions: dict[str, Any], *_: Any, **__: Any) -> None:
        raise _Captured(actions["together"])

    names |= {predict: record, "side_by_side": capture}
    template, architecture = names["demo"]()
    for dtype in ("float32", "bfloat16"):
        model = names["random_model"](architecture, "sdpa", getattr(torch, dtype))
        for batch in (names["BATCH"] if "BATCH" in names else names["BATCH_SIZE"], CONTROL_BATCH):
            try:
                names["generation"](None, "", template, model, 4 if quick else 256, 2, 1, batch)
            except _Captured as captured:
                sides[dtype, batch == CONTROL_BATCH] = captured.args[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for request in map(str.strip, sys.stdin):
        answer: Any = commit
        if request != "about":
            dtype, threads, *control = request.split()
            torch.set_num_threads(int(threads))
            started = time.perf_counter(), time.process_time()
            sides[dtype, bool(control)]()
            seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            ids = [(each.dialogue_id, each.turn, getattr(each, "token_ids", None) or getattr(each, "ids", None) or [])
                   for each in outcomes]  # fmt: skip
            answer = *seconds, {f"{name} {turn}": hashlib.md5(bytes(str(list(own)), "ascii")).hexdigest()
                                for name, turn, own in ids}  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def compare_generations(report: "Report", old: Path, rounds: int, quick: bool) -> None:
    """Turns a second in generated context, in both precisions and by one and two threads."""
    from measure import ratios, spread

    options = ["--generations", *(["--quick"] * quick)]
    builds = {"old": Build(old, *options), "new": Build(ROOT, *options)}
    commit = builds["old"].answer("about")
    report.section(
        "generated context",
        "Turns a second of the case of benchmarks/evaluation.py, likelihoods left out. A process of each build, in "
        "turn; the first round is not counted. Load: runnable processes of the last minute, this one included. Equal "
        "tokens: turns whose tokens are those of the old build, of the last round. Control: the same of the old build "
        f"by batches of {CONTROL_BATCH}: in bf16 tokens depend on the batch by rounding.",
        old=commit,
        rounds=rounds,
        dialogues=4 if quick else 256,
        load=round(os.getloadavg()[0], 1),
    )
    for dtype, threads in itertools.product(("float32", "bfloat16"), (1, 2)):
        rates, cpu_rates = ({name: [] for name in builds} for _ in range(2))
        ids: dict[str, dict[str, str]] = {}
        for number in range(1 + rounds):
            for name, build in builds.items():
                seconds, cpu_seconds, ids[name] = build.answer(f"{dtype} {threads}")
                print(f"  turn {number}, {dtype}, {threads}, {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
                if number:
                    rates[name].append(len(ids[name]) / seconds)
                    cpu_rates[name].append(len(ids[name]) / cpu_seconds)
        case = f"{dtype}, threads {threads}"
        for name in builds:
            report.add(f"{case}, {name}: turns/s", spread(rates[name]))
            if name != "old":
                report.add(f"{case}, {name} / old", ratios(rates[name], rates["old"]), least=1.2)
                report.add(f"{case}, {name} / old by CPU time", ratios(cpu_rates[name], cpu_rates["old"]))
                equal = sum(ids["old"][turn] == own for turn, own in ids[name].items())
                report.add(f"{case}, {name}: turns with equal tokens, percent", 100 * equal / len(ids["old"]))
        *_, other = builds["old"].answer(f"{dtype} {threads} control")
        equal = sum(ids["old"][turn] == own for turn, own in other.items())
        report.add(f"{case}, control: turns with equal tokens, percent", 100 * equal / len(other))
    end(builds)


def main() -> None:
    """Compare, and write the report; or be one of the builds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="the other build")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--demo", type=int, default=0, metavar="N", help="counted steps of the demo")
    parser.add_argument(
        "--generated", type=int, default=0, metavar="N", help="counted evaluations in generated context"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compare_builds.json")
    for hidden in ("--steps", "--demo-steps", "--generations"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        take_steps(options.checkout, options.quick)
    if options.demo_steps:
        take_demo_steps(options.checkout)
    if options.generations:
        take_generations(options.checkout, options.quick)
    from measure import Report

    kept = json.loads(options.output.read_text()).get("sections", {}) if options.output.exists() else {}
    report = Report({name: getattr(options, name) for name in ("rounds", "demo", "generated", "quick")}, kept)
    if options.rounds:
        compare_steps(report, options.checkout.absolute(), options.rounds, options.quick)
    if options.demo:
        compare_demos(report, options.checkout.absolute(), options.demo)
    if options.generated:
        compare_generations(report, options.checkout.absolute(), options.generated, options.quick)
    report.write(options.output)


if __name__ == "__main__":
    main()
