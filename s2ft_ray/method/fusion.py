"""Several adapters of one base become one.

Invariant: switching the fused adapter in adds the weighted sum of the deltas: to rounding where
several change an entry, exactly where one alone does.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    return Adapter(slices, first.base, first.config, _describe(adapters, weights))


def _describe(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Any]:
    """Name the parts; how prompts are rendered stays where all were trained alike."""
    parts = [
        {"fingerprint": adapter.fingerprint, "weight": weight}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    renderings = [
        {key: adapter.training.get("data", {}).get(key) for key in ("format", "chat_template")}
        for adapter in adapters
    ]
    is_one = all(rendering == renderings[0] for rendering in renderings)
    known = is_one and any(renderings[0].values())
    return {"fused": parts, **({"data": renderings[0]} if known else {})}


def _fuse_module(name: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> AdapterSlice:
    parts = [
        (adapter.slices[name], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter.slices
    ]
    first = parts[0][0]
    if any(_shape(part) != _shape(first) for part, _ in parts):
        raise AdapterError(f"fuse: {name}: the adapters' sides or shapes differ")
    indices = _unite([part.indices for part, _ in parts])
    shape = list(first.delta.shape)
    shape[first.dim] = indices.shape[-1]
    delta = torch.zeros(shape)
    for part, weight in parts:
        at = torch.searchsorted(indices, part.indices.contiguous())
        if first.indices.dim() == 1:
            delta.index_add_(part.dim, at, part.delta * weight)
        else:
            spread = at.unsqueeze(1 if part.side == "in" else 2).expand_as(part.delta)
            delta.scatter_add_(part.dim, spread, part.delta * weight)
    size = next((part.size for part, _ in parts if part.size is not None), None)
    return AdapterSlice(first.side, indices, delta, size, first.transposed)


def _shape(part: AdapterSlice) -> tuple[Any, ...]:
    """Return what adapters of one weight have in common."""
    shape = list(part.delta.shape)
    shape[part.dim] = 0
    return part.side, part.transposed, *shape


def _unite(indices: Sequence[Tensor]) -> Tensor:
    """Return the ascending union: int32 [K], or [E, K].

    Experts have as many each: who has fewer gets others' indices, whose delta stays 0.
    """
    together = torch.cat(list(indices), dim=-1)
    if together.dim() == 1:
        union: Tensor = torch.unique(together)
        return union
    own = [torch.unique(row) for row in together]
    count = max(map(len, own))
    others = torch.unique(together)
    spare = [others[~torch.isin(others, row)] for row in own]
    rows = [
        torch.cat([row, more[: count - len(row)]]) for row, more in zip(own, spare, strict=True)
    ]
    return torch.stack(rows).sort(dim=-1).values
