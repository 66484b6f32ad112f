"""The small values that adapters, switching and fingerprints pass each other.

Invariant: indices are ascending and count rows or columns of a weight [D, F] in the base's own
order. Dimensions: E experts, D out, F in, K selected.
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
    """int32 [K], ascending: columns (side "in") or rows (side "out") of the weight seen as
    Linear [D, F]. Of experts [E, K]: each has indices of its own."""
    delta: Tensor
    """fp32 [D, K] (side "in") or [K, F] (side "out"), with E before them for experts."""
    size: int | None = None
    """F (side "in") or D (side "out") of the whole weight; None where it was not recorded."""
    transposed: bool = False
    """Whether the base stores the weight as [F, D], as Conv1D does; the delta never is."""

    @property
    def dim(self) -> int:
        """The dimension of `delta`, and of the weight seen as Linear, that `indices` count along.

        From the front: 1 or 0, and of experts 2 or 1.
        """
        return self.delta.dim() - (1 if self.side == "in" else 2)

    @property
    def count(self) -> int:
        """K: how many rows or columns (of each expert) are changed."""
        return self.indices.shape[-1]


@dataclass(frozen=True, eq=False)
class Replaced:
    """Entries of a weight that something has replaced, as they were before."""

    dim: int
    """From the end, of the weight as it is stored: -1 columns, -2 rows."""
    indices: Tensor
    """int64 [K] along `dim`, or [E, K]; in any order."""
    values: Tensor
    """[D, K] (dim -1) or [K, F] (dim -2), in the weight's dtype; of experts with E before."""
