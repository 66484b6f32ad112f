"""Replicas of a base that come under load, are drained under it, and are replaced where stuck."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from halted_thread import find_thread, halted_alone
from nodes import BIN, Node
from served_node import OTHER, PARTS, Load, Service, Starting, start_service

from s2ft_ray.node.services import temp_dir

DEPLOY = Path(__file__).parents[2] / "deploy" / "serve.yaml"
ASKED = (("initech", "initech.served"), ("globex", "globex.served"))
VERSIONS = ("initech.served:1", "globex.served:1")


def deploy(
    node: Node, port: int, other_base: Path, max_replicas: int = 2, max_output_tokens: int = 4096
) -> Starting:
    """Deploy as a cluster's operator does, on loopback, with a second base beside.

    The number of replicas is in the section that Serve changes without starting anything anew.
    """
    document: dict[str, Any] = yaml.safe_load(DEPLOY.read_text())
    document["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = document["applications"]
    application["args"]["bases"].append({"model": {"name_or_path": str(other_base)}})
    application["args"] |= {
        "tracking_uri": node.env["MLFLOW_TRACKING_URI"],
        "database_url": f"sqlite:///{node.home / 'scheduler.db'}",
        "max_output_tokens": max_output_tokens,
    }
    scale = {"min_replicas": 1, "max_replicas": max_replicas, "target_ongoing_requests": 2}
    scale |= {"downscale_delay_s": 2, "upscale_delay_s": 2}
    application["deployments"] = [{"name": "Base-s2ft-tiny", "autoscaling_config": scale}]
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


def started_at(service: Service) -> dict[int, float]:
    """Return the processes of the base's replicas, and when each began."""
    found = service.processes(PARTS["a base's replica"])
    return {process.pid: process.create_time() for process in found}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_replicas_come_with_the_load_and_go_without_breaking_an_answer(service: Service) -> None:
    port, other = int(service.url.rpartition(":")[2]), service.folder / OTHER
    first = started_at(service)
    assert len(first) == 1
    with Load(service, ASKED, num_clients=8) as load:
        service.wait_until(lambda: len(replicas(service)) == 2)
        load.wait_for_more(60)
        assert first.items() <= started_at(service).items()

        deployed = deploy(service.node, port, other, max_replicas=1)
        assert deployed.returncode == 0, deployed.stderr
        service.wait_until(lambda: len(started_at(service)) == 1)
        load.wait_for_more(40)
        assert load.broken == []

        # Other settings: everything is started anew, one after the other.
        before = started_at(service)
        deployed = deploy(service.node, port, other, max_replicas=1, max_output_tokens=64)
        assert deployed.returncode == 0, deployed.stderr
        service.wait_until(lambda: bool(now := started_at(service)) and not now.keys() & before)
        load.wait_for_more(40)
    load.check(*VERSIONS)
    assert load.broken == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_replica_whose_engine_stands_still_is_replaced(service: Service) -> None:
    service.wait_until(lambda: len(started_at(service)) == 1)
    (pid,) = started_at(service)
    with Load(service, ASKED) as load, ExitStack() as stack:
        load.wait_for_more(10)
        engine = find_thread(pid, "_run_generation_loop")
        stack.enter_context(halted_alone(engine, lambda: bool(replicas(service))))
        service.wait_until(lambda: pid not in started_at(service))
        load.wait_for_more(20)
    load.check(*VERSIONS)
    load.check_broken(*VERSIONS)
    logs = temp_dir(service.node.home) / "session_latest" / "logs" / "serve"
    told = "".join(path.read_text(errors="replace") for path in logs.glob("*.log"))
    assert "the engine has made no step for" in told
