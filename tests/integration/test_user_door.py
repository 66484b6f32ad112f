"""What a tenant does with Ray's own commands to a job that he submitted by them."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import Node

REPO = Path(__file__).parents[2]
PATIENCE_S = 300.0
RESERVED_S = 180.0
"""How long Ray's coordinator may keep what a run had reserved that was ended without notice."""


@pytest.fixture(scope="module")
def two_cpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node") / "home")
    node.home.mkdir()
    try:
        started = node.s2ft("up", "--num-cpus", "2")
        assert started.returncode == 0, started.stderr
        yield node
    finally:
        node.s2ft("down")


def submit(node: Node, folder: Path, name: str, max_steps: int, *options: str) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "One is", "completion": " odd"}) + "\n") * 64)
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": name,
        "data": {"train": str(rows)},
        "optim": {"max_steps": max_steps, "global_batch_size": 8, "micro_batch_size": 4},
        "parallel": {"num_workers": 2},
        "evaluation": {"every_steps": max_steps, "num_samples": 0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    command = ["ray", "job", "submit", "--no-wait", "--submission-id", name, *options]
    command += ["--working-dir", str(REPO), "--", "python", "jobs/finetune.py"]
    run(node, *command, "--config", str(folder / "run.yaml"))


def run(node: Node, *command: str) -> None:
    done = subprocess.run(command, env=node.env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


def wait(node: Node, name: str, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a job is as wanted; return its story."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        jobs = json.loads(node.s2ft("jobs", "--json").stdout)
        for job in (it for it in jobs if it["name"] == name):
            story: dict[str, Any] = json.loads(node.s2ft("job", job["id"], "--json").stdout)
            if is_there(story):
                return story
        time.sleep(1.0)
    raise AssertionError(f"{name} is not as wanted within {PATIENCE_S:.0f} s")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_that_ray_stops_has_its_workers_again_at_once(two_cpus: Node, tmp_path: Path) -> None:
    submit(two_cpus, tmp_path, "stopped", 100_000)
    wait(two_cpus, "stopped", lambda job: job["state"] == "running")
    run(two_cpus, "ray", "job", "stop", "stopped")
    stopped = time.monotonic()
    story = wait(two_cpus, "stopped", lambda job: (job["state"], job["attempt"]) == ("running", 2))
    assert time.monotonic() - stopped < RESERVED_S - 30
    assert [it["cause"] for it in story["events"] if it["attempt"] == 2] == [
        "admitted",
        "first step",
    ]
    assert two_cpus.s2ft("cancel", story["id"]).returncode == 0
    wait(two_cpus, "stopped", lambda job: job["state"] == "cancelled")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_cpus_that_a_driver_asks_for_are_counted(two_cpus: Node, tmp_path: Path) -> None:
    submit(two_cpus, tmp_path, "greedy", 5, "--entrypoint-num-cpus", "1")
    story = wait(two_cpus, "greedy", lambda job: job["attempt"] == 0 and bool(job["reason"]))
    assert "needs 2 x (1 CPU), more than the cluster" in story["reason"]
    run(two_cpus, "ray", "job", "stop", "greedy")  # who waits and is stopped takes its job along
    wait(two_cpus, "greedy", lambda job: job["state"] == "cancelled")
