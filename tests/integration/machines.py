"""Machines in a network of their own, as network namespaces: what one says the other must reach.

Nothing of it is reached over loopback: each has an address, and its host name, as on many a
Linux, stands for 127.0.0.1.
"""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from nodes import BIN

RAY_FOLDER = Path("/tmp/ray")


def can_be_made() -> bool:
    """Whether this process may make network namespaces and links between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"s2ft-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if not made:
        return False
    link = ["ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    linked = subprocess.run(link, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=True)
    return linked


class Machines:
    """Two machines, of addresses 10.77.0.1 and 10.77.0.2, joined by a link."""

    def __init__(self, folder: Path) -> None:
        """`folder` is what both mount; logs are written there."""
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._prefix = f"s2ft-{uuid.uuid4().hex[:6]}"
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        theirs = ("RAY_", "MLFLOW_", "S2FT_", "GLOO_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
        self.env = {
            **env,
            "PATH": f"{BIN}{os.pathsep}{env['PATH']}",
            "S2FT_HOME": str(folder / "home"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        (folder / "token").write_text(uuid.uuid4().hex)

    def __enter__(self) -> Self:
        names = [f"{self._prefix}-{number}" for number in (0, 1)]
        RAY_FOLDER.mkdir(exist_ok=True)
        for number in (0, 1):
            self._disk(number).mkdir()
        with ExitStack() as stack:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
            _ip("-n", names[0], "link", "add", "eth0", "type", "veth",
                "peer", "name", "eth0", "netns", names[1])  # fmt: skip
            for name, address in zip(names, self.addresses, strict=True):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
            for name, other in zip(names, reversed(self.addresses), strict=True):
                _ip("-n", name, "route", "add", "default", "via", other)
            stack.callback(self._end_processes, names)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, number: int, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell on a machine and wait for it."""
        return subprocess.run(
            self._enter(number, command),
            env=self.env | more,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def start(self, number: int, command: str, log: str, **more: str) -> subprocess.Popen[bytes]:
        """Start a line of shell on a machine."""
        with (self._folder / log).open("w") as file:
            process = subprocess.Popen(
                self._enter(number, command), env=self.env | more, stdout=file, stderr=file
            )
        self._started.append(process)
        return process

    def cut_power(self, number: int) -> None:
        """End every process of a machine by SIGKILL; what it had in /tmp is gone, too."""
        _kill_all(f"{self._prefix}-{number}")
        shutil.rmtree(self._disk(number))
        self._disk(number).mkdir()

    def _enter(self, number: int, command: str) -> list[str]:
        line = f"mount --bind {self._disk(number)} {RAY_FOLDER} && {command}"
        return ["ip", "netns", "exec", f"{self._prefix}-{number}", "bash", "-c", line]

    def _disk(self, number: int) -> Path:
        """Where a machine has what is Ray's own, which no other sees."""
        return self._folder / f"disk-{number}"

    def _end_processes(self, names: list[str]) -> None:
        for name in names:
            _kill_all(name)
        for process in self._started:
            process.wait(60)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdout=sys.stderr)


def _kill_all(name: str) -> None:
    while True:
        found = subprocess.run(
            ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
        ).stdout.split()
        if not found:
            return
        for pid in found:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
