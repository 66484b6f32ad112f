"""The bytes that a worker receives in collectives, counted as they are called."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class TrafficCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. It slows the caller down: for measurements, not for runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received: dict[str, int] = defaultdict(int)
        """Bytes by kind: gather, reduce_scatter, all_reduce (a ring, there and back)."""

    @property
    def total(self) -> int:
        return sum(self.received.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "_allgather_base_":
            self.received["gather"] += _bytes(args[0]) - _bytes(args[1])
        elif name == "all_gather_into_tensor":  # input, group size
            self.received["gather"] += _bytes(args[0]) * (args[1] - 1)
        elif name == "_reduce_scatter_base_":
            self.received["reduce_scatter"] += _bytes(args[1]) - _bytes(args[0])
        elif name == "reduce_scatter_tensor":  # input, operation, group size
            self.received["reduce_scatter"] += _bytes(args[0]) * (args[2] - 1) // args[2]
        elif name == "allreduce_":  # tensors, process group
            size = dist.ProcessGroup.unbox(args[1]).size()
            given = sum(map(_bytes, args[0]))
            self.received["all_reduce"] += 2 * given * (size - 1) // size


def _bytes(tensor: Any) -> int:
    assert isinstance(tensor, torch.Tensor)
    return tensor.numel() * tensor.element_size()
