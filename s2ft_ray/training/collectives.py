"""The time that FSDP's collectives take, measured where they are called.

On the CPU a collective blocks its caller, and the time is the caller's. On a GPU it is what the
collective's stream takes, beside which the arithmetic goes on.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from s2ft_ray.training.speed import PhaseClock

T = TypeVar("T")


class CollectiveClock:
    """Adds up the time of a model's gathers and reductions; made after ``shard_model``."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._clocks: list[PhaseClock] = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_TimedAllGather(self))
                module.set_custom_reduce_scatter(_TimedReduceScatter(self))

    def time(self, collective: Callable[[], T]) -> T:
        """Call `collective` and count what it takes."""
        clock = PhaseClock(self._device)
        work = collective()
        clock.lap("collective")
        self._clocks.append(clock)
        return work

    def take(self) -> float:
        """Return the seconds since this was last asked."""
        clocks, self._clocks = self._clocks, []
        return sum(clock.seconds()["collective"] for clock in clocks)


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

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work:
        call = super().__call__
        return self._clock.time(lambda: call(output_tensor, input_tensor, group, op, async_op))
