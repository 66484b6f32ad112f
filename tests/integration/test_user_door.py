"""What a tenant does with Ray's own commands to his job, and a job that takes what is free."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from door import run, submit, wait
from nodes import Node

# Runs of seconds, so what is free is looked at often, and a run of a minute is worth a resize.
QUEUE = """
service: {estimate_s: 1, measure_s: 2}
policy: {near_end_s: 0, min_run_s: 0, grow_after_s: 5, grow_min_left_s: 10}
"""
RESERVED_S = 180.0
"""How long Ray's coordinator may keep what a run had reserved that was ended without notice."""


@pytest.fixture(scope="module")
def two_cpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node") / "home")
    node.home.mkdir()
    (node.home / "scheduler.yaml").write_text(QUEUE)
    try:
        started = node.s2ft("up", "--num-cpus", "2")
        assert started.returncode == 0, started.stderr
        yield node
    finally:
        node.s2ft("down")


def node_id(node: Node) -> str:
    """Return the one node's id, as Ray has it."""
    program = "import ray; ray.init(log_to_driver=False); print(ray.nodes()[0]['NodeID'])"
    return run(node, sys.executable, "-c", program).split()[-1]


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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_elastic_job_grows_where_another_ends(two_cpus: Node, tmp_path: Path) -> None:
    for name in ("first", "elastic"):
        (tmp_path / name).mkdir()
    submit(two_cpus, tmp_path / "first", "first", 100_000, num_workers=1)
    first = wait(two_cpus, "first", lambda job: job["state"] == "running")
    submit(two_cpus, tmp_path / "elastic", "elastic", 2_000, num_workers=[1, 2])
    story = wait(two_cpus, "elastic", lambda job: job["state"] == "running")
    assert story["num_workers"] == 1
    assert story["placement"] == {node_id(two_cpus): 1}  # as its worker told it
    assert two_cpus.s2ft("cancel", first["id"]).returncode == 0
    story = wait(two_cpus, "elastic", lambda job: job["state"] == "succeeded")
    sizes = [it["detail"] for it in story["events"] if it["state"] == "starting"]
    assert sizes == ["1 worker(s)", "2 worker(s)"]
    run_folder = two_cpus.home / "runs" / "acme" / "elastic" / story["id"]
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == list(range(1, 2_001))  # each once, over both sizes
