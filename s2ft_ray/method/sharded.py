"""Tensors that FSDP has sharded by rows: whole ones, and which rows are here.

What is sharded lies as torch.chunk cuts it: equal parts, the last ones shorter or empty.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Caller = Callable[[Callable[[], object]], object]
_call_gather: ContextVar[Caller] = ContextVar("call_gather", default=lambda gather: gather())


@contextmanager
def gathers_called_by(caller: Caller) -> Iterator[None]:
    """Let `caller` call the gathers of ``whole_all`` inside: to measure what they take."""
    token = _call_gather.set(caller)
    try:
        yield
    finally:
        _call_gather.reset(token)


def whole(tensor: Tensor) -> Tensor:
    """Return it whole; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """Return the range of rows of `tensor` that this rank holds; empty where it has none."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[0], offset[0] + shape[0]


def whole_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each as `whole` does, with one collective for all that are sharded alike.

    Every rank of their mesh must call this with the same tensors in the same order. What a
    collective costs beside its bytes is about a millisecond among processes on CPUs.
    """
    groups: dict[tuple[DeviceMesh, int, torch.dtype], list[int]] = defaultdict(list)
    results = list(tensors)
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            (dim,) = (dim for dim, place in enumerate(tensor.placements) if place.is_shard())
            groups[tensor.device_mesh, dim, tensor.dtype].append(index)
    for (mesh, dim, _), members in groups.items():
        sharded = [tensor for index in members if isinstance(tensor := tensors[index], DTensor)]
        for index, result in zip(members, _gather(sharded, mesh, dim), strict=True):
            results[index] = result
    return results


def _gather(tensors: list[DTensor], mesh: DeviceMesh, dim: int) -> list[Tensor]:
    size = mesh.size(dim)
    shapes = [(-(-tensor.shape[0] // size), *tensor.shape[1:]) for tensor in tensors]
    parts = [_padded(t.to_local(), shape) for t, shape in zip(tensors, shapes, strict=True)]
    mine = torch.cat(parts)
    gathered = mine.new_empty(size * mine.numel())
    group = mesh.get_group(dim)
    _call_gather.get()(lambda: dist.all_gather_single(gathered, mine, group=group))
    columns = torch.split(gathered.view(size, -1), [part.numel() for part in parts], dim=1)
    return [
        column.reshape(size * shape[0], *shape[1:])[: tensor.shape[0]]
        for column, shape, tensor in zip(columns, shapes, tensors, strict=True)
    ]


def _padded(local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the entries of `local` flat, with as many behind them as `shape` has rows more."""
    if local.shape == shape:
        return local.reshape(-1)
    padded = local.new_zeros(shape)
    padded[: local.shape[0]] = local
    return padded.reshape(-1)
