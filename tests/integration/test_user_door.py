"""What a tenant does with Ray's own commands to his job."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from door import run, submit, wait
from nodes import Node

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
