"""Where a step's time goes, how much of the device's arithmetic it uses, and a trace of it.

Phases: data (rows to tensors), forward, backward, clip, optimizer, write_back, agree (the sums
over workers), checkpoint (what saving holds the loop up). Communication lies across them: what
the gathers and reductions take within forward, backward and write_back (see ``collectives``), and
agree; on a GPU, where they run beside the arithmetic, their own time.
"""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

LARGE_S, MAX_WIDTH = 0.01, 4096
FIRST_PROFILED, LAST_PROFILED = 2, 4
"""Steps of this start that are traced; the first warms up."""


class PhaseClock:
    """Adds up the time between laps, by phase; on a GPU by events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under `phase`."""
        self._laps.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the time of each phase; on a GPU after everything has been waited for."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (_, before), (phase, now) in zip(self._laps, self._laps[1:], strict=False):
            total[phase] += before.elapsed_time(now) / 1000 if self._on_gpu else now - before
        return dict(total)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def flops_per_token(model: nn.Module) -> float:
    """Return the FLOPs of a token in forward and backward.

    Two for each weight in forward, two for the gradient of its input, two more for each trained
    value; of the embeddings only the output's. Attention's own products are left out.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    is_tied = output is not None and output.weight is embedding.weight
    used = frozen - (0 if is_tied else embedding.weight.numel())
    return 4.0 * used + 2.0 * trained


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matmul on `device`: what utilisation is a share of.

    Its width doubles until it takes LARGE_S: a CPU without bf16 takes seconds where a GPU takes
    microseconds.
    """
    width = 256
    while (seconds := _time_matmul(width, device, dtype)) < LARGE_S and width < MAX_WIDTH:
        width *= 2
    return 2.0 * width**3 / seconds


def _time_matmul(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of the fastest of four, of which the first is for the caches."""
    a = torch.ones(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        clock = PhaseClock(device)
        a @ a
        clock.lap("matmul")
        best = min(best, clock.seconds()["matmul"])
    return best


class RunSpeed:
    """Adds up what the steps of this start took: this worker's own time."""

    def __init__(self, model: nn.Module, device: torch.device, world_size: int) -> None:
        self._flops_per_token = flops_per_token(model)
        self._peak = measure_peak(device, next(model.parameters()).dtype)
        self._world_size = world_size
        self._phases: dict[str, float] = defaultdict(float)
        self._communication = 0.0
        self._tokens = 0

    def add(self, num_tokens: int, phases: dict[str, float], communication: float) -> float:
        """Count a step; return the share of the workers' peak that it used."""
        for phase, seconds in phases.items():
            self._phases[phase] += seconds
        self._tokens += num_tokens
        self._communication += communication
        return self._utilisation(num_tokens / sum(phases.values()))

    def hold_up(self, seconds: float) -> None:
        """Count what a checkpoint has held the loop up after the last step."""
        self._phases["checkpoint"] += seconds

    def summary(self) -> dict[str, float]:
        """Return tokens/s over all workers, the utilisation, and shares of the time."""
        seconds = sum(self._phases.values())
        if not seconds:
            return {}
        tokens_per_s = self._tokens / seconds
        return {
            "mean_tokens_per_s": tokens_per_s,
            "mean_model_flop_utilisation": self._utilisation(tokens_per_s),
            "communication": self._communication / seconds,
            **{f"{name}_share": spent / seconds for name, spent in self._phases.items()},
        }

    def _utilisation(self, tokens_per_s: float) -> float:
        return tokens_per_s * self._flops_per_token / self._peak / self._world_size


class StepProfiler:
    """Traces a few steps into ``<folder>/rank<R>.json``, for chrome://tracing or Perfetto."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank{rank}.json"
        self._step = 0
        self._profiler: torch.profiler.profile | None = None

    def begin_step(self) -> None:
        """Start the trace before the first step that belongs to it, end it after the last."""
        self._step += 1
        if self._step == FIRST_PROFILED:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        elif self._step == LAST_PROFILED + 1:
            self.end()

    def end(self) -> None:
        """Write the trace, where there is one that isn't written."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
