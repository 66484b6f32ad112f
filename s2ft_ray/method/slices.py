"""The trained slice of one weight: where it lives, how it gets into the weight, and when.

Invariant: the weight is frozen and holds the current values; after every optimizer step its
selected rows or columns equal the slice rounded to its dtype. `state_dict` is the plain layer's.
Nothing here writes into a parameter that FSDP has gathered: only plain tensors and local shards.

Dimensions: E experts, D out, F in, K selected, of the weight as it is stored.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from s2ft_ray.method.layout import Order
from s2ft_ray.method.parts import Side
from s2ft_ray.method.sharded import local_rows, whole, whole_all
from s2ft_ray.method.weights import Place, as_place, gather, put, stored_dim

BUCKET_BYTES = 25 * 2**20
"""Of slices that are gathered in one collective; DistributedDataParallel's default, too."""


class SliceOf(nn.Module):
    """What a module that trains a slice of a weight has, beside whatever else it is."""

    weight: Any
    """The frozen parameter [D, F], or [E, D, F] of experts."""
    slice: nn.Parameter
    """fp32, whatever the weight's dtype: [D, K] of columns or [K, F] of rows, and E before."""
    indices: Tensor
    """int64 [K] or [E, K], ascending: the columns or rows of the weight that the slice holds."""
    original: Tensor | None
    """What those columns or rows were before the weight was permuted; None where it wasn't."""
    span: range | None
    """The indices where they are a range (and the same for every expert)."""
    base_slice: Tensor
    """The same entries as they were at conversion, in the weight's dtype."""
    side: Side
    is_transposed = False
    """Whether the weight is stored as Linear's transpose; the slice is then stored so too."""

    def attach(self, side: Side, indices: Tensor, order: Order | None) -> None:
        """Freeze the weight and make the slice of it a parameter.

        `indices` [K] or [E, K] are in the original order; `order` is the weight's.
        """
        self.side = side
        weight = self.weight.requires_grad_(False)
        original = None
        if order is not None:
            indices = order.find(indices).sort(dim=-1).values
            original = order.original.take_along_dim(indices, dim=-1).to(weight.device)
        index = indices.to(weight.device, torch.int64)
        place = as_place(index)
        self.span = place if isinstance(place, range) else None
        base = gather(weight.detach(), self.dim, place)
        base = base.clone(memory_format=torch.contiguous_format)
        self.register_buffer("indices", index, persistent=False)
        self.register_buffer("original", original, persistent=False)
        self.register_buffer("base_slice", base, persistent=False)
        self.slice = nn.Parameter(base.to(torch.float32, copy=True))
        _slices[id(self)] = self

    def detach(self) -> None:
        """Put the base's entries back, bitwise, and be without a slice."""
        with torch.no_grad():
            put(self.weight, self.dim, self.place, self.base_slice.to(self.weight.dtype))
        del _slices[id(self)], self.slice, self.indices, self.original, self.base_slice
        del self.span, self.side

    @property
    def dim(self) -> int:
        """The dimension of the weight, from the end, that `indices` count along."""
        return stored_dim(self.side, self.is_transposed)

    @property
    def place(self) -> Place:
        """The range, else the indices."""
        return self.indices if self.span is None else self.span

    def write_back(self) -> None:
        """Copy the slice into the weight: ``write_back`` of this one alone."""
        write_back([self])

    @property
    def needs_whole_slice(self) -> bool:
        """Whether writing back takes the whole slice, not the rows that are here."""
        weight = self.weight
        # Where the rows that are counted are those that are sharded, any can be anywhere.
        return not isinstance(weight, DTensor) or (self.dim == -2 and weight.dim() == 2)

    def _write(self, whole_slice: Tensor | None) -> None:
        """Copy the slice into what is here of the weight; None where the rows here will do."""
        weight = self.weight
        if not isinstance(weight, DTensor):
            assert whole_slice is not None
            put(weight, self.dim, self.place, whole_slice.to(weight.dtype))
            return
        local, (start, end) = weight.to_local(), local_rows(weight)
        if whole_slice is not None:
            here = (self.indices >= start) & (self.indices < end)
            place: Place = self.indices[here] - start
            values = whole_slice[here]
        else:
            mine: Tensor = self.slice
            values = mine.to_local() if isinstance(mine, DTensor) else mine[start:end]
            place = self.place
            if weight.dim() == 3 and isinstance(place, Tensor):
                place = place[start:end]
        put(local, self.dim, place, values.to(local.dtype))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weight's selected entries into the slice: the way back from `write_back`."""
        values = gather(whole(self.weight), self.dim, self.place)
        if isinstance(self.slice, DTensor):
            start, end = local_rows(self.slice)
            self.slice.to_local().copy_(values[start:end])
        else:
            self.slice.copy_(values)

    def full_slice(self) -> Tensor:
        """Return the slice whole, fp32, as it is stored; a collective where it is sharded."""
        return whole(self.slice.detach())

    def original_indices(self) -> Tensor:
        """Return the columns or rows in the original order: int64, ascending."""
        return self.indices if self.original is None else self.original.sort(dim=-1).values

    def delta(self) -> Tensor:
        """Return the change since conversion as Linear's: fp32 [D, K] or [K, F] on the CPU.

        Its entries are as `original_indices`. A collective where the slice is sharded.
        """
        change = self.full_slice() - self.base_slice.float()
        if self.original is not None:
            change = gather(change, self.dim, self.original.argsort(dim=-1))
        return (change.T if self.is_transposed else change).cpu().contiguous()

    @torch.no_grad()
    def add_delta(self, delta: Tensor) -> None:
        """Add a change like `delta`'s to slice and weight; for slices that aren't sharded."""
        change = (delta.T if self.is_transposed else delta).to(self.slice.device)
        if self.original is not None:
            change = gather(change, self.dim, self.original.argsort(dim=-1).argsort(dim=-1))
        self.slice.data += change
        self.write_back()

    def extra_repr(self) -> str:
        about = f"side={self.side}, num_selected={self.indices.shape[-1]}"
        return ", ".join(filter(None, (super().extra_repr(), about)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _slices[id(self)] = self  # a deep copy or an unpickled layer is written back too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SliceOf":
        # model.to(bfloat16) moves the frozen weight; the slice stays fp32 and base_slice exact.
        exact = (self.slice, self.slice.grad, self.base_slice)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is kept for kept in exact):
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "slice"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "slice" in missing_keys:
            missing_keys.remove(prefix + "slice")
        if prefix + "weight" in state_dict:
            self.refresh()


@torch.no_grad()
def write_back(modules: Iterable[SliceOf]) -> None:
    """Copy each one's slice into its weight: plain tensors, or sharded by rows (Shard(0)).

    With sharded slices every rank of their mesh must call this with the same modules in the same
    order: those that are needed whole are gathered together, about BUCKET_BYTES at a time.
    """
    bucket: list[SliceOf] = []
    held = 0
    for module in modules:
        if not module.needs_whole_slice:
            module._write(None)
            continue
        bucket.append(module)
        held += module.slice.numel() * module.slice.element_size()
        if held >= BUCKET_BYTES:
            _write_whole(bucket)
            bucket, held = [], 0
    _write_whole(bucket)


def _write_whole(modules: list[SliceOf]) -> None:
    slices = whole_all([module.slice for module in modules])
    for module, whole_slice in zip(modules, slices, strict=True):
        module._write(whole_slice)


# Every slice that is alive, in the order of conversion: write-back may hold collectives, so all
# ranks must walk it alike.
_slices: weakref.WeakValueDictionary[int, SliceOf] = weakref.WeakValueDictionary()


def _write_back_stepped(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Make the weights current whose slices this optimizer holds.

    Found by the parameter that the module has now: fully_shard and .to() replace Parameters.
    A tensor's version would not do: fused AdamW doesn't raise it.
    """
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    write_back([module for module in list(_slices.values()) if id(module.slice) in stepped])


register_optimizer_step_post_hook(_write_back_stepped)
