"""The time that a step's collectives take, measured where they are called.

Counted are FSDP's gathers, its reductions (those among the groups of ``hybrid`` too) and the
gathers of write-backs. On the CPU a collective blocks its caller, and the time is the caller's. On
a GPU it is what the collective's stream takes, beside which the arithmetic goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from s2ft_ray.method import gathers_called_by
from s2ft_ray.training.parallel import Layout
from s2ft_ray.training.speed import PhaseClock

T = TypeVar("T")


class CollectiveClock:
    """Adds up the time of a model's gathers and reductions; made after ``shard_model``."""

    def __init__(self, model: nn.Module, device: torch.device, layout: Layout) -> None:
        self._device = device
        self._clocks: list[PhaseClock] = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_TimedAllGather(self))
                module.set_custom_reduce_scatter(_TimedReduceScatter(self))
                if layout.sharding == "hybrid":  # called after the reduction among the groups
                    module.set_all_reduce_hook(lambda _: self.end())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from here to the end of it; what evaluations gather before is forgotten."""
        self._clocks = []
        with gathers_called_by(self.time):
            yield

    def time(self, collective: Callable[[], T]) -> T:
        """Call `collective` and count what it takes."""
        self.begin()
        work = collective()
        self.end()
        return work

    def begin(self) -> None:
        """Count from here on, if an end comes before the next beginning."""
        self._clocks.append(PhaseClock(self._device))

    def end(self) -> None:
        """Count the time since the beginning, or since the end before."""
        self._clocks[-1].lap("collective")

    def seconds(self) -> float:
        """Return what was counted last."""
        return sum(clock.seconds().get("collective", 0.0) for clock in self._clocks)


class _TimedAllGather(DefaultAllGather):
    def __init__(self, clock: CollectiveClock) -> None:
        super().__init__()
        self._clock = clock

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        call = super().__call__
        return self._clock.time(lambda: call(output_tensor, input_tensor, group, async_op))


class _TimedReduceScatter(DefaultReduceScatter):
    def __init__(self, clock: CollectiveClock) -> None:
        super().__init__()
        self._clock = clock

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        buffer = super().allocate(size, dtype=dtype, device=device)
        # The last thing before a reduction, also where groups of one worker scatter nothing.
        self._clock.begin()
        return buffer

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work:
        work = super().__call__(output_tensor, input_tensor, group, op, async_op)
        self._clock.end()
        return work
