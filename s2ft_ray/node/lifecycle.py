"""up, down, status: what a user does with one machine's node.

Invariant: each can be repeated. `up` completes what is missing and touches nothing that runs;
`down` ends what belongs to the node, whoever recorded it; `status` changes nothing.
"""

import os
import secrets
import shutil
import subprocess
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil

from s2ft_ray.errors import ConfigError, NodeError
from s2ft_ray.node import services
from s2ft_ray.node.ports import LISTENING, claim_base
from s2ft_ray.node.processes import end, find_process, find_topmost, identify
from s2ft_ray.node.record import NodeRecord, load_record, locked, save_record
from s2ft_ray.node.services import SERVICES, ServiceName, Site
from s2ft_ray.scheduler.settings import FILE, load_settings

_START_TIMEOUT_S = 120.0
"""About 10 s on two idle cores; a cold disk takes several times that."""
_PATIENCE_S = 15.0
"""Ray ends its children by itself in about 4 s."""
_ORPHAN_PATIENCE_S = 1.0
"""Ray's agents heed no SIGTERM once their raylet is gone."""
_TAIL_LINES = 15


@dataclass(frozen=True)
class ServiceStatus:
    """One service as it is now."""

    name: ServiceName
    state: Literal["up", "unresponsive", "down"]
    address: str | None
    """What a browser opens; None before the first `up`."""
    pid: int | None
    log: str


@dataclass(frozen=True)
class NodeStatus:
    """The node of one home as it is now."""

    home: str
    port_base: int | None
    services: list[ServiceStatus]
    env: dict[str, str]
    """What makes a shell a client; empty while no service runs."""

    @property
    def is_up(self) -> bool:
        """Whether every service runs and answers."""
        return all(service.state == "up" for service in self.services)

    def to_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        return {"state": "up" if self.is_up else "down", **asdict(self)}


def up(home: Path, port_base: int | None = None, num_cpus: int | None = None) -> NodeStatus:
    """Start what isn't running of the home's node, and wait until all of it answers.

    Raises ConfigError if a running node has other settings or the ports are taken, NodeError if a
    service doesn't come up; what this call started is then ended.
    """
    load_settings(home / FILE)  # told here: the scheduler itself has only its log
    with locked(home), ExitStack() as claim, ExitStack() as undo:
        record = load_record(home)
        missing = [name for name in SERVICES if _find(record, name) is None]
        if "ray" in missing and "scheduler" not in missing:
            missing.append("scheduler")  # it is a driver of the Ray that is gone
        if len(missing) < len(SERVICES):
            _check_same(record, port_base, num_cpus)
        for name in missing:  # what a dead service left behind may hold its ports
            _end_service(home, record, name)
        if len(missing) == len(SERVICES):
            base = claim.enter_context(claim_base(port_base, record.port_base))
            record = NodeRecord(port_base=base, num_cpus=num_cpus)
        site = _site(home, record)
        for name in missing:
            process = _start(site, name, record)
            record = _add(record, site, process, name)
            undo.callback(_end_service, home, record, name)
            save_record(home, record)
        _wait_healthy(site, record)
        undo.pop_all()
    return status(home)


def down(home: Path) -> list[ServiceName]:
    """End the home's node, whatever is left of it; return the services that were running."""
    if not home.is_dir():
        return []
    with locked(home):
        record = load_record(home)
        running = [name for name in SERVICES if _find(record, name) is not None]
        for name in SERVICES:
            _end_service(home, record, name)
        shutil.rmtree(services.temp_dir(home), ignore_errors=True)
        if record.processes:
            save_record(home, record.model_copy(update={"processes": {}}))
    return running


def status(home: Path) -> NodeStatus:
    """Look at the home's node."""
    record = load_record(home)
    found = [_look(home, record, name) for name in SERVICES]
    running = any(service.pid is not None for service in found)
    return NodeStatus(
        home=str(home),
        port_base=record.port_base,
        services=found,
        env=services.client_env(_site(home, record)) if running else {},
    )


def _site(home: Path, record: NodeRecord) -> Site:
    assert record.port_base is not None
    return Site(home, record.port_base)


def _find(record: NodeRecord, name: ServiceName) -> psutil.Process | None:
    known = record.processes.get(name)
    return None if known is None else find_process(known)


def _end_service(home: Path, record: NodeRecord, name: ServiceName) -> None:
    patience_s = _ORPHAN_PATIENCE_S if _find(record, name) is None else _PATIENCE_S
    mark = services.mark(home, name)
    while members := find_topmost(record.processes.get(name), mark, home):
        end(members, patience_s)
        patience_s = _ORPHAN_PATIENCE_S  # the next were being born while their parent ended


def _look(home: Path, record: NodeRecord, name: ServiceName) -> ServiceStatus:
    process = _find(record, name)
    state: Literal["up", "unresponsive", "down"] = "down"
    if process is not None:
        state = "up" if services.is_healthy(_site(home, record), name) else "unresponsive"
    return ServiceStatus(
        name=name,
        state=state,
        address=None if record.port_base is None else _site(home, record).url(name),
        pid=None if process is None else process.pid,
        log=str(services.log_path(home, name)),
    )


def _check_same(record: NodeRecord, port_base: int | None, num_cpus: int | None) -> None:
    faults = [
        f"{option} {wanted}: the node runs with {running}; `s2ft down` first"
        for option, wanted, running in (
            ("--port-base", port_base, record.port_base),
            ("--num-cpus", num_cpus, record.num_cpus or "the machine's cores"),
        )
        if wanted is not None and wanted != running
    ]
    if faults:
        raise ConfigError(*faults)


def _start(site: Site, name: ServiceName, record: NodeRecord) -> psutil.Process:
    if name == "ray":
        _make_token(site.home)
        _make_temp_dir(site.home)
        command = services.ray_command(site, record.num_cpus)
    elif name == "mlflow":
        command = services.mlflow_command(site)
    else:
        services.alive_path(site.home).unlink(missing_ok=True)  # of the one before
        command = services.scheduler_command()
    log = services.log_path(site.home, name)
    log.parent.mkdir(exist_ok=True)
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # `python -m` puts the folder on sys.path, and the caller's may be gone tomorrow
            cwd=site.home,
            env=services.service_env(site, name, os.environ),
            start_new_session=True,
        )
    return psutil.Process(child.pid)


def _add(record: NodeRecord, site: Site, process: psutil.Process, name: ServiceName) -> NodeRecord:
    return record.model_copy(
        update={
            "temp_dir": str(services.temp_dir(site.home)),
            "ports": {port.name.lower(): site.port_base + port for port in LISTENING},
            "versions": {**record.versions, name: version(services.PACKAGES[name])},
            "processes": {**record.processes, name: identify(process)},
        }
    )


def _make_token(home: Path) -> None:
    path = services.token_path(home)
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    partial.rename(path)


def _make_temp_dir(home: Path) -> None:
    folder = services.temp_dir(home)
    shutil.rmtree(folder, ignore_errors=True)  # the sessions of a node that is gone
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        raise NodeError(
            f"{folder}: is Ray's folder of this node, but belongs to another user; remove it, or"
            " set S2FT_HOME to another folder"
        ) from error


def _wait_healthy(site: Site, record: NodeRecord) -> None:
    pending = list(SERVICES)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while pending:
        for name in pending:
            if _find(record, name) is None:
                raise _failure(site.home, name, "ended before it was ready")
        pending = [name for name in pending if not services.is_healthy(site, name)]
        if pending and time.monotonic() > deadline:
            raise _failure(site.home, pending[0], f"no answer in {_START_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _failure(home: Path, name: ServiceName, reason: str) -> NodeError:
    log = services.log_path(home, name)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    faults = [f"{name}: {reason}; its log {log} ends with", *(f"  {line}" for line in tail)]
    if name == "ray":
        faults.append(f"ray: its parts log to {services.temp_dir(home)}/session_latest/logs")
    return NodeError(*faults)
