"""The files of the image agree with the project, and its SLURM jobs pass on what a training needs, and no more."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

from csc_train.config.compose import compose
from csc_train.launching.job import launch

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
DEFINITION = (ROOT / "docker" / "csc_train.def").read_text()
INSTALL = (ROOT / "docker" / "install.sh").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECTIONS = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", DEFINITION, re.MULTILINE | re.DOTALL))


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def sent(path, patterns):
    """Whether a path belongs to the build's context: the last pattern that matches it or a folder above it decides."""
    above = ["/".join(path.split("/")[: end + 1]) for end in range(path.count("/") + 1)]
    kept = True
    for pattern in patterns:
        name = pattern.removeprefix("!").removeprefix("/")
        anywhere = name.startswith("**/")
        tails = [part.split("/")[-1] for part in above] if anywhere else above
        if any(fnmatch(tail, name.removeprefix("**/")) and tail.count("/") == name.removeprefix("**/").count("/")
               for tail in tails):  # fmt: skip
            kept = pattern.startswith("!")
    return kept


@pytest.fixture(scope="module")
def patterns():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_and_the_definition_are_of_one_base_and_run_the_same_steps():
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-ubuntu[\d.]+", base)
    assert f"    BASE={base}\n" in SECTIONS["arguments"] and "\nFrom: {{ BASE }}\n" in DEFINITION
    steps = re.findall(r"sh docker/install.sh (\w+)", DOCKERFILE)
    assert steps == re.findall(r"sh docker/install.sh (\w+)", SECTIONS["post"]) == ["system", "libraries", "project"]
    assert set(re.findall(r"^(\w+)\)$", INSTALL, re.MULTILINE)) == set(steps)
    (venv, path) = re.findall(r"^ENV VENV=(\S+) PATH=(\S+)$", DOCKERFILE, re.MULTILINE)[0]
    assert f"export VENV={venv}\n    export PATH={path}\n" in SECTIONS["environment"]
    assert f"VENV:={venv}" in INSTALL and path.startswith(f"{venv}/bin:")
    assert compose("launch", ["cluster=slurm_pyxis"]).cluster.slurm.python == f"{venv}/bin/python"


def test_the_image_has_the_python_and_torch_of_the_project():
    needed = PROJECT["requires-python"].removeprefix(">=")
    assert f"sys.version_info >= ({needed.replace('.', ', ')})" in INSTALL
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert [line for line in lock if line.startswith("torch==")] == [PROJECT["dependencies"][0]]
    assert INSTALL.count("--constraint requirements.lock") == 1 and "--no-deps" in INSTALL


def test_the_user_of_the_image_is_a_number_other_than_0():
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1:] == ["10001"]
    assert "useradd --uid 10001 " in DOCKERFILE


def test_what_is_copied_exists_and_is_what_the_demo_needs(patterns):
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    named = {line.split()[0] for line in SECTIONS["files"].splitlines() if line.strip()}
    for name in (copied | named) - {"."}:
        assert (ROOT / name).exists(), name
    assert all(sent(name, patterns) for name in copied - {"."})
    in_image = {path.split("/")[0] for path in tracked() if sent(path, patterns)}
    assert in_image == named
    # All of the package, and what the first rule of make depends on
    source = tracked("csc_train", "conf", "launch", "recipes")
    assert [path for path in source if not sent(path, patterns)] == []
    (needed,) = re.findall(r"^\$\(VENV\)/installed: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {name for name in needed.split() if not sent(name, patterns)} == set()


@pytest.mark.parametrize(
    "path",
    [
        "runs/demo/model/model.safetensors", ".venv/bin/python", ".git/config", ".env", ".netrc", "csc_train/.env",
        "key.pem", "conf/llm/server.key", "wandb/settings", "data/calls.jsonl", "csc_train/models/__pycache__/a.pyc",
        "csc_train.egg-info/PKG-INFO", "tests/conftest.py", "csc_train.sif",
    ],
)  # fmt: skip
def test_the_context_leaves_out(path, patterns):
    assert not sent(path, patterns)


@pytest.fixture
def steps(tmp_path):
    """Run a step of install.sh where `python3` makes an environment whose pip prints what it would install."""
    (tmp_path / "bin").mkdir()
    pip = 'printf "%s\\n" "$@"; cat "$3"'
    python = f"""
        if [ "$1" = -m ]; then
          mkdir -p "$3/bin"; ln -s {sys.executable} "$3/bin/python"; printf '%s\\n' '#!/bin/sh' '{pip}' > "$3/bin/pip"
          chmod +x "$3/bin/pip"
        else exec {sys.executable} -c "import sys; sys.version_info = (${{MINOR:-3, 11}}); $2"; fi"""
    (tmp_path / "bin" / "python3").write_text(f"#!/bin/sh{python}\n")
    (tmp_path / "bin" / "python3").chmod(0o755)

    def run(*arguments, **variables):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "VENV": str(tmp_path / "venv"), **variables}
        command = ["sh", ROOT / "docker" / "install.sh", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("extras", "added"), [((), []), (("",), []), (("serve,gguf",), ["transformers[serving]", "gguf>=0.19,<1"])]
)
def test_the_libraries_are_those_of_the_project_in_locked_versions(steps, extras, added):
    done = steps("libraries", *extras)
    command, wanted = done.stdout.splitlines()[:5], done.stdout.splitlines()[5:]
    assert (done.returncode, wanted) == (0, PROJECT["dependencies"] + added), done.stderr
    assert (command[0], command[-2:]) == ("install", ["--constraint", "requirements.lock"])


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["libraries", "web,srve"], {}, "EXTRAS=web,srve: no srve in pyproject.toml: choose of web, serve, "),
        (["libraries"], {"MINOR": "3, 10"}, ": choose a BASE with 3.11 or later"),
        (["libary"], {}, "install.sh libary: unknown step: choose system, libraries or project"),
    ],
)
def test_a_step_that_cannot_be_done_installs_nothing(steps, arguments, variables, message):
    done = steps(*arguments, **variables)
    assert done.returncode != 0 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


# SLURM jobs in containers

STAND_INS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    # Two tasks, each with the GPUs of its own node
    "srun": """
        while [[ $1 == -* ]]; do echo "srun $1"; shift; done
        for node in 0 1; do SLURM_NODEID=$node CUDA_VISIBLE_DEVICES=$node,$((node + 2)) "$@"; done""",
    # Nothing of the outside but APPTAINERENV_*, and the name of the image
    "apptainer": """
        echo "apptainer $*"
        inside=(PATH="$PATH" APPTAINER_CONTAINER=image)
        for name in $(compgen -e); do
          [[ $name == APPTAINERENV_* ]] && inside+=("${name#APPTAINERENV_}=${!name}")
        done
        while [[ $1 != *.sif ]]; do shift; done
        exec env -i "${inside[@]}" "${@:2}" """,
    "python": 'echo "python $*"; env; if [[ $2 == csc_train.launching.supervise ]]; then exec "${@:4}"; fi',
}


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Run the job script of a cluster in `tmp_path`, by stand-ins; what it prints, by task and Python in it."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("docker", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(cluster, *overrides):
        asked = [f"cluster={cluster}", "trainer.packs_per_step=32", "run.directory=runs/x", *overrides]
        assert launch(["experiment=qwen2_5_7b_lora", *asked, "dry_run=true"]) == 0
        script = capsys.readouterr().out.partition(", which is:\n\n")[2]
        outside = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "2007", "SLURM_JOB_NODELIST": "node[1-2]",
            "PYTHONPATH": "/nfs/me/old", "LD_LIBRARY_PATH": "/nfs/me/lib", "HF_TOKEN": "hf_a b,c",
            "NCCL_SOCKET_IFNAME": "ib0,ib1", "https_proxy": "proxy:1", "UNRELATED": "x",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=outside, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_apptainer_gets_the_variables_of_each_node_and_nothing_of_the_home(job, tmp_path):
    output = job("slurm_apptainer")
    started = re.findall(r"^apptainer (.*)$", output, re.MULTILINE)
    assert len(started) == 2, "torchrun runs in the image already"
    folders = f"--bind {tmp_path},{tmp_path}/runs/huggingface --pwd {tmp_path} csc_train.sif python"
    own_home = Path(f"/tmp/csc_train-{os.getuid()}")
    assert started[0].startswith(f"exec --nv --cleanenv --home {own_home} {folders} -m csc_train.launching.supervise ")
    assert own_home.stat().st_mode & 0o777 == 0o700
    assert not any("hf_a" in line or "ib0" in line for line in started)
    inside = re.findall(r"^python (.*)\n((?:(?!python |apptainer )\w+=.*\n)*)", output, re.MULTILINE)
    assert len(inside) == 4
    for number, (command, variables) in enumerate(inside):
        node = number // 2
        if number % 2:
            assert f"--node_rank={node} --master_addr=node1 --master_port=29507 recipes/sft.py " in command
        wanted = {
            f"CUDA_VISIBLE_DEVICES={node},{node + 2}", f"SLURM_NODEID={node}", "HF_TOKEN=hf_a b,c",
            "NCCL_SOCKET_IFNAME=ib0,ib1", f"PYTHONPATH={tmp_path}", "PYTHONNOUSERSITE=1", "https_proxy=proxy:1",
            f"HF_HOME={tmp_path}/runs/huggingface",
        }  # fmt: skip
        assert wanted <= set(variables.splitlines())
        assert "UNRELATED" not in variables and "LD_LIBRARY_PATH" not in variables and "/nfs/me" not in variables


@pytest.mark.slow
def test_pyxis_gets_the_mounts_and_the_names_of_what_the_job_sets(job, tmp_path, monkeypatch):
    output = job("slurm_pyxis", "cluster.slurm.python=python")
    options = re.findall(r"^srun (.*)$", output, re.MULTILINE)
    home = f"{tmp_path}/runs/huggingface"
    assert options[:-1] == [
        "--kill-on-bad-exit=1", f"--container-image={tmp_path}/csc_train.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},{home}:{home}", f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
    ]  # fmt: skip
    assert Path(home).is_dir(), "enroot mounts what exists"
    named = options[-1].removeprefix("--container-env=").split(",")
    prologue = " ".join(compose("launch", ["cluster=slurm_pyxis"]).cluster.slurm.prologue)
    assert set(named) == {*re.findall(r"([A-Z_]+)=", prologue), "CUDA_VISIBLE_DEVICES"}
    variables = set(output.splitlines())
    assert {f"PYTHONPATH={tmp_path}", "PYTHONNOUSERSITE=1", "TMPDIR=/tmp", f"HF_HOME={home}"} <= variables
    assert output.count("--master_addr=node1 --master_port=29507 recipes/sft.py ") == 4


def test_a_folder_of_models_that_is_set_stays(job, tmp_path):
    """Both as a variable of the user."""
    for cluster in ("slurm_pyxis", "slurm_apptainer"):
        prologue = compose("launch", [f"cluster={cluster}"]).cluster.slurm.prologue
        script = "\n".join([*prologue, 'echo "$HF_HOME"'])
        asked = {"cwd": tmp_path, "env": os.environ | {"HF_HOME": f"{tmp_path}/models"}, "text": True}
        done = subprocess.run(["bash", "-c", script], **asked, capture_output=True, check=True)
        assert done.stdout == f"{tmp_path}/models\n"


def test_a_home_that_another_user_made_is_refused(tmp_path):
    """`-O` of the shell answers as for a folder of another user."""
    script = (ROOT / "docker" / "apptainer_python.sh").read_text()
    taken = script.replace("! -O", "-O")
    done = subprocess.run(["bash", "-c", taken, "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"/tmp/csc_train-\d+: another user made it: remove it on \S+\n", done.stderr)
