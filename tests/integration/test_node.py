"""`s2ft up | down | status` on a real Ray and a real MLflow."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from nodes import BIN, Node

JOB = """
import os, shutil, sys
import ray

ray.init()

@ray.remote
def look():
    return os.environ["S2FT_HOME"]

homes = os.environ["S2FT_HOME"], ray.get(look.remote())
print("job", sys.executable, shutil.which("python"), *homes)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Node]:
    """A second home, on which nothing runs yet."""
    node = Node(tmp_path / "home")
    yield node
    node.s2ft("down")


def _pids(node: Node) -> dict[str, int | None]:
    return {service["name"]: service["pid"] for service in node.status()["services"]}


def _family(pid: int | None) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _of_home(node: Node) -> list[str]:
    """Return the command lines of the processes that work in the home or belong to it."""
    found = []
    for process in psutil.process_iter():
        try:
            belongs = process.cwd() == str(node.home) or str(node.home) in process.environ().get(
                "S2FT_HOME", ""
            )
            if belongs and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_up_again_changes_nothing_and_prints_the_same(node: Node) -> None:
    record, token = (node.home / "node.json").read_bytes(), (node.home / "ray_token").read_bytes()
    first, second = node.s2ft("up"), node.s2ft("up")
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert (node.home / "node.json").read_bytes() == record
    assert (node.home / "ray_token").read_bytes() == token


def test_other_settings_of_a_running_node_are_refused(node: Node) -> None:
    refused = node.s2ft("up", "--num-cpus", "3", "--port-base", "50000")
    assert refused.returncode == 2
    assert [line.split(";")[0] for line in refused.stderr.splitlines()] == [
        f"error: --port-base 50000: the node runs with {node.status()['port_base']}",
        "error: --num-cpus 3: the node runs with 4",
    ]


def test_everything_listens_on_loopback_within_the_nodes_ports(node: Node) -> None:
    base = node.status()["port_base"]
    members = [process for pid in _pids(node).values() for process in _family(pid)]
    listening = [
        connection.laddr
        for process in members
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    ports = {address.port for address in listening}
    assert set(range(base, base + 12)) <= ports <= set(range(base, base + 500))


def test_the_token_is_the_owners_and_nobody_gets_in_without(node: Node) -> None:
    token = node.home / "ray_token"
    assert token.stat().st_mode & 0o777 == 0o600
    url = node.env["RAY_API_SERVER_ADDRESS"] + "/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(url)
    refused.value.close()
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
        assert reply.status == 200


def test_a_submitted_job_finds_python_the_home_and_ray(node: Node, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", str(tmp_path)]
    ran = subprocess.run(
        [*submit, "--", "python", "job.py"], env=node.env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("job ")]
    assert line.split()[1:] == [str(BIN / "python"), str(BIN / "python")] + [str(node.home)] * 2


def test_a_driver_of_ones_own_connects(node: Node, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    ran = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, env=node.env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == str(node.home)


def test_readers_with_and_without_the_server_see_the_same_artifact(node: Node) -> None:
    write = (
        "import mlflow; e = mlflow.create_experiment('both'); mlflow.set_experiment('both')\n"
        "with mlflow.start_run() as run: mlflow.log_text('seen', 'note.txt')\n"
        "print(run.info.run_id, run.info.artifact_uri)"
    )
    written = subprocess.run(
        [sys.executable, "-c", write], env=node.env, capture_output=True, text=True, check=True
    )
    run_id, artifact_uri = written.stdout.splitlines()[-1].split()
    assert artifact_uri.startswith((node.home / "mlartifacts").as_uri())
    read = f"import mlflow; print(mlflow.artifacts.load_text('runs:/{run_id}/note.txt'))"
    env = {**node.env, "MLFLOW_TRACKING_URI": f"sqlite:///{node.home / 'mlflow.db'}"}
    seen = subprocess.run(
        [sys.executable, "-c", read], env=env, capture_output=True, text=True, check=True
    )
    assert seen.stdout.splitlines()[-1] == "seen"


def test_a_second_home_lives_beside_the_first_and_leaves_nothing(node: Node, other: Node) -> None:
    first = _pids(node)
    assert other.s2ft("up").returncode == 0
    base = other.status()["port_base"]
    assert abs(base - node.status()["port_base"]) >= 500
    assert other.env["RAY_AUTH_TOKEN_PATH"] != node.env["RAY_AUTH_TOKEN_PATH"]

    crashed = _pids(other)
    assert crashed["ray"] is not None
    os.kill(crashed["ray"], signal.SIGKILL)
    half = other.s2ft("status")
    assert half.returncode == 1
    assert [line.split()[1] for line in half.stdout.splitlines()[1:3]] == ["down", "up"]

    completed = other.s2ft("up")
    assert completed.returncode == 0, completed.stderr
    assert _pids(other)["mlflow"] == crashed["mlflow"]
    assert other.status()["port_base"] == base

    assert other.s2ft("down").stdout == "ended: ray, mlflow, scheduler\n"
    assert other.s2ft("down").stdout == f"nothing is up in {other.home}\n"
    assert other.s2ft("status").returncode == 1
    assert _of_home(other) == []
    for port in range(base, base + 12):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    assert _pids(node) == first
    assert node.status()["state"] == "up"


def test_a_service_that_cant_start_is_told_with_its_log_and_takes_the_rest_along(
    other: Node,
) -> None:
    other.home.mkdir()
    (other.home / "mlflow.db").write_text("no database at all\n" * 100)
    failed = other.s2ft("up")
    assert failed.returncode == 1
    _, first, *tail = failed.stderr.splitlines()
    log = other.home / "logs" / "mlflow.log"
    assert first == f"error: mlflow: ended before it was ready; its log {log} ends with"
    assert any("file is not a database" in line for line in tail)
    assert _of_home(other) == []
