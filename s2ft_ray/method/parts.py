"""The small values that adapters, switching and fingerprints pass each other.

Invariant: indices are ascending and count rows or columns of a weight [D, F] in the base's own
order. Dimensions: D out, F in, K selected.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from s2ft_ray.config import Projection

Side = Literal["in", "out"]
"""What a slice takes of a weight [D, F]: columns ("in": o, down) or rows ("out": the others)."""

SIDES: dict[Projection, Side] = {
    "q": "out",
    "k": "out",
    "v": "out",
    "o": "in",
    "up": "out",
    "gate": "out",
    "down": "in",
}


@dataclass(frozen=True)
class BaseInfo:
    """The base model that an adapter belongs to."""

    name: str | None
    """As it was loaded: a name on the hub, a folder, or ``s2ft://...``."""
    revision: str | None
    fingerprint: str


@dataclass(frozen=True, eq=False)
class AdapterSlice:
    """What changes in one module's weight."""

    side: Side
    indices: Tensor
    """int32 [K], ascending: columns (side "in") or rows (side "out") of the weight."""
    delta: Tensor
    """fp32 [D, K] (side "in") or [K, F] (side "out")."""

    @property
    def dim(self) -> int:
        """The dimension of the weight that `indices` count along."""
        return 1 if self.side == "in" else 0


@dataclass(frozen=True, eq=False)
class Replaced:
    """Entries of a weight that something has replaced, as they were before."""

    dim: int
    indices: Tensor
    """int64 [K] along `dim`."""
    values: Tensor
    """[D, K] (dim 1) or [K, F] (dim 0), in the weight's dtype."""
