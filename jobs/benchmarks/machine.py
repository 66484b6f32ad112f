"""What a benchmark ran on, and whether something else was running there."""

import os
import platform
import time
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what a reader needs to judge the numbers."""
    machine: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether products of bf16 are as fast as those of fp32, at least.

    Without AVX-512 a CPU's are many times slower: no training step is worth measuring.
    """
    return device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def load_warning() -> str | None:
    """Return a line where other work kept more than a quarter of the cores busy a minute ago."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 4:
        return None
    return (
        f"warning: load {load:.1f} on {cores} cores at the start: other work disturbs the times;"
        " trust minima over many rounds, or run again when the machine is idle"
    )


class OtherWork:
    """How busy everything but this process keeps the cores, from here on."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Return the share of all cores' time so far, in steps of 10 ms; None without /proc."""
        if self._busy is None or (busy := _busy_seconds()) is None:
            return None
        others = busy - self._busy - (_own_seconds() - self._own)
        cores = os.cpu_count() or 1
        return max(0.0, others / cores / (time.perf_counter() - self._started))


def _busy_seconds() -> float | None:
    """Return the CPU seconds of the whole machine since its start, stolen ones included."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    counts = stat.read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, counts[:8])
    ticks: int = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + stolen) / ticks


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
