"""A weight that slices are taken of: a Linear's, a Conv1D's, or one parameter of fused experts.

Invariant: indices count rows ("out") or columns ("in") of the weight seen as Linear [D, F], and
as [E, D, F] for experts; `view` shows it so, whatever way the module stores it.

Dimensions: E experts, D out, F in, K selected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft_ray.method.parts import AdapterSlice, Side

Place = Tensor | range
"""Rows or columns: int64 [K], of [E, D, F] also [E, K]; or a range of them."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter and the module that holds it."""

    module: nn.Module
    parameter_name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the module has now: .to() and fully_shard replace it."""
        parameter: nn.Parameter = getattr(self.module, self.parameter_name)
        return parameter

    @property
    def is_transposed(self) -> bool:
        """Whether it is stored as [F, D]: Hugging Face's Conv1D."""
        return type(self.module).__name__ in ("Conv1D", "S2FTConv1D")

    def view(self) -> Tensor:
        """Return it as [D, F] or [E, D, F], sharing memory, without gradient."""
        detached = self.parameter.detach()
        return detached.T if self.is_transposed else detached


def find_weight(model: nn.Module, name: str) -> Weight | None:
    """Return the weight that an adapter calls `name`; None where the model has none.

    It is a module's name, or the name of a 3-D parameter for experts.
    """
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        try:
            holder = model.get_submodule(parent)
        except AttributeError:
            return None
        experts = holder._parameters.get(leaf)
        return None if experts is None or experts.dim() != 3 else Weight(holder, leaf)
    return None if module._parameters.get("weight") is None else Weight(module, "weight")


def stored_dim(side: Side, is_transposed: bool) -> int:
    """Return the dimension, from the end, of the stored weight that indices count along."""
    return -1 if (side == "in") != is_transposed else -2


def as_place(indices: Tensor) -> Place:
    """Return [K] or [E, K] as a range where it is one (and the same for every expert)."""
    rows = indices.reshape(-1, indices.shape[-1])
    first, count = int(rows[0, 0]), rows.shape[1]
    span = torch.arange(first, first + count, device=rows.device)
    return range(first, first + count) if bool((rows == span).all()) else indices


def gather(weight: Tensor, dim: int, indices: Place) -> Tensor:
    """Return the rows (dim -2) or columns (dim -1) at `indices`; of a range it is a view."""
    if isinstance(indices, range):
        return weight.narrow(dim, indices.start, len(indices))
    if indices.dim() == 1 and not _is_spread_faster(weight, dim):
        return weight.index_select(dim, indices)
    return weight.gather(dim, _spread(weight, dim, indices))


def put(weight: Tensor, dim: int, indices: Place, values: Tensor) -> None:
    """Write what `gather` would read, in place."""
    if isinstance(indices, range):
        weight.narrow(dim, indices.start, len(indices)).copy_(values)
    elif indices.dim() == 1 and not _is_spread_faster(weight, dim):
        weight.index_copy_(dim, indices, values)
    else:
        weight.scatter_(dim, _spread(weight, dim, indices), values)


def base_entries(weight: Tensor, part: AdapterSlice) -> Tensor:
    """Return what a delta is added to: the entries of a base's stored weight, in delta's shape."""
    linear = weight.T if part.transposed else weight
    return gather(linear, -1 if part.side == "in" else -2, part.indices.long())


def _is_spread_faster(weight: Tensor, dim: int) -> bool:
    """Of columns on a CPU: index_select runs on one core, index_copy_ takes half as long again."""
    return dim == -1 and weight.device.type == "cpu"


def _spread(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Repeat [K] of columns, or [E, K] of [E, D, F], over the dimensions not counted along."""
    shape = list(weight.shape)
    shape[dim] = indices.shape[-1]
    by_expert = indices.dim() > 1
    return (indices.unsqueeze(-3 - dim) if by_expert else indices).expand(shape)
