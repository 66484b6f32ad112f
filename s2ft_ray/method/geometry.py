"""The coupled structures of a model, from its configuration alone: heads and channels by layer.

Invariant: a `Part` says where each head or channel lies in one weight; a weight that several
projections share is covered by their parts without overlap.

Dimensions: E experts, U units (heads or channels), K rows or columns of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from s2ft_ray.config import Projection
from s2ft_ray.method.architectures import (
    ARCHITECTURES,
    Architecture,
    FeedForward,
    Structure,
    check_supported,
)
from s2ft_ray.method.parts import SIDES, Side

CouplingKey = tuple[int, Structure]
"""(layer, structure)."""


@dataclass(frozen=True)
class Part:
    """One projection of one layer: where its units lie in a module's weight.

    Entry i of unit u is row (side "out") or column ("in") ``start + u * stride + i``.
    """

    module: str
    """The module's name in the model; for experts the parameter's."""
    side: Side
    num_units: int
    """Query heads, key/value heads, or channels of one expert."""
    unit_size: int
    """Rows or columns of one unit: head_dim, or 1 for a channel."""
    start: int
    stride: int

    def to_indices(self, units: Tensor) -> Tensor:
        """Return the rows or columns of `units`: int64 [..., U] to [..., U * unit_size]."""
        entries = torch.arange(self.unit_size)
        return (self.start + units.unsqueeze(-1) * self.stride + entries).flatten(-2)

    def to_units(self, indices: Tensor) -> Tensor:
        """Return the units that rows or columns [K] belong to, ascending; others are left out."""
        relative = indices - self.start
        mine = (relative >= 0) & (relative < self.num_units * self.stride)
        mine &= relative % self.stride < self.unit_size
        units: Tensor = torch.unique(relative[mine] // self.stride)
        return units

    def sum_units(self, values: Tensor) -> Tensor:
        """Add up one value for each row or column of the weight by unit: [..., K] to [..., U]."""
        every = self.to_indices(torch.arange(self.num_units)).to(values.device)
        by_unit = values[..., every].view(*values.shape[:-1], self.num_units, self.unit_size)
        return by_unit.sum(-1)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The heads, or the channels of one feed-forward block, of one layer."""

    layer: int
    structure: Structure
    num_units: int
    """Query heads, or channels of one expert."""
    parts: Mapping[Projection, Part]
    num_experts: int | None = None
    """None unless the projections are those of routed experts, with units of their own each."""
    norms: tuple[tuple[Projection, str], ...] = ()
    """Norms as wide as a projection, which they follow: their weights move with its rows."""

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head; 1 for channels."""
        return self.num_units // self.parts["k"].num_units if self.structure == "heads" else 1


@dataclass(frozen=True, eq=False)
class Geometry:
    """What selection needs to know of a model."""

    model_type: str
    num_layers: int
    hidden_size: int
    """Of every projection the size of the side that isn't selected from."""
    couplings: dict[CouplingKey, Coupling]
    """In the model's order."""

    @classmethod
    def of(cls, hf_config: Any) -> "Geometry":
        """Read the sizes from a Hugging Face configuration; ConfigError if it isn't supported."""
        check_supported(hf_config)
        architecture = ARCHITECTURES[hf_config.model_type]
        couplings: dict[CouplingKey, Coupling] = {}
        for layer in range(hf_config.num_hidden_layers):
            found = [_heads(architecture, hf_config, layer)]
            for block in architecture.feed_forward:
                if block.exists(hf_config, layer):
                    found.append(_channels(architecture, block, hf_config, layer))
            couplings.update({(layer, it.structure): it for it in found})
        return cls(
            hf_config.model_type, hf_config.num_hidden_layers, hf_config.hidden_size, couplings
        )

    @cached_property
    def projections(self) -> list[Projection]:
        """Which of the seven projections the model has, in their usual order."""
        return [p for p in SIDES if any(p in it.parts for it in self.couplings.values())]


def _heads(architecture: Architecture, hf_config: Any, layer: int) -> Coupling:
    num_heads = hf_config.num_attention_heads
    num_kv_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
    counts: dict[Projection, int] = {
        "q": num_heads,
        "k": num_kv_heads,
        "v": num_kv_heads,
        "o": num_heads,
    }
    prefix = f"{architecture.layers}.{layer}."
    parts = _parts(architecture.attention, prefix, counts, head_dim, architecture.interleaved)
    norms = tuple((p, prefix + path) for p, path in architecture.norms.items())
    return Coupling(layer, "heads", num_heads, parts, norms=norms)


def _channels(
    architecture: Architecture, block: FeedForward, hf_config: Any, layer: int
) -> Coupling:
    num_channels = getattr(hf_config, block.size, None) or 4 * hf_config.hidden_size
    counts = dict.fromkeys(block.projections, num_channels)
    parts = _parts(block.projections, f"{architecture.layers}.{layer}.", counts, 1, False)
    num_experts = getattr(hf_config, block.num_experts) if block.num_experts else None
    return Coupling(layer, block.structure, num_channels, parts, num_experts)


def _parts(
    paths: Mapping[Projection, str],
    prefix: str,
    counts: Mapping[Projection, int],
    unit_size: int,
    interleaved: bool,
) -> dict[Projection, Part]:
    parts: dict[Projection, Part] = {}
    for projection, path in paths.items():
        fused = [other for other in paths if paths[other] == path]
        before = fused[: fused.index(projection)]
        start, stride = sum(counts[other] for other in before) * unit_size, unit_size
        if interleaved:
            start, stride = len(before) * unit_size, len(fused) * unit_size
        parts[projection] = Part(
            prefix + path, SIDES[projection], counts[projection], unit_size, start, stride
        )
    return parts
