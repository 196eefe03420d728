"""The launchers for Kubernetes and SkyPilot: what they submit is valid, and a job that is killed ends as any other."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, sampled
from processes import free_port, run_script
from stand_ins import PROGRAMS, PYTHON, end_job, kubernetes_nodes, skypilot_nodes

from csc_train.config.cluster import ClusterConfig
from csc_train.config.compose import compose
from csc_train.config.schedulers import KubernetesConfig, SkyPilotConfig
from csc_train.errors import InputError
from csc_train.launching.job import launch, plan_job
from csc_train.launching.launchers.base import JobSpec
from csc_train.launching.launchers.registry import launcher_class
from csc_train.launching.launchers.submitted import SubmittedLauncher
from csc_train.launching.preflight.checks import run_preflight
from csc_train.launching.supervise import CONFIG_VARIABLE, place_config
from csc_train.launching.sweep import sweep
from csc_train.runs.directory import as_yaml, read_config

EVALUATION = ["recipe=evaluate", "checkpoint=runs/first", "data=rolecs"]
"""A job without a preflight."""
SMALL = ["debug=cpu_tiny", "trainer.max_steps=6", "trainer.save_steps=2"]
SKYPILOT = Path(sys.prefix) / "skypilot" / "bin" / "python"
"""Python of the environment of skypilot, which `make tests` makes."""
ODD = "runs/odd: $(A) '${B}' \"c\" 中文"
"""A run directory that needs quoting everywhere."""
FULL = {
    "kubernetes": KubernetesConfig(
        image="csc-train", image_pull_policy="Always", image_pull_secrets=["hub"], namespace="training",
        mounts={"csc-train-runs": "runs", "data": "/data"}, service_account="trainer", fs_group=10001,
        node_selector={"nvidia.com/gpu.product": "H100", "zone": "1"}, resources={"cpu": "96", "memory": "1.5Ti"},
        env={"NCCL_DEBUG": "INFO", "LEVEL": "1e3", "YES": "yes", "Y": "y", "QUOTED": "a: \"$(b)\" #'c'"},
        secrets={"HF_TOKEN": "hub/token", "WANDB_API_KEY": "wandb/api.key"},
        prologue=["source '/a b/env'", "ulimit -l"],
    ),
    "skypilot": SkyPilotConfig(
        infra="aws/us-east-1", accelerator="H100", cpus="96+", memory="900+", disk_size=512, image_id="docker:csc:1",
        mounts={"s3://my-runs": "runs", "data": "/data"}, env={"NCCL_DEBUG": "INFO", "LEVEL": "1e3", "NO": "no"},
        secrets=["HF_TOKEN"], setup=["pip install ."], prologue=["source '/a b/env'"],
    ),
}  # fmt: skip


def launcher(scheduler, directory="runs/x", **changes):
    options = {"nodes": 2, "gpus_per_node": 8, "device": "cuda", scheduler: FULL[scheduler]} | changes
    cluster = ClusterConfig(scheduler=scheduler, **options)
    config = "model: {path: a}\nrun: {directory: '$(A) ${B} $C'}\n"
    arguments = (f"run={directory}", "resume=true")
    job = launcher_class(cluster)(JobSpec(cluster, Path(directory), "recipes/sft.py", arguments, config=config))
    assert isinstance(job, SubmittedLauncher)
    return job


def documents(text):
    return list(yaml.safe_load_all(text.partition(", which is:\n\n")[2]))


# What is submitted


@pytest.mark.parametrize("directory", ["runs/x", ODD])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_manifests_are_valid_kubernetes(directory, device):
    """By the schemas of Kubernetes' own OpenAPI; strict: an unknown field or kind is an error."""
    if not os.environ.get("CI"):
        pytest.importorskip("kubernetes_validate", reason="make test installs it")
    import kubernetes_validate

    job = launcher("kubernetes", directory, device=device)
    job.check()
    service, manifest = documents(job.describe())
    for document in (service, manifest):
        kubernetes_validate.validate(document, "1.31", strict=True)
    assert [service, manifest] == job.manifest()
    # Neither is a number or a boolean for readers of YAML that are not Python's, such as kubectl.
    assert all(f"value: '{text}'\n" in job.text() for text in ("1e3", "y", "yes"))
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate(manifest | {"kind": "Jobb"}, "1.31", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest | {"specs": {}}, "1.31", strict=True)


def test_a_pod_gets_what_the_cluster_says():
    service, manifest = launcher("kubernetes").manifest()
    name = manifest["metadata"]["name"]
    assert name.startswith("csc-x-") and service["metadata"]["name"] == name
    spec, pod = manifest["spec"], manifest["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (2, 2, 20)
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "96", "memory": "1.5Ti", "nvidia.com/gpu": "8"}
    assert container["command"] == [
        "bash", "-c", "source '/a b/env'\nulimit -l\nexec \"$$@\"", "bash",
        "python", "-m", "csc_train.launching.supervise", "runs/x", "python", "-m", "torch.distributed.run",
        "--nproc_per_node=8", "--nnodes=2", "--node_rank=$(JOB_COMPLETION_INDEX)", f"--master_addr={name}-0.{name}",
        "--master_port=29500", "recipes/sft.py", "run=runs/x", "resume=true",
    ]  # fmt: skip
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert env["QUOTED"] == "a: \"$$(b)\" #'c'" and env[CONFIG_VARIABLE].endswith("'$$(A) $${B} $$C'}\n")
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/opt/csc_train/runs", "/data", "/dev/shm"]
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["securityContext"] == {"fsGroup": 10001}


@pytest.mark.parametrize("scheduler", FULL)
def test_any_text_is_as_it_is_in_the_manifest(scheduler):
    texts = (
        "",
        " ",
        "{{ a }}",
        "{% if %}",
        "a: b #c",
        "'\"\\",
        "a\n---\n\n ...\n",
        "null",
        "0x1",
        "\t\x01",
        "\x85a\u2028",
    )
    env = {f"V{number}": text for number, text in enumerate(texts)}
    job = launcher(scheduler, **{scheduler: replace(FULL[scheduler], env=env, prologue=[*texts])})
    document = job.manifest()[-1]
    if scheduler == "skypilot":
        found, script = document["envs"], document["run"]
    else:
        (container,) = document["spec"]["template"]["spec"]["containers"]
        found, script = {each["name"]: each.get("value") for each in container["env"]}, container["command"][2]
    assert env.items() <= found.items() and "\n".join(texts) in script


def test_any_text_is_read_back_equal_from_the_yaml_of_jobs_and_runs(tmp_path, monkeypatch):
    parts = (
        "\x85",
        "\u2028",
        "\u2029",
        "\ufeff",
        "\n",
        "\r",
        "\t",
        " ",
        "\x00",
        "\xa0",
        "a",
        "'",
        '"',
        "#",
        ": ",
        "\\",
        "|",
        "1",
        "等",
    )
    texts = ["".join(each) for length in (1, 2) for each in itertools.product(parts, repeat=length)]
    job = launcher("kubernetes")
    monkeypatch.setattr(job, "manifest", lambda: [{"texts": texts}])
    assert yaml.safe_load(job.text()) == {"texts": texts}
    assert "等" in job.text()
    (tmp_path / "resolved.yaml").write_text(as_yaml({"texts": texts}), encoding="utf-8", newline="")
    assert read_config(tmp_path / "resolved.yaml") == {"texts": texts}


READ_TASK = """
import json, sys, sky
for file, validated in json.loads(sys.argv[1]):
    task = sky.Task.from_yaml(file)
    if validated:
        task.validate()
    print(json.dumps([task.name, task.num_nodes, task.run, task.envs, sorted(task.file_mounts or task.storage_mounts)]))
for text in ("name: x\\nruns: a\\n", "name: x\\nresources: {infra: nowhere}\\n"):
    try:
        sky.Task.from_yaml_str(text)
    except ValueError:
        print("refused")
"""


@pytest.mark.slow
def test_skypilot_reads_the_tasks(tmp_path):
    """By its own parser. It validates GPUs and buckets by catalogues and accounts of clouds, which are not here."""
    if not SKYPILOT.exists() and "CI" not in os.environ:
        pytest.skip("make tests installs skypilot")
    (tmp_path / "recipes").mkdir()
    plain = {"device": "cpu", "skypilot": SkyPilotConfig(mounts={"my-runs": "runs"}, use_spot=False)}
    jobs = [(launcher("skypilot"), False), (launcher("skypilot", ODD), False), (launcher("skypilot", **plain), True)]
    files = []
    for number, (job, validated) in enumerate(jobs):
        job.check()
        (tmp_path / f"{number}.yaml").write_text(job.text(), encoding="utf-8")
        files.append([f"{number}.yaml", validated])
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [SKYPILOT, "-c", READ_TASK, json.dumps(files)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *read, unknown, nowhere = done.stdout.splitlines()
    assert (unknown, nowhere) == ("refused", "refused")
    for (job, _), row in zip(jobs, map(json.loads, read), strict=True):
        assert row[:4] == [job.name, 2, job.manifest()[0]["run"], job.environment()]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", FULL)
def test_a_dry_run_prints_all_and_needs_no_program(scheduler, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    asked = [*EVALUATION, f"cluster={scheduler}_2x8", "run.directory=runs/x"]
    assert launch([*asked, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    environment = documents(shown)[-1]
    carried = (
        {each["name"]: each["value"] for each in environment["spec"]["template"]["spec"]["containers"][0]["env"]}
        if scheduler == "kubernetes"
        else environment["envs"]
    )[CONFIG_VARIABLE]
    assert yaml.safe_load(carried)["checkpoint"] == "runs/first"
    program = {"kubernetes": "kubectl", "skypilot": "sky"}[scheduler]
    assert launch(asked) == 2
    missing = f"cluster.scheduler={scheduler}: there is no {program} on this machine: launch where there is one; "
    assert capsys.readouterr().err == f"error: {missing}dry_run=true prints the job\n"
    assert sweep(["debug=cpu_tiny", asked[-2], "trainer.packs_per_step=32", "sweep=lr"]) == 2
    assert capsys.readouterr().err == f"error: {missing}dry_run=true prints the job\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_files_that_only_the_cluster_has_are_not_checked_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["experiment=qwen2_5_7b_lora", "cluster=kubernetes_2x8", "trainer.packs_per_step=32"]
    config = compose("preflight", asked)
    for scheduler, status in (("kubernetes", "not checked"), ("slurm", "failed")):
        config.cluster.scheduler = scheduler
        found = {check.name: check.status for check in run_preflight(config, free_disk=1).checks}
        assert (found["model files"], found["disk"]) == (status, status)


# Bad input


SECRET = "hf_AbCdEf0123456789"


QUANTITY = "must be a quantity above 0, such as 500m, 8, 512Mi or 64Gi"
REFUSED = {
    "cluster.kubernetes.image=null": "cluster.kubernetes.image is required: give the image that holds this project",
    "cluster.kubernetes.mounts={csc-train-runs: data}": "/opt/csc_train/runs/x is on no volume, so the run would be "
    "lost: name one there in cluster.kubernetes.mounts",
    "run.directory=/elsewhere/x": "/elsewhere/x is on no volume, so the run would be lost: name one there in "
    "cluster.kubernetes.mounts",
    "cluster.kubernetes.imag=x": "unknown key 'cluster.kubernetes.imag' for recipe launch. Did you mean "
    "'cluster.kubernetes.image'?",
    "cluster.kubernetes.grace=-1": "cluster.kubernetes.grace=-1: must be between 0 and 2147483647",
    f"+cluster.kubernetes.secrets.HF_TOKEN={SECRET}": "cluster.kubernetes.secrets.HF_TOKEN: give the Secret's name and "
    "key as NAME/KEY, never its value",
    f"+cluster.kubernetes.env.HF_TOKEN={SECRET}": "cluster.kubernetes.env.HF_TOKEN: looks like a secret: name it in "
    "cluster.kubernetes.secrets, without its value",
    f"cluster.skypilot.secrets=['HF_TOKEN={SECRET}']": "cluster.skypilot.env, secrets: each environment variable "
    "once, of letters, digits and _",
    "cluster.nodes=3": "cluster.nodes=3: trainer.packs_per_step=32 is not a multiple of trainer.micro_batch_size=2 x "
    "24 processes: give cluster.nodes=2",
    "cluster.scheduler=kubernets": "cluster.scheduler=kubernets: choose one of kubernetes, local, skypilot, slurm. "
    "Did you mean 'kubernetes'?",
}


@pytest.mark.parametrize("setting", sampled(REFUSED, 4))
def test_a_wrong_setting_is_refused_in_one_line(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["debug=cpu_tiny", "cluster=kubernetes_2x8", "trainer.packs_per_step=32"]
    directory = [] if setting.startswith("run.") else ["run.directory=runs/x"]
    assert launch([*asked, *directory, setting]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {REFUSED[setting]}\n")
    assert SECRET not in shown.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("kubernetes", {"mounts": {"a_b": "data"}}, "mounts: a_b: no name of a volume: use lower-case letters, "
         "digits and dashes"),
        ("kubernetes", {"mounts": {"a": "runs", "b": "runs"}}, "mounts.a=runs: must be a path of its own, without a "
         "final slash"),
        ("kubernetes", {"mounts": {"a": "runs/"}}, "mounts.a=runs/: must be a path of its own, without a final slash"),
        ("kubernetes", {"mounts": {"a": "/"}}, "mounts.a=/: must be a path of its own, without a final slash"),
        ("kubernetes", {"resources": {"memory": "10Gb"}}, f"resources.memory=10Gb: {QUANTITY}"),
        ("kubernetes", {"resources": {"cpu": "-1"}}, f"resources.cpu=-1: {QUANTITY}"),
        ("kubernetes", {"shm_size": "0Gi"}, f"shm_size=0Gi: {QUANTITY}"),
        ("kubernetes", {"retries": -1}, "retries=-1: must be between 0 and 2147483647"),
        ("kubernetes", {"namespace": "My_team"}, "namespace=My_team: must be lower-case letters, digits and dashes"),
        ("kubernetes", {"working_directory": "csc"}, "working_directory=csc: must be an absolute path"),
        ("kubernetes", {"image_pull_policy": "always"}, "image_pull_policy=always: choose one of IfNotPresent, Always, "
         "Never. Did you mean 'Always'?"),
        ("skypilot", {"accelerator": "H100:8"}, "accelerator=H100:8: must be a name, such as H100; gpus_per_node "
         "counts them"),
        ("skypilot", {"memory": "256GB"}, "memory=256GB: must be a number, such as 32, or 32+"),
        ("skypilot", {"env": {"API_KEY": SECRET}}, "env.API_KEY: looks like a secret: name it in "
         "cluster.skypilot.secrets, without its value"),
    ],
)  # fmt: skip
def test_a_manifest_field_out_of_range_is_refused(section, values, message):
    with pytest.raises(InputError) as refused:
        type(FULL[section])(**values)
    assert str(refused.value) == f"cluster.{section}.{message}"


@pytest.mark.parametrize("key", ["port=0", "port=65536", "gpus_per_node=-8", "nodes=0"])
def test_a_cluster_out_of_range_is_refused(key):
    name, _, value = key.partition("=")
    with pytest.raises(InputError, match=rf"^cluster.{key}: must be between"):
        ClusterConfig(**{name: int(value)})


# Submitting


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of a stand-in for a cluster; the working directory is beside it."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CLUSTER", str(tmp_path / "cluster"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(PROGRAMS), str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tmp_path / "cluster"


def on_cpus(scheduler, *more):
    """Two nodes with a process each."""
    return [f"cluster={scheduler}_2x8", "cluster.gpus_per_node=1", "cluster.device=cpu", *more]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", FULL)
def test_a_job_is_submitted_watched_and_stopped(scheduler, cluster, capsys, monkeypatch):
    asked = [*EVALUATION, *on_cpus(scheduler, "run.directory=runs/x")]
    refusal = {"kubernetes": "cluster.kubernetes.namespace=forbidden", "skypilot": "cluster.skypilot.infra=nowhere"}
    assert launch([*asked, refusal[scheduler]]) == 2
    shown = capsys.readouterr()
    assert shown.err in (
        "error: kubectl apply --filename: Error from server (Forbidden): jobs.batch is forbidden: no right to create "
        "it\n",
        "error: sky jobs launch: ValueError: Invalid cloud: nowhere\n",
    )
    assert list(Path().iterdir()) == []  # the same command may be given again
    assert launch(asked) == 0
    (file,) = cluster.iterdir()
    job = plan_job(["run=runs/x", "resume=true"]).launcher()
    job.job_id = {"kubernetes": file.stem, "skypilot": "1"}[scheduler]
    assert capsys.readouterr().out == f"run directory: runs/x\nSubmitted batch job {job.job_id}\n"
    assert job.poll() is None
    (cluster / "down").touch()
    assert job.poll() is None  # the scheduler does not answer
    (cluster / "down").unlink()
    if scheduler == "kubernetes":
        written = {path: path.read_text() for path in Path("runs/x").iterdir()}
        assert launch(["run=runs/x", "resume=true", "cluster.kubernetes.retries=9"]) == 2
        assert {path: path.read_text() for path in Path("runs/x").iterdir()} == written
        running = f"job {job.job_id} of runs/x still runs: wait for its end, or delete it"
        assert capsys.readouterr().err == f"error: {running}\n"
    end_job(file, succeeded=False)
    assert job.poll() == 1
    end_job(file, succeeded=True)
    assert job.poll() == 0
    assert launch(["run=runs/x", "resume=true"]) == 0  # in the place of the job that has ended
    job.job_id = {"kubernetes": file.stem, "skypilot": "2"}[scheduler]
    assert job.poll() is None
    job.stop()
    assert job.poll() == 1


@pytest.mark.slow
def test_secrets_of_skypilot_are_read_where_it_is_called(cluster, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = [*EVALUATION, *on_cpus("skypilot", "run.directory=runs/x", "cluster.skypilot.secrets=[HF_TOKEN]")]
    assert launch(asked) == 2
    unset = "error: cluster.skypilot.secrets: HF_TOKEN is not set on this machine: export it\n"
    assert capsys.readouterr().err == unset and list(Path().iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert launch(asked) == 0
    row = json.loads((cluster / "1.json").read_text())
    assert row["secrets"] == ["HF_TOKEN"] and row["task"]["secrets"] == {"HF_TOKEN": None}
    written = [path.read_text() for path in Path("runs/x").iterdir()]
    assert not any(SECRET in text for text in [*written, capsys.readouterr().out])


@pytest.mark.slow
def test_a_sweep_submits_its_trials(cluster, capsys):
    (cluster / "finishes").touch()
    asked = [*SMALL, *on_cpus("kubernetes"), "sweep.poll=0.1", "sweep=lr", "sweep.trials=2", "sweep.parallel=2"]
    assert sweep(asked) == 0, capsys.readouterr().err
    trials = json.loads(Path("runs/sweeps/lr/summary.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert len(list(cluster.glob("*.json"))) == 2


# A job that is killed


def test_a_node_writes_the_configuration_that_it_brings_along_once(tmp_path, monkeypatch):
    run, commit = tmp_path / "runs" / "x", "a" * 40
    text = "model: {path: owner/name, revision: null}\nrun: {timeout_s: 9}\ndata: [{path: owner/data@v1}]\n"
    started = text.replace("null", commit).replace("v1", commit)
    for written in (text, started):
        monkeypatch.setenv(CONFIG_VARIABLE, text.replace("9", "8") if run.exists() else text)
        place_config(run)
        assert CONFIG_VARIABLE not in os.environ  # 100 kB at most, and no matter of the ranks
        assert [path.name for path in run.iterdir()] == ["resolved.yaml"]
        (run / "resolved.yaml").write_text(written)
    place_config(run)
    assert (run / "resolved.yaml").read_text() == started


@pytest.mark.slow
def test_a_node_refuses_to_resume_a_run_of_another_configuration(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "resolved.yaml").write_text("trainer: {epochs: 2, seed: 1}\n")
    environment = os.environ | {CONFIG_VARIABLE: "trainer: {epochs: 3, seed: 1}\n", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "csc_train.launching.supervise", "x", "touch", "started"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    other = "error: x: holds a run with trainer.epochs=2, not 3: choose another run.directory\n"
    assert (done.returncode, done.stderr) == (2, other)
    assert not (tmp_path / "started").exists()


def losses(run):
    log = json.loads((run / "metrics.json").read_text())["log"]
    return [entry["loss"] for entry in log if "grad_norm" in entry]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working directory on the nodes, with the recipes in it as in a checkout."""
    directory = tmp_path_factory.mktemp("nodes").resolve()
    (directory / "recipes").symlink_to(ROOT / "recipes")
    return directory


@pytest.fixture(scope="module")
def reference(place):
    """The losses of the same two ranks in one job that nothing befell."""
    done = run_script(ROOT / "recipes" / "sft.py", *SMALL, "run.directory=runs/whole", ranks=2, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(place / "runs" / "whole")


@pytest.mark.distributed
@pytest.mark.parametrize(("scheduler", "nodes_of"), [("kubernetes", kubernetes_nodes), ("skypilot", skypilot_nodes)])
def test_a_job_whose_node_is_killed_resumes_with_equal_losses(scheduler, nodes_of, cluster, place, reference, capsys):
    """The nodes share no files with this machine: they bring the configuration along."""
    options = f"cluster.{scheduler}"
    assert launch(
        SMALL + on_cpus(
            scheduler, f"run.directory=runs/{scheduler}", f"cluster.port={free_port()}", f"{options}.python={PYTHON}",
            f"{options}.working_directory={place}", f"{options}.prologue=['export OMP_NUM_THREADS=1']",
        )
    ) == 0, capsys.readouterr().err  # fmt: skip
    (file,) = cluster.glob("*.json")
    run = place / "runs" / scheduler
    nodes = nodes_of(file)
    nodes.until(lambda: list((run / "checkpoints").glob("checkpoint-2")))
    nodes.nodes[1].kill()
    assert nodes.end(), nodes.output
    assert nodes.starts == 2 and re.search(r"trained [1-4] steps in ", nodes.output)
    assert losses(run) == pytest.approx(reference, abs=1e-6) and len(reference) == 6
    job = plan_job([f"run=runs/{scheduler}", "resume=true"]).launcher()
    job.job_id = {"kubernetes": file.stem, "skypilot": "1"}[scheduler]
    assert job.poll() is None
    end_job(file, succeeded=True)
    assert job.poll() == 0
