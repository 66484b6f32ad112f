"""Identities: the sha256 that tells whether a base, or an adapter, is the one that was meant.

Invariant: a base's fingerprint is the same from files, from memory, sharded or not, in fp32 or
bf16; an adapter's depends on its slices and its base's fingerprint, and on nothing else.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from s2ft_ray.method.base_files import BaseFiles
from s2ft_ray.method.layout import Order
from s2ft_ray.method.parts import AdapterSlice, Replaced

_NUM_SAMPLES = 64


def fingerprint_base(
    parameters: Iterable[tuple[str, Tensor]],
    replaced: Mapping[str, list[Replaced]],
    orders: Mapping[str, Order],
) -> str:
    """Hash names, shapes and 64 evenly spaced values of each parameter, rounded to bf16.

    By parameter name, `replaced` tells which entries to take instead, the base's own last, and
    `orders` how the parameter is permuted.
    """
    return _hash_sorted(sorted(parameters, key=lambda item: item[0]), replaced, orders)


def _hash_sorted(
    parameters: Iterable[tuple[str, Tensor]],
    replaced: Mapping[str, list[Replaced]],
    orders: Mapping[str, Order],
) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if name in orders:
            whole = orders[name].restore(whole)
        values = _sample(whole, replaced.get(name, []))
        digest.update(f"{name} {list(whole.shape)}\n".encode())
        digest.update(_to_bytes(values.to(torch.bfloat16).view(torch.int16)))
    return digest.hexdigest()


def base_fingerprint_of_files(folder: str | Path) -> str:
    """Return the base fingerprint of a Hugging Face folder of safetensors; reads few pages.

    Equals `base_fingerprint` of the model loaded from it. Raises AdapterError where the folder
    holds no readable safetensors checkpoint.
    """
    files = BaseFiles(folder)
    return _hash_sorted(((name, files.read(name)) for name in files.names), {}, {})


def fingerprint_slices(slices: Mapping[str, AdapterSlice], base_fingerprint: str) -> str:
    """Hash the sorted (module, side, indices, delta bytes) and the base's fingerprint."""
    digest = hashlib.sha256(base_fingerprint.encode())
    for name in sorted(slices):
        part = slices[name]
        digest.update(f"\n{name} {part.side} {list(part.delta.shape)}\n".encode())
        digest.update(_to_bytes(part.indices))
        digest.update(_to_bytes(part.delta))
    return digest.hexdigest()


def _sample(whole: Tensor, replaced: list[Replaced]) -> Tensor:
    """Return the values at 64 evenly spaced places, or all of fewer, as float32 [<= 64]."""
    size, last = whole.numel(), _NUM_SAMPLES - 1
    spaced = list(range(min(size, _NUM_SAMPLES)))
    if size > _NUM_SAMPLES:
        spaced = [i * (size - 1) // last for i in range(_NUM_SAMPLES)]
    positions = torch.tensor(spaced, dtype=torch.int64, device=whole.device)
    values = whole.reshape(-1)[positions].float()
    for entry in replaced:
        at = _unravel(positions, whole.shape)
        indices = entry.indices if whole.dim() == 2 else entry.indices[at[0]]  # [K] or [64, K]
        same = indices == at[entry.dim].unsqueeze(1)  # [64, K]
        hit, at[entry.dim] = same.any(dim=1), same.int().argmax(dim=1)
        values[hit] = entry.values[tuple(axis[hit] for axis in at)].float()
    return values


def _unravel(positions: Tensor, shape: torch.Size) -> list[Tensor]:
    """Return the coordinates of flat positions, one tensor for each dimension."""
    at: list[Tensor] = []
    for size in reversed(shape):
        at.insert(0, positions % size)
        positions = positions // size
    return at


def _to_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy().data
