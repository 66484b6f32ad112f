"""A running node for every integration test: a real Ray and a real MLflow in a temporary home."""

from collections.abc import Iterator

import pytest
from nodes import Node


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that is up: `.home`, `.env` (for subprocess), `.status()`. It has 4 CPUs to hand out
    whatever the machine has, so that two workers and their driver always find room."""
    node = Node(tmp_path_factory.mktemp("node") / "home")
    try:
        started = node.s2ft("up", "--num-cpus", "4")
        assert started.returncode == 0, started.stderr
        yield node
    finally:
        ended = node.s2ft("down")
        assert ended.returncode == 0, ended.stderr
