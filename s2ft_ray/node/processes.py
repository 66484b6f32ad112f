"""Who is who among this machine's processes: alive, marked as ours, ended.

Invariant: only what descends from a recorded process, shares its session and folder, or carries
this node's mark in its environment, is ever signalled.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from s2ft_ray.errors import NodeError
from s2ft_ray.node.record import ProcessRecord

MARK = "S2FT_SERVICE"
"""The variable that names the service (folder of the node, name) to which a process belongs."""
_CLOCK_STEP_S = 2.0
"""psutil adds the boot time to a start in ticks; a clock that is set moves it a little."""


def identify(process: psutil.Process) -> ProcessRecord:
    """Record a process that was just started."""
    return ProcessRecord(pid=process.pid, started=process.create_time())


def find_process(record: ProcessRecord) -> psutil.Process | None:
    """Return the recorded process if it still runs; a recycled pid is not it."""
    try:
        process = psutil.Process(record.pid)
        return process if _is(process, record) and _runs(process) else None
    except psutil.NoSuchProcess:
        return None


def find_topmost(recorded: ProcessRecord | None, mark: str, home: Path) -> list[psutil.Process]:
    """Return the topmost processes of a service, also of one that died and left some behind.

    They carry its mark. Ray's agents rewrite their title, and lose their environment with it; what
    tells them is the session of the recorded process, together with the folder it was started in.
    """
    session = None if recorded is None else _session(recorded)
    members = {}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _belongs(process, mark, session, home):
                members[process.pid] = process
        except (psutil.Error, ProcessLookupError, PermissionError):  # gone, or another user's
            continue
    return [process for process in members.values() if not _has_parent_in(process, members)]


def end(roots: list[psutil.Process], patience_s: float) -> None:
    """End `roots` and all that descends from them: SIGTERM to the roots, SIGKILL to the rest.

    The roots get the time to end their children themselves. Raises NodeError if one survives.
    """
    members = {process.pid: process for root in roots for process in _family(root)}
    members.pop(os.getpid(), None)
    for root in roots:
        _signal(root, kill=False)
    rest = _wait_gone(list(members.values()), patience_s)
    for process in rest:
        _signal(process, kill=True)
    rest = _wait_gone(rest, 5.0)
    if rest:
        listed = ", ".join(str(process.pid) for process in rest)
        raise NodeError(f"process {listed} doesn't end, even by SIGKILL; look at its state with ps")


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [root]


def _is(process: psutil.Process, record: ProcessRecord) -> bool:
    return abs(process.create_time() - record.started) < _CLOCK_STEP_S


def _session(record: ProcessRecord) -> int | None:
    # a pid isn't given out again while its session lives; after a reboot, or once another process
    # has it, the number means nothing
    if record.started < psutil.boot_time():
        return None
    try:
        return record.pid if _is(psutil.Process(record.pid), record) else None
    except psutil.NoSuchProcess:
        return record.pid


def _belongs(process: psutil.Process, mark: str, session: int | None, home: Path) -> bool:
    if not _runs(process):
        return False
    if process.environ().get(MARK) == mark:
        return True
    return os.getsid(process.pid) == session and Path(process.cwd()) == home.resolve()


def _has_parent_in(process: psutil.Process, members: Mapping[int, psutil.Process]) -> bool:
    try:
        return any(parent.pid in members for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        return


def _runs(process: psutil.Process) -> bool:
    # a zombie is dead: in a container without an init nobody ever reaps it
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while (rest := [process for process in processes if _runs(process)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    return rest
