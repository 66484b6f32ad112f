"""A Ray cluster of several raylets on this machine, in a process of its own.

It has a head without CPUs, and nodes of one CPU each that can be added, killed and drained. Run as
a program it takes such commands as lines of JSON and answers each with one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self, TextIO

import ray
from nodes import BIN
from ray._private.state import state as ray_state
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2


class Raylets:
    """The cluster, as a test handles it."""

    def __init__(self, folder: Path) -> None:
        theirs = ("RAY_", "MLFLOW_", "S2FT_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
        env |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{env['PATH']}"}
        # Its sockets' paths are limited to 107 bytes.
        self._ray = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        with (folder / "raylets.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, self._ray.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self.env = {**env, "RAY_ADDRESS": self._ask("address"), "S2FT_HOME": str(folder / "home")}

    def add(self) -> str:
        """Start a node; return its id."""
        return self._ask("add")

    def kill(self, node_id: str) -> None:
        """End a node's raylet and all of its workers by SIGKILL."""
        self._ask("kill", node_id)

    def drain(self, node_id: str, seconds: int) -> None:
        """Announce that the node will be taken away, as a spot market does."""
        self._ask("drain", node_id, seconds)

    def workers(self) -> dict[str, int]:
        """Return how many training workers each node has, where it has any."""
        return self._ask("workers")

    def _ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()  # type: ignore[union-attr]
        self._ray.cleanup()


def _serve(folder: Path, answers: TextIO) -> None:
    cluster = Cluster(shutdown_at_exit=False)
    cluster.add_node(num_cpus=0, include_dashboard=False, temp_dir=str(folder))
    nodes: dict[str, Any] = {}
    try:
        ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer: Any = None
            if name == "address":
                answer = cluster.address
            elif name == "add":
                node = cluster.add_node(num_cpus=1)
                nodes[node.node_id] = node
                answer = node.node_id
            elif name == "kill":
                cluster.remove_node(nodes.pop(arguments[0]), allow_graceful=False)
            elif name == "drain":
                _drain(cluster.address, *arguments)
            elif name == "workers":
                answer = _count_workers()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        ray.shutdown()
        for node in [*nodes.values(), cluster.head_node]:
            cluster.remove_node(node, allow_graceful=False)


def _drain(address: str, node_id: str, seconds: int) -> None:
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "a test", deadline_ms)
    assert accepted, why


def _count_workers() -> dict[str, int]:
    actors = ray_state.actor_table(None).values()
    alive = [actor for actor in actors if actor["State"] == "ALIVE"]
    found = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "RayTrainWorker"]
    return {node_id: found.count(node_id) for node_id in found}


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # Ray prints too
        _serve(Path(sys.argv[1]), answers)
