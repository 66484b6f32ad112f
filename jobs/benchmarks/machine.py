"""What a benchmark ran on, and whether something else was running there."""

import os
import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what a reader needs to judge the numbers."""
    machine: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def load_warning() -> str | None:
    """Return a line where other work kept more than a quarter of the cores busy a minute ago."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 4:
        return None
    return (
        f"warning: load {load:.1f} on {cores} cores at the start: other work disturbs the times;"
        " trust minima over many rounds, or run again when the machine is idle"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
