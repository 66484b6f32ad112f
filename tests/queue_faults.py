"""What is done to a node in ``queue_soak.py``: kills, a cut, a freeze, a full disk.

Each fault is a method that does it, waits it out and says in a few words what was done; where there
is nobody to do it to, it raises MissedError.
"""

import contextlib
import os
import random
import select
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from nodes import Node
from postgresql_way import Way

PATIENCE_S = 120.0
"""How long a fault waits for somebody to kill."""


class MissedError(Exception):
    """A fault that found nobody to do it to."""


class SecondNode:
    """A second raylet on this machine."""

    def __init__(self, node: Node, num_cpus: int) -> None:
        self._node, self._num_cpus = node, num_cpus
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def replace(self) -> None:
        """End what is left of it, and let another one join the cluster; wait for it."""
        with self._changing:
            self.end()
            self._start()

    def _start(self) -> None:
        env = {**self._node.env, "RAY_raylet_start_wait_time_s": str(int(PATIENCE_S))}
        program = Path(__file__).parent / "integration" / "second_raylet.py"
        command = [sys.executable, str(program), env["RAY_ADDRESS"], str(self._num_cpus)]
        path = self._node.home / "second-node.log"
        with path.open("ab") as log:
            self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        told, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        if not told or self._process.stdout.readline() != b"up\n":
            raise AssertionError(f"the second node can't join: {path.read_text()[-2000:]}")

    def family(self) -> list[psutil.Process]:
        """Return the node's processes, without the command that started it."""
        if self._process is None or self._process.poll() is not None:
            return []
        return psutil.Process(self._process.pid).children(recursive=True)

    def end(self) -> None:
        """End what is left of it."""
        if self._process is not None:
            for member in self.family():
                _kill(member)
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]


class Faults:
    """The faults of one node, each at most once at a time; `job_ids` are the jobs that go on."""

    def __init__(
        self, node: Node, rng: random.Random, second: SecondNode | None, way: Way | None
    ) -> None:
        self._node, self._rng, self._second, self._way = node, rng, second, way
        self.job_ids: set[str] = set()
        self._faults: dict[str, Callable[[], str]] = {
            "scheduler": self._kill_scheduler,
            "driver": self._kill_driver,
            "worker": self._kill_worker,
            "raylet": self._kill_raylet,
            "database": self._cut_database,
            "mlflow": self._freeze_mlflow,
            "disk": self._fill_disk,
            "head": self._restart_head,
        }
        self._locks = {name: threading.Lock() for name in self._faults}
        self._head = threading.Lock()
        """Held while the head is away, which no node can join, and while one joins."""

    def do(self, name: str) -> str:
        """Do one by its name."""
        with self._locks[name]:
            return self._faults[name]()

    def _kill_scheduler(self) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):  # its node is being started
                pid = (self._node.home / "scheduler.alive").read_text().strip()
                for process in self._family():
                    if str(process.pid) == pid:
                        _kill(process)
                        return f"killed {pid}"
            time.sleep(0.5)
        raise MissedError("it was being started")

    def _kill_driver(self) -> str:
        # Not its shell, which is Ray's: without that the driver lives on.
        return self._kill_one(
            lambda line: (
                "python -m s2ft_ray.finetune" in line
                and not line.startswith(("/bin/sh", "sh ", "bash", "/bin/bash"))
                and any(job_id in line for job_id in tuple(self.job_ids))
            )
        )

    def _kill_worker(self) -> str:
        return self._kill_one(lambda line: "RayTrainWorker" in line)

    def _kill_one(self, wanted: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if found := [it for it in self._family() if wanted(" ".join(_cmdline(it)))]:
                victim = self._rng.choice(found)
                _kill(victim)
                return f"killed {victim.pid}"
            time.sleep(0.5)
        raise MissedError("none was there")

    def _family(self) -> list[psutil.Process]:
        pid = self._pid("ray")
        family = psutil.Process(pid).children(recursive=True) if pid else []
        return family + (self._second.family() if self._second else [])

    def _pid(self, service: str) -> int | None:
        found = [it["pid"] for it in self._node.status()["services"] if it["name"] == service]
        return found[0] if found else None

    def _kill_raylet(self) -> str:
        assert self._second is not None, "the soak needs a node of its own for a second raylet"
        raylets = [it for it in self._second.family() if _is_a(it, "raylet")]
        if not raylets:
            raise MissedError("it was being started")
        for raylet in raylets:
            _kill(raylet)
        time.sleep(self._rng.uniform(5.0, 20.0))
        with self._head:
            self._second.replace()
        return f"killed {[it.pid for it in raylets]}, and another node came"

    def _cut_database(self) -> str:
        if self._way is not None:
            self._way.cut()
            time.sleep(30.0)
            self._way.mend()
            return "no connection for 30 s"
        seconds = self._rng.uniform(5.0, 35.0)
        connection = sqlite3.connect(self._node.home / "scheduler.db", timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        connection.rollback()
        connection.close()
        return f"locked for {seconds:.0f} s"

    def _freeze_mlflow(self) -> str:
        pid = self._pid("mlflow")
        if pid is None:
            raise MissedError("none was there")
        members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in members:
            process.suspend()
        time.sleep(15)
        for process in members:
            process.resume()
        return "stopped for 15 s"

    def _fill_disk(self) -> str:
        home, ballast = self._node.home, self._node.home / "ballast"
        assert home.is_mount(), "the soak needs --small-disk to fill it"
        seconds, block = self._rng.uniform(10.0, 40.0), b"\0" * 2**20
        try:
            with ballast.open("wb", buffering=0) as file:
                while file.write(block) == len(block):
                    pass
        except OSError:
            pass  # it is full
        free = os.statvfs(home).f_bavail
        time.sleep(seconds)
        ballast.unlink()
        return f"{free} blocks free for {seconds:.0f} s"

    def _restart_head(self) -> str:
        pid = self._pid("ray")
        if pid is None:
            raise MissedError("none was there")
        with self._head:
            head = [
                it for it in psutil.Process(pid).children() if _is_a(it, "gcs_server", "raylet")
            ]
            for process in [*head, psutil.Process(pid)]:
                _kill(process)
            done = self._node.s2ft("up")
            if self._second:
                self._second.replace()
        return f"killed {len(head) + 1} processes; s2ft up: {done.returncode} {done.stderr[-300:]}"


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_a(process: psutil.Process, *names: str) -> bool:
    return Path((_cmdline(process) or [""])[0]).name in names


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
