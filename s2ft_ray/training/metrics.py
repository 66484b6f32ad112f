"""The metrics file: what rank 0 tells about the run, one JSON line at a time.

It is the buffer between training and whoever watches: training only ever appends to it, so a
tracking server that is slow or down can't hold a step up. A resumed run tells the steps after its
checkpoint again.
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path

import torch

from s2ft_ray.training.loop import StepResult

logger = logging.getLogger(__name__)
Value = float | int | str | list[dict[str, str]] | dict[str, int]


class MetricsLog:
    """Appends lines ``{"kind", "step", "time", ...}`` to one file.

    What can't be written (a full disk) is kept and written before the next line, from the byte
    on at which the disk was full; the checkpoint is what stops a run on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._pending = b"\n"  # the writer before was killed within a line

    def write(self, kind: str, step: int, **values: Value) -> None:
        """Append one line; `kind` is ``workers``, ``start``, ``train``, ``eval``, ``stop`` or
        ``end``.
        """
        line = {"kind": kind, "step": step, "time": time.time(), **values}
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            count = self._pending.count(b"\n")
            logger.warning("%s: %s; %d lines wait", self._path, error, count)

    def write_step(
        self,
        result: StepResult,
        phases: dict[str, float],
        utilisation: float,
        time_left_s: float,
    ) -> None:
        """Append what a step did, and the seconds that rank 0 spent in each phase."""
        self.write(
            "train",
            result.step,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_s=result.num_tokens / result.seconds,
            step_seconds=result.seconds,
            num_targets=result.num_targets,
            model_flop_utilisation=utilisation,
            memory_mib=_peak_memory_mib(),
            **{f"{phase}_seconds": seconds for phase, seconds in phases.items()},
            time_left_s=time_left_s,
        )


def _peak_memory_mib() -> float:
    """Peak memory of this worker: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
