"""How far training has moved each module: the size of its delta, and where its parent had moved it.

Invariant: one matrix of the base is in memory at a time; the base is read from its files and
never becomes a model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from s2ft_ray.method import Adapter, AdapterSlice


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
    files = _weight_files(base_folder)
    for module, part in adapter.slices.items():
        weight = _read_weight(base_folder, files, module)
        base_norm = float(weight.index_select(part.dim, part.indices.long()).float().norm())
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
    mine = torch.isin(part.indices, other.indices).nonzero().flatten()
    theirs = torch.isin(other.indices, part.indices).nonzero().flatten()
    a = part.delta.index_select(part.dim, mine).flatten()
    b = other.delta.index_select(other.dim, theirs).flatten()
    scale = float(part.delta.norm()) * float(other.delta.norm())
    return float(a @ b) / scale if scale else 0.0


def _weight_files(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {}
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return files


def _read_weight(folder: Path, files: dict[str, str], module: str) -> Tensor:
    name = f"{module}.weight"
    with safe_open(folder / files.get(name, "model.safetensors"), framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(name)
        return weight
