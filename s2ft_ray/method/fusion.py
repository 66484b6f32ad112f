"""Several adapters of one base become one.

Invariant: switching the fused adapter in adds the weighted sum of the deltas, to rounding.
"""

import math
from collections.abc import Sequence

import torch

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.parts import AdapterSlice


def fuse(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Return the adapter with the union of the indices and the weighted sum of the deltas.

    `weights` are 1 / n where they aren't given. The first adapter's configuration is kept, and
    `training` names the parts. Raises AdapterError for adapters of different bases or shapes.
    """
    if not adapters:
        raise AdapterError("fuse: no adapter is given; name at least one")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise AdapterError(
            f"fuse: weights {weights} are not {len(adapters)} finite numbers, one for each adapter"
        )
    first = adapters[0]
    for other in adapters[1:]:
        if other.base.fingerprint != first.base.fingerprint:
            raise AdapterError(
                f"fuse: adapters of different bases: {first.base.name} (fingerprint"
                f" {first.base.fingerprint[:12]}) and {other.base.name} (fingerprint"
                f" {other.base.fingerprint[:12]})"
            )
    names = dict.fromkeys(name for adapter in adapters for name in adapter.slices)
    slices = {name: _fuse_module(name, adapters, weights) for name in names}
    parts = [
        {"fingerprint": adapter.fingerprint, "weight": weight}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    return Adapter(slices, first.base, first.config, {"fused": parts})


def _fuse_module(name: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> AdapterSlice:
    parts = [
        (adapter.slices[name], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter.slices
    ]
    first = parts[0][0]
    across = 1 - first.dim
    if any(
        part.side != first.side or part.delta.shape[across] != first.delta.shape[across]
        for part, _ in parts
    ):
        raise AdapterError(f"fuse: {name}: the adapters' sides or shapes differ")
    indices = torch.tensor(
        sorted({index for part, _ in parts for index in part.indices.tolist()}), dtype=torch.int32
    )
    shape = list(first.delta.shape)
    shape[first.dim] = len(indices)
    delta = torch.zeros(shape)
    for part, weight in parts:
        at = torch.searchsorted(indices, part.indices)
        delta.index_add_(first.dim, at, part.delta * weight)
    return AdapterSlice(first.side, indices, delta)
