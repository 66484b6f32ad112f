"""A running node for every integration test: a real Ray and a real MLflow in a temporary home."""

from collections.abc import Iterator

import pytest
from nodes import Node

# Runs of seconds: what waits minutes before it stops or gives up a job would wait for ever.
QUEUE = """
service: {lost_s: 15, estimate_s: 1, measure_s: 2}
policy: {near_end_s: 0, min_run_s: 0}
"""


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that is up: `.home`, `.env` (for subprocess), `.status()`. It has 4 CPUs to hand out
    whatever the machine has, so that two workers and their driver always find room."""
    node = Node(tmp_path_factory.mktemp("node") / "home")
    node.home.mkdir()
    (node.home / "scheduler.yaml").write_text(QUEUE)
    try:
        started = node.s2ft("up", "--num-cpus", "4")
        assert started.returncode == 0, started.stderr
        for tenant in ("acme", "soak", "paper"):  # once one is set, others have to be
            assert node.s2ft("tenants", "set", tenant).returncode == 0
        yield node
    finally:
        ended = node.s2ft("down")
        assert ended.returncode == 0, ended.stderr
