"""Replicas of a base that come under load and are drained under it, by `serve deploy`."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import BIN, Node
from served_node import PARTS, Load, Service, Starting, start_service

DEPLOY = Path(__file__).parents[2] / "deploy" / "serve.yaml"
ASKED = (("initech", "initech.served"), ("globex", "globex.served"))
VERSIONS = ("initech.served:1", "globex.served:1")


def deploy(node: Node, port: int, other_base: Path, max_replicas: int = 2) -> Starting:
    """Deploy as a cluster's operator does, on loopback, with a second base beside."""
    document: dict[str, Any] = yaml.safe_load(DEPLOY.read_text())
    document["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = document["applications"]
    (base,) = application["args"]["bases"]
    base |= {"max_replicas": max_replicas, "target_requests": 2}
    application["args"]["bases"].append({"model": {"name_or_path": str(other_base)}})
    application["args"] |= {
        "tracking_uri": node.env["MLFLOW_TRACKING_URI"],
        "database_url": f"sqlite:///{node.home / 'scheduler.db'}",
    }
    path = node.home / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    address = node.env["RAY_API_SERVER_ADDRESS"]
    return subprocess.run(
        [str(BIN / "serve"), "deploy", "--address", address, str(path)],
        env=node.env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("scaling")
    node = Node(folder / "home")
    node.home.mkdir()
    try:
        started = node.s2ft("up", "--num-cpus", "4")
        assert started.returncode == 0, started.stderr
        with ExitStack() as clients:
            yield start_service(node, folder, clients, deploy)
    finally:
        node.s2ft("down")


def replicas(service: Service) -> set[str]:
    """Return the replicas that hold an adapter of the base."""
    return {adapter["replica"] for adapter in service.send("/v1/adapters")["data"]}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_replicas_come_with_the_load_and_go_without_breaking_an_answer(service: Service) -> None:
    def processes() -> int:
        return len(service.processes(PARTS["a base's replica"]))

    assert processes() == 1
    with Load(service, ASKED, num_clients=8) as load:
        service.wait_until(lambda: len(replicas(service)) == 2)
        load.wait_for_more(60)
        deployed = deploy(
            service.node, int(service.url.rpartition(":")[2]), service.folder / "other-base", 1
        )
        assert deployed.returncode == 0, deployed.stderr
        service.wait_until(lambda: processes() == 1)
        load.wait_for_more(40)
    load.check(*VERSIONS)
    assert load.broken == []
