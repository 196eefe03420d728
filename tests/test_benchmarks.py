"""The benchmarks run, compare what is equal, and their kept results are those of the script as it is."""

import importlib
import os
import runpy
import subprocess
import sys
import time
import zipfile

import numpy
import pytest
import torch
from conftest import ROOT
from processes import run_script
from transformers import AutoConfig

from csc_train.files import read_json
from csc_train.models.families import model_dims, training_flops

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def measure(monkeypatch):
    """The module that the benchmarks share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    return measure


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The report of a quick run."""
    path = tmp_path_factory.mktemp("benchmarks") / "packing.json"
    environment = {name: value for name, value in os.environ.items() if name != "CSC_TOKENIZERS"}
    done = run_script(BENCHMARKS / "packing.py", "--quick", "--output", path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_json(path)


def result(report, section, name):
    """The value or the median of a result."""
    found = report["sections"][section]["results"][name]
    return found.get("median", found.get("value"))


@pytest.mark.slow
def test_a_quick_run_has_every_section_with_what_it_depends_on(quick):
    capacities = ("8,192", "4,096")
    assert list(quick["sections"]) == [
        "tokens",
        *(f"packer at {capacity}" for capacity in capacities),
        *(f"balance at {capacity}, {packs} packs a step" for capacity in capacities for packs in (8, 64)),
        "preparation",
        "training",
        "same dialogues a step",
        "compiled layers",
        "exactness",
    ]
    for section in quick["sections"].values():
        assert section["how"]
        assert section["settings"]
        assert section["results"]
        assert {"commit", "dirty", "versions"} <= set(section["provenance"])
        assert section["machine"]["cores"] >= 1
    assert quick["settings"]["quick"] is True


@pytest.mark.slow
def test_the_sides_of_a_quick_run_do_the_same(quick):
    assert result(quick, "preparation", "ids equal") is True
    assert result(quick, "preparation", "labels equal") is True
    assert result(quick, "same dialogues a step", "same trained tokens") is True
    assert result(quick, "same dialogues a step", "losses apart, relative") <= 1e-5
    for packs in ("shared prefix", "plain packs"):
        assert result(quick, "compiled layers", f"{packs}: losses apart, relative") <= 1e-5
    losses = result(quick, "same dialogues a step", "shared_prefix: losses").split()
    assert len(set(losses)) == quick["settings"]["rounds"] + 1  # each step another pack, after another update
    assert result(quick, "exactness", "shared prefix") <= 1e-5
    assert result(quick, "exactness", "TRL packs") <= 1e-5
    assert result(quick, "exactness", "largest hidden state") > 1


@pytest.mark.slow
def test_the_kept_results_are_of_a_whole_run_of_this_script(quick):
    kept = read_json(BENCHMARKS / "results" / "packing.json")
    assert kept["settings"]["quick"] is False
    assert kept["settings"].keys() == quick["settings"].keys()
    for name, section in quick["sections"].items():
        assert kept["sections"][name]["how"] == section["how"]
        differ = kept["sections"][name]["results"].keys() ^ section["results"].keys()
        assert all("the real prompt" in result for result in differ)
    assert result(kept, "tokens", "shared / plain, 568 ids") <= 0.62


@pytest.mark.slow
def test_two_builds_take_the_same_steps_in_turn(tmp_path):
    """This build beside itself."""
    path = tmp_path / "compare_builds.json"
    done = run_script(BENCHMARKS / "compare_builds.py", ROOT, "--quick", "--rounds", "1", "--output", path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(path)
    for side in ("shared prefix", "plain packs"):
        assert result(report, "optimizer steps", f"{side}: losses apart") == 0
        assert result(report, "optimizer steps", f"{side}: new / old by CPU time") > 0


def test_goals_are_judged_by_the_median(measure, capsys):
    report = measure.Report({}, {})
    report.section("a", "how", size=1)
    report.add("missed", measure.spread([3, 1, 2]), most=1.5)
    report.add("met", 2, least=2)
    report.add("open", True)
    assert report.results == {
        "missed": {"median": 2, "low": 1, "high": 3, "repeats": 3, "goal": "at most 1.5", "met": False},
        "met": {"value": 2, "goal": "at least 2", "met": True},
        "open": {"value": True},
    }
    assert capsys.readouterr().out.count("MISSED") == 1


def test_sides_take_turns_and_the_warm_up_is_not_counted(measure):
    calls = []
    taken = measure.side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(taken[name]) for name in "ab"] == [2, 2]


def test_the_samples_of_a_dialogue_train_what_the_dialogue_trains_each_token_once(measure):
    bodies = [40, 101]
    examples = measure.random_examples(bodies, prefix=7, vocabulary=50)
    samples = measure.turn_samples(examples)
    assert [len(sample.input_ids) for sample in samples] == (
        7 + measure.turn_ends(numpy.array(bodies))
    ).ravel().tolist()
    for number, example in enumerate(examples):
        assert len(example.input_ids) == 7 + bodies[number]
        of_this = samples[number * measure.EXCHANGES :][: measure.EXCHANGES]
        times = numpy.zeros(len(example.input_ids), int)
        for sample in of_this:
            assert sample.input_ids.tolist() == example.input_ids[: len(sample.input_ids)].tolist()
            times[: len(sample.input_ids)] += sample.trained
        assert times.tolist() == example.trained.astype(int).tolist()
        assert 0.4 < example.trained[7:].mean() < 0.6


@pytest.mark.slow
def test_the_roofline_counts_the_flops_of_a_step_and_favours_a_shared_prefix(measure, tmp_path, monkeypatch, capsys):
    roofline = importlib.import_module("roofline")
    dims = model_dims(AutoConfig.for_model("qwen2", **measure.SHAPES["7b"]))
    pack = roofline.mean_pack(309, shared=True)
    for adapters in (0, 10**6):
        parts = roofline.parts(dims, pack, adapters, "compiled")
        flops = {name: each[0] for name, each in parts.items()}
        flops["attention"] *= 3 / roofline.FLASH_PASSES  # what is recomputed is not counted
        counts = training_flops(dims, adapters)
        expected = counts.per_token * pack.tokens + counts.per_head_token * pack.scored + counts.per_pair * pack.pairs
        assert sum(flops.values()) == pytest.approx(expected)
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--output", str(tmp_path / "roofline.json")])
    roofline.main()
    written, kept = read_json(tmp_path / "roofline.json"), read_json(BENCHMARKS / "results" / "roofline.json")
    assert "| H200 | 7b | 309 | compiled |" in capsys.readouterr().out
    assert [row["ratio"] for row in written["rows"]] == pytest.approx([row["ratio"] for row in kept["rows"]])
    assert min(row["ratio"] for row in written["rows"] if row["prefix"] == 568) > 1.5


def test_the_gpu_benchmark_explains_itself_and_refuses_to_run_without_one(measure, monkeypatch, capsys):
    script = str(BENCHMARKS / "gpu.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 0
    assert "--rehearse" in capsys.readouterr().out
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match="torch finds none here"):
        runpy.run_path(script, run_name="__main__")


@pytest.fixture
def gpu(measure, monkeypatch):
    """The module of the GPU benchmark, imported as for a rehearsal."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse"])
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # it sets them: they are removed at the end
    return importlib.import_module("gpu")


def test_a_missing_package_is_named_in_one_line(measure, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"gpu\.py: import of datasets .*README\.md lists the wheels"):
        runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")


@pytest.mark.slow
def test_wheels_are_imported_without_being_installed(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("measure.py", "raise ModuleNotFoundError('the carried one')")
    done = run_script(BENCHMARKS / "gpu.py", "--rehearse", "--wheels", tmp_path)
    assert done.returncode == 1
    assert "gpu.py: the carried one" in done.stderr


@pytest.mark.slow
def test_a_second_call_measures_what_is_missing(gpu, tmp_path, capfd):
    path, calls = tmp_path / "gpu.json", tmp_path / "calls"
    settings = {"code": "1", "device": "cpu", "torch": "2"}

    def call(settings, end=float("inf")):
        report = gpu.Sections(path, settings)

        def note(name):
            with calls.open("a") as file:
                file.write(f"{name} ")

        def good():
            note("good")
            report.add("figure", 7)

        def bad():
            note("bad")
            raise ValueError("one line\nand another")

        report.measure("good", "how", good, end, 60)
        report.measure("bad", "how", bad, end, 60)
        return report.skipped, report.failed

    assert call(settings) == (0, 1)
    assert result(read_json(path), "good", "figure") == 7
    assert result(read_json(path), "bad", "status") == "failed: ValueError: one line"
    assert call(settings) == (0, 1)
    assert calls.read_text() == "good bad bad "
    assert call(settings | {"commit": "abc"}) == (0, 1)  # decides nothing
    assert calls.read_text() == "good bad bad bad "
    assert call(settings | {"code": "2"}, end=time.monotonic() + 30) == (2, 0)  # no time: what there was stays
    assert result(read_json(path), "good", "status") == "done"
    assert call(settings | {"code": "2"}) == (0, 1)
    assert calls.read_text() == "good bad bad bad good bad "
    assert "no time is left" in capfd.readouterr().out


def test_a_figure_is_written_as_soon_as_it_is_there_and_outlives_its_process(gpu, tmp_path):
    report = gpu.Sections(tmp_path / "gpu.json", {"device": "cpu", "torch": "2"})

    def killed():
        report.add("figure", 7)
        os._exit(9)

    report.measure("section", "how", killed, float("inf"), 1)
    assert result(read_json(report.path), "section", "figure") == 7
    assert result(read_json(report.path), "section", "status") == "failed: the process ended with 9"


def test_the_process_that_others_are_copies_of_leaves_the_gpu_alone(gpu, tmp_path, monkeypatch):
    report = gpu.Sections(tmp_path / "gpu.json", {"device": "NVIDIA H200", "torch": "2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_device_name", "get_device_properties", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: pytest.fail("CUDA is used before a fork"))
    bench = gpu.Bench(report, gpu.Settings())
    report.measure("section", "how", lambda: None, float("inf"), 1)
    assert bench.sections()
    assert bench.peak == 989e12
    assert report.failed == 0


BROKEN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--rehearse"]
import gpu, turns
bench = gpu.Bench(gpu.Sections(Path("gpu.json"), {"device": "cpu", "torch": "2"}), gpu.REHEARSAL)
good = bench.ours("1.5b", 568, "best_fit", gpu.AdapterConfig())
def bad(directory):
    trainer = good(directory)
    trainer.compute_loss = lambda *_, **__: 1 / 0
    return trainer
try:
    with turns.sides_of({"good": good, "bad": bad}, 512) as sides:
        turns.take_turns(sides, 1, 1, 2)
except turns.SideError as error:
    print("raised", error)
print(len(sides), [side._process.is_alive() for side in sides.values()])
"""


@pytest.mark.slow
def test_what_a_training_raises_is_raised_in_its_turn_and_the_others_end(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    done = run_script(tmp_path / "broken.py", BENCHMARKS, cwd=tmp_path)
    assert "raised ZeroDivisionError: division by zero\n2 [False, False]" in done.stdout, done.stderr


@pytest.mark.slow
def test_make_bench_gpu_refuses_in_one_line_and_builds_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        ["make", "--no-print-directory", "bench-gpu", f"PYTHON={sys.executable}", "VENV=absent"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    said, failed = done.stderr.splitlines()
    assert said == "gpu.py measures a CUDA GPU, and torch finds none here; --rehearse goes through it on a CPU"
    assert "Error 1" in failed
    assert not (ROOT / "absent").exists()


def test_trls_packs_by_our_kernel_keep_documents_apart(gpu):
    lengths = [5, 9, 3]
    q, k, v = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed_varlen = importlib.import_module("packed_varlen")
    output, _ = packed_varlen.packed_varlen_attention(None, q, k, v, None, position_ids=positions)
    expected = gpu.dense_attention([q, k, v, torch.ones_like(q)], gpu.dense_mask(lengths, 0))[0]
    assert torch.allclose(output.transpose(1, 2).double(), expected, atol=1e-5)
    other, _ = packed_varlen.packed_varlen_attention(None, q, k, v, None, position_ids=torch.arange(17)[None])
    assert not torch.allclose(other, output, atol=1e-2)


@pytest.mark.slow
def test_a_rehearsal_goes_through_its_sections(tmp_path):
    path = tmp_path / "gpu.json"
    # One of each kind: a whole rehearsal repeats them for other models and settings, a minute long.
    chosen = ("exactness", "attention", "waits", "steps: 7b", "profile: 1.5b", "head", "alone: 1.5b, grad")
    chosen += (
        "generated context",
        "hybrid: exactness",
        "hybrid: layer",
        "hybrid: TRL",
        "experts: exactness",
        "experts: products",
    )
    done = run_script(BENCHMARKS / "gpu.py", "--rehearse", "--output", path, "--sections", *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    report = read_json(path)
    ended = {name: each["results"]["status"]["value"] for name, each in report["sections"].items()}
    assert ended == dict.fromkeys(ended, "done")
    assert all(any(name.startswith(each) for name in ended) for each in chosen)
    exact = report["sections"]["exactness"]["results"]
    assert [each["met"] for name, each in exact.items() if "error of" in name] == [True] * 30
    assert [each["met"] for name, each in exact.items() if "off by one" in name] == [True] * 8
    trained = report["sections"]["steps: 7b, 568 ids"]["results"]
    assert trained["shared prefix: tokens/s"]["median"] > trained["shared prefix: trained tokens/s"]["median"]
    assert result(report, "steps: 7b, 309 ids", "shared prefix / TRL") > 0
    assert result(report, "steps: 7b, hours", "shared prefix: hours of the 7B by LoRA on one GPU") > 0
    assert result(report, "head", "1.5b: TRL, loss over ours") == pytest.approx(1, abs=1e-3)
    generated = report["sections"]["generated context"]["results"]
    assert all(generated[f"ours / {name}"]["median"] > 0 for name in ("padded batches", "one at a time"))
    shares = [generated[f"ours: {name}, share of the time"]["value"] for name in ("prefill", "decoding")]
    assert min(shares) > 0 and sum(shares) < 1
    plans = [result(report, f"alone: 1.5b, gradient_checkpointing={mode}", "plain packs: planned peak, GiB")
             for mode in ("off", "selective", "full")]  # fmt: skip
    assert plans == sorted(plans, reverse=True)
    exact = report["sections"]["hybrid: exactness"]["results"]
    assert [each["met"] for each in exact.values() if "met" in each] == [True] * (3 * 5 + 5)
    assert result(report, "hybrid: layer", "torch: shared / plain") > 0
    assert result(report, "hybrid: TRL, 568 ids", "shared prefix / TRL") > 0
    exact = report["sections"]["experts: exactness"]["results"]
    assert [each["met"] for each in exact.values() if "met" in each] == [True] * 6
    assert result(report, "experts: products", "eager / grouped_mm") > 0


@pytest.mark.slow
def test_a_quick_run_of_hybrids_and_experts_trains_and_evaluates_exactly(tmp_path):
    path = tmp_path / "hybrids.json"
    done = run_script(BENCHMARKS / "hybrids.py", "--quick", "--output", path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(path)
    names = ["training", "exactness", "prompt", "cost of a token", "generated context"]
    assert list(report["sections"]) == [*names, "experts: training", "experts: products"]
    assert result(report, "experts: training", "shared prefix / plain packs") > 0
    assert result(report, "experts: products", "float32, decoding, 3 tokens: batched_mm / grouped_mm") > 0
    assert result(report, "training", "shared prefix / plain packs") > 0
    assert result(report, "exactness", "shared prefix") < 1e-5
    assert result(report, "exactness", "position ids alone") > 1e-2
    assert result(report, "exactness", "TRL packs").startswith("refused")
    assert result(report, "prompt", "times the prefix was computed") == 1
    assert result(report, "cost of a token", "delta nets: 240 / 60 tokens") > 0
    assert result(report, "generated context", "tokens equal") is True


@pytest.mark.slow
def test_a_quick_run_of_data_reads_encodes_and_searches(tmp_path):
    path = tmp_path / "data.json"
    sections = ("duplicates", "encoding")  # the others start processes, which import for seconds
    environment = {name: value for name, value in os.environ.items() if name != "CSC_TOKENIZERS"}
    arguments = ("--quick", "--rounds", "1", "--output", path, "--sections", *sections)
    done = run_script(BENCHMARKS / "data.py", *arguments, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(path)
    assert list(report["sections"]) == ["near duplicates", "reading and encoding"]
    assert result(report, "near duplicates", "pairs") > 0
    assert result(report, "reading and encoding", "all / tokenizer alone, batches of 1,000") > 0


@pytest.mark.slow
def test_a_quick_run_of_evaluation_reports_every_result(tmp_path):
    path = tmp_path / "evaluation.json"
    done = run_script(BENCHMARKS / "evaluation.py", "--quick", "--output", path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(path)
    assert result(report, "generated context", "tokens equal") is True
    assert result(report, "generated context", "alone / together") > 0
    results = report["sections"]["scoring"]["results"]
    assert "all lexical metrics of both profiles: seconds" in results
    assert all(each.get("median", each.get("value")) > 0 for each in results.values())
