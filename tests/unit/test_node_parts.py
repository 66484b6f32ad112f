"""The node's parts without a node: ports, the record, processes, commands and environments."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from s2ft_ray import node
from s2ft_ray.errors import ConfigError, NodeError
from s2ft_ray.node import services
from s2ft_ray.node.ports import DEFAULT_BASES, LISTENING, SPAN, Port, claim_base, find_taken
from s2ft_ray.node.processes import MARK, end, find_process, find_topmost, identify
from s2ft_ray.node.record import NodeRecord, ProcessRecord, load_record, save_record
from s2ft_ray.node.services import Site

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def base() -> int:
    """A base that is free now, away from the default ones."""
    for candidate in range(40000, 60000, SPAN):
        if not find_taken(candidate):
            return candidate
    pytest.fail("no free port base from 40000 to 60000")


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session that carries a mark and runs in tmp_path."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True); {SLEEP}"],
        env={**os.environ, MARK: str(tmp_path / "mark")},
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()  # its environment can be read once it runs
        yield child
        child.kill()


def test_two_claims_at_the_same_moment_get_different_bases() -> None:
    with claim_base(None, None) as first, claim_base(None, None) as second:
        assert first != second
        assert {first, second} <= set(DEFAULT_BASES)


def test_the_bases_lie_below_the_ports_of_outgoing_connections_and_dont_overlap() -> None:
    assert DEFAULT_BASES[-1] + SPAN <= 32768
    assert max(Port) < SPAN == DEFAULT_BASES.step
    assert max(LISTENING) < Port.CLAIM < Port.FIRST_WORKER < Port.LAST_WORKER


def test_a_home_keeps_its_base_while_it_is_free(base: int) -> None:
    with claim_base(None, remembered=base) as claimed:
        assert claimed == base
        with claim_base(None, remembered=base) as other:
            assert other in DEFAULT_BASES


def test_a_requested_base_that_is_taken_is_refused_by_name(base: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", base + Port.MLFLOW))
        listener.listen()
        assert find_taken(base) == [base + Port.MLFLOW]
        with pytest.raises(ConfigError, match=f"--port-base {base}: port {base + Port.MLFLOW} is"):
            claim_base(base, None).__enter__()


@pytest.mark.parametrize("base", [0, 80, 65036 + 1, 70000])
def test_a_base_without_room_is_refused(base: int) -> None:
    with pytest.raises(ConfigError, match="give 1024 to 65036"):
        claim_base(base, None).__enter__()


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    assert load_record(tmp_path) == NodeRecord()
    record = NodeRecord(port_base=8600, processes={"ray": ProcessRecord(pid=3, started=1.25)})
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text('{"port_base": 86')
    with pytest.raises(NodeError, match=r"node\.json: is damaged; remove it"):
        node.status(tmp_path)


def test_a_home_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("")
    with pytest.raises(ConfigError, match=f"S2FT_HOME {home}: can't be used"):
        node.up(home)


def test_a_recycled_pid_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    record = identify(psutil.Process(sleeper.pid))
    assert find_process(record) == psutil.Process(sleeper.pid)
    assert find_process(record.model_copy(update={"started": record.started - 60})) is None


def test_a_dead_or_unreaped_process_is_not_running(sleeper: subprocess.Popen[bytes]) -> None:
    record = identify(psutil.Process(sleeper.pid))
    sleeper.send_signal(signal.SIGKILL)
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert find_process(record) is None
    sleeper.wait()
    assert find_process(record) is None


@pytest.mark.parametrize("ago_s", [60, 1e9], ids=["recycled", "rebooted"])
def test_a_stale_record_harms_nobody_who_has_its_pid_now(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], ago_s: float
) -> None:
    stale = ProcessRecord(pid=sleeper.pid, started=time.time() - ago_s)
    save_record(tmp_path, NodeRecord(port_base=8600, processes={"ray": stale}))
    assert [service.state for service in node.status(tmp_path).services] == ["down"] * 3
    assert node.down(tmp_path) == []
    assert sleeper.poll() is None


def test_a_service_is_known_by_its_mark(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    found = find_topmost(None, str(tmp_path / "mark"), tmp_path)
    assert [process.pid for process in found] == [sleeper.pid]
    assert find_topmost(None, str(tmp_path / "another"), tmp_path) == []


def test_a_service_is_known_by_its_session_and_folder_together(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    record = identify(psutil.Process(sleeper.pid))
    found = find_topmost(record, "no such mark", tmp_path)
    assert [process.pid for process in found] == [sleeper.pid]
    assert find_topmost(record, "no such mark", tmp_path / "elsewhere") == []


def test_ending_takes_the_children_along_even_if_they_heed_no_sigterm() -> None:
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); {SLEEP}"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-uc', {deaf!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = psutil.Process(parent.pid).children()
        end([psutil.Process(parent.pid)], patience_s=0.2)
        assert parent.wait(timeout=5) == -signal.SIGTERM
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_every_port_of_the_commands_is_within_the_span(tmp_path: Path) -> None:
    site = Site(tmp_path, 21000)
    options = [*services.ray_command(site, num_cpus=2), *services.mlflow_command(site)]
    named = dict(option.split("=", 1) for option in options if option.startswith("--port"))
    assert named == {"--port": str(21000 + Port.MLFLOW)}
    ports = [int(value) for key, _, value in (o.partition("=") for o in options) if "port" in key]
    assert len(ports) == len(set(ports)) == 12
    assert all(21000 <= port < 21000 + SPAN for port in ports)
    assert "--num-cpus=2" in options


def test_every_host_of_the_commands_is_loopback(tmp_path: Path) -> None:
    site = Site(tmp_path, 21000)
    options = [*services.ray_command(site, None), *services.mlflow_command(site)]
    hosts = [o for o in options if o.startswith(("--host", "--dashboard-host", "--node-ip"))]
    assert [host.partition("=")[2] for host in hosts] == ["127.0.0.1"] * 3
    assert not any(option.startswith("--num-cpus") for option in options)


def test_the_interpreters_folder_comes_first_on_the_path(tmp_path: Path) -> None:
    env = services.service_env(Site(tmp_path, 21000), "ray", {"PATH": "/usr/bin:/bin"})
    assert env["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"
    assert services.service_env(Site(tmp_path, 21000), "ray", {})["PATH"] == str(
        Path(sys.executable).parent
    )


def test_another_nodes_addresses_dont_leak_into_a_service(tmp_path: Path) -> None:
    here, there = Site(tmp_path / "here", 21000), Site(tmp_path / "there", 21500)
    shell = {**services.client_env(there), "RAY_AUTH_TOKEN": "theirs", "LANG": "C"}
    for name in services.SERVICES:
        env = services.service_env(here, name, shell)
        assert env["S2FT_HOME"] == str(tmp_path / "here")
        assert env["LANG"] == "C"
        assert "RAY_AUTH_TOKEN" not in env
        own = services.client_env(here)
        addresses = {key: env.get(key) for key in own if key.endswith(("ADDRESS", "URI"))}
        told = {"scheduler": set(addresses), "ray": {"RAY_API_SERVER_ADDRESS"}, "mlflow": set()}
        assert addresses == {k: own[k] if k in told[name] else None for k in addresses}
    ray = services.service_env(here, "ray", shell)
    assert ray["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "here" / "ray_token")
    assert ray["RAY_AUTH_MODE"] == "token"


def test_rays_sockets_stay_within_107_bytes_for_any_home() -> None:
    home = Path("/") / "/".join(["a-long-folder-name"] * 20)
    session = "session_2026-12-31_23-59-59_999999_4194304"
    socket_path = services.temp_dir(home) / session / "sockets" / "plasma_store"
    assert len(str(socket_path)) <= 107
    assert services.temp_dir(home) != services.temp_dir(home / "b")
