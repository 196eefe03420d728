"""Clusters on this machine: what kubectl and sky were given runs as processes, as Kubernetes and SkyPilot run it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT
from processes import TIMEOUT_S, Script

PROGRAMS = ROOT / "tests" / "data" / "clusters"
"""Folder of the commands kubectl, sky and python that stand in for the real ones."""
PYTHON = str(PROGRAMS / "python")


def start_node(command: list[str], directory: str, environment: dict[str, str], commands: Path) -> Script:
    """Run a node's command; Python, with which it ends, is forked (see `processes.Script`)."""
    file = commands / "command"
    variables = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COMMAND_FILE": str(file)}
    subprocess.run(command, cwd=directory, env=os.environ | environment | variables, check=True)
    cwd, count, *rest = file.read_bytes().decode().rstrip("\0").split("\0")
    words, values = rest[: int(count)], dict(text.split("=", 1) for text in rest[int(count) :])
    words = [sys.executable if word == PYTHON else word for word in words]
    return Script(*words, cwd=Path(cwd), env=values, forks=True, merge=True)


class Nodes:
    """The nodes of a job: started together, and again when some of them failed, as often as the cluster allows.

    Args:
        start: starts a node by its number.
        again: whether the job starts again, by the exit statuses of its nodes, of which one is not 0.
    """

    def __init__(self, number: int, start: Callable[[int], Script], again: Callable[[list[int]], bool]):
        self._number, self._start, self._again = number, start, again
        self.starts = 0
        self.output = ""
        self.nodes: list[Script] = []
        self.start()

    def start(self) -> None:
        """Start all nodes."""
        self.starts += 1
        self.nodes = [self._start(number) for number in range(self._number)]

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition while the nodes run."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end and all(node.poll() is None for node in self.nodes), self.outputs()
            time.sleep(0.02)

    def outputs(self) -> str:
        """What the nodes have printed since their last start."""
        return "\n".join(node.stdout for node in self.nodes)

    def end(self) -> bool:
        """Wait for the end of the job; whether all nodes succeeded."""
        while True:
            statuses = [node.wait().returncode for node in self.nodes]
            self.output = self.outputs()
            if not any(statuses) or not self._again(statuses):
                return not any(statuses)
            self.start()


def kubernetes_nodes(file: Path) -> Nodes:
    """The pods of a Job that kubectl was given."""
    job = json.loads(file.read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never" and pod["subdomain"] == name
    (container,) = pod["containers"]
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    failures = 0

    def start(index: int) -> Script:
        variables = {"JOB_COMPLETION_INDEX": str(index)}
        for entry in container["env"]:
            variables[entry["name"]] = expand(entry["value"], variables)
        command = [expand(word, variables) for word in container["command"]]
        command = [word.replace(f"{name}-0.{pod['subdomain']}", "127.0.0.1") for word in command]
        return start_node(command, container["workingDir"], variables, file.parent)

    def again(statuses: list[int]) -> bool:
        nonlocal failures
        actions = [rules.get(status) for status in statuses if status]
        failures += actions.count(None)
        return "FailJob" not in actions and failures <= spec["backoffLimit"]

    return Nodes(spec["completions"], start, again)


def expand(text: str, variables: dict[str, str]) -> str:
    """A word or value as a container gets it: `$(NAME)` is the variable, if there is one, and `$$` is `$`."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        text,
    )


def skypilot_nodes(file: Path) -> Nodes:
    """The nodes of a managed job that sky was given."""
    task = json.loads(file.read_text())["task"]
    number, recovery = task["num_nodes"], task["resources"]["job_recovery"]
    restarts = 0

    def start(rank: int) -> Script:
        nodes = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * number)}
        return start_node(["bash", "-c", task["run"]], str(file.parent), task["envs"] | nodes, file.parent)

    def again(statuses: list[int]) -> bool:
        nonlocal restarts
        restarts += not {*statuses} & {*recovery["recover_on_exit_codes"]}
        return restarts <= recovery["max_restarts_on_errors"]

    return Nodes(number, start, again)


def end_job(file: Path, succeeded: bool) -> None:
    """Let kubectl or sky say that a job has ended."""
    job = json.loads(file.read_text())
    condition = {"type": "Complete" if succeeded else "Failed", "status": "True"}
    end = (
        {"status": "SUCCEEDED" if succeeded else "FAILED"} if "task" in job else {"status": {"conditions": [condition]}}
    )
    file.write_text(json.dumps(job | end))
