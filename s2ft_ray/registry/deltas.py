"""How far training has moved each module: the size of its delta, and where its parent had moved it.

Invariant: one matrix of the base is in memory at a time; the base is read from its files and
never becomes a model.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2ft_ray.method import Adapter, AdapterSlice, BaseFiles, base_entries


@dataclass(frozen=True)
class ModuleDelta:
    """One module's delta; norms are Frobenius norms."""

    module: str
    norm: float
    relative: float
    """The norm over that of the base's entries that the delta changes."""
    parent_cosine: float | None
    """Of this delta to the parent's over the entries that both have; None without a parent."""

    @property
    def values(self) -> dict[str, float]:
        """The metrics of this module, by MLflow's name of each."""
        values = {"norm": self.norm, "relative_norm": self.relative}
        if self.parent_cosine is not None:
            values["parent_cosine"] = self.parent_cosine
        return {f"delta/{self.module}/{name}": value for name, value in values.items()}


def measure_deltas(
    adapter: Adapter, base_folder: Path, parent: Adapter | None = None
) -> list[ModuleDelta]:
    """Measure every module of `adapter` against its base's files and its parent."""
    parents = {} if parent is None else parent.slices
    measured = []
    files = BaseFiles(base_folder)
    for module, part in adapter.slices.items():
        is_whole = part.delta.dim() == 3  # experts' parameters have no module of their own
        weight = files.read(module if is_whole else f"{module}.weight")
        base_norm = float(base_entries(weight, part).float().norm())
        norm = float(part.delta.norm())
        measured.append(
            ModuleDelta(
                module=module,
                norm=norm,
                relative=norm / base_norm if base_norm else math.inf,
                parent_cosine=_cosine(part, parents[module]) if module in parents else None,
            )
        )
    return measured


def _cosine(part: AdapterSlice, other: AdapterSlice) -> float:
    if part.side != other.side:
        return 0.0
    scale = float(part.delta.norm()) * float(other.delta.norm())
    pairs = zip(_each(part), _each(other), strict=True)
    return sum(_dot(*mine, *theirs) for mine, theirs in pairs) / scale if scale else 0.0


def _each(part: AdapterSlice) -> list[tuple[Tensor, Tensor]]:
    """Return indices [K] and delta with them first, of each expert or of the one weight."""
    delta = part.delta.mT if part.side == "in" else part.delta
    if part.indices.dim() == 1:
        return [(part.indices, delta)]
    return list(zip(part.indices, delta, strict=True))


def _dot(indices: Tensor, delta: Tensor, other_indices: Tensor, other: Tensor) -> float:
    mine = delta[torch.isin(indices, other_indices)].flatten()
    theirs = other[torch.isin(other_indices, indices)].flatten()
    return float(mine @ theirs)
