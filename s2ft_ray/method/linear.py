"""The converted layer: one matmul forward, a full dX and a thin dW backward, and its write-back.

Invariant: `weight` is frozen and holds the current values; after every optimizer step its
selected rows or columns equal `slice` rounded to its dtype. `state_dict` is the plain layer's.
Nothing here writes into a parameter that FSDP has gathered: only plain tensors and local shards.

Dimensions: D out, F in, K selected, N tokens. weight: [D, F]; side "in": slice [D, K] holds
columns; side "out": slice [K, F] holds rows.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from s2ft_ray.method.parts import Side


class _SliceLinear(torch.autograd.Function):
    """F.linear whose only parameter gradient is the slice's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slice_: Tensor,
        indices: Tensor,
        side: Side,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # index_select copies: a view of x would pin the whole activation until backward.
        kept = x.index_select(-1, indices).to(y.dtype) if side == "in" else x
        ctx.side, ctx.slice_dtype = side, slice_.dtype
        ctx.save_for_backward(kept, weight, indices)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, indices = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])  # [N, D]
        kept = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)  # [N, K] or [N, F]
        if ctx.side == "out":
            rows = rows.index_select(1, indices)  # [N, K]
        grad_slice = (rows.T @ kept).to(ctx.slice_dtype)
        return grad_x, None, None, grad_slice, None, None


class S2FTLinear(nn.Linear):
    """A Linear of which `slice` alone is trained."""

    slice: nn.Parameter
    """fp32, whatever the weight's dtype: [D, K] (side "in") or [K, F] (side "out")."""
    indices: Tensor
    """int64 [K], ascending: the columns or rows of the weight that the slice holds."""
    base_slice: Tensor
    """The same entries as they were at conversion, in the weight's dtype."""
    side: Side
    _plain_class: type[nn.Linear]

    @classmethod
    def take_over(cls, linear: nn.Linear, side: Side, indices: Iterable[int]) -> "S2FTLinear":
        """Turn `linear` itself into an S2FTLinear: its hooks and every reference to it stay."""
        plain_class = type(linear)
        linear.__class__ = cls
        layer = cast(S2FTLinear, linear)
        layer._plain_class, layer.side = plain_class, side
        weight = layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        index = torch.tensor(list(indices), dtype=torch.int64, device=weight.device)
        base = weight.detach().index_select(layer.dim, index)
        layer.register_buffer("indices", index, persistent=False)
        layer.register_buffer("base_slice", base, persistent=False)
        layer.slice = nn.Parameter(base.to(torch.float32, copy=True))
        _layers[id(layer)] = layer
        return layer

    def give_back(self) -> None:
        """Become the plain Linear again, with the base's weight bitwise."""
        with torch.no_grad():
            self.weight.index_copy_(self.dim, self.indices, self.base_slice.to(self.weight.dtype))
        del _layers[id(self)], self.slice, self.indices, self.base_slice, self.side
        plain_class = self._plain_class
        del self._plain_class
        self.__class__ = plain_class  # type: ignore[assignment]

    @property
    def dim(self) -> int:
        """The dimension of the weight that `indices` count along."""
        return 1 if self.side == "in" else 0

    def forward(self, input: Tensor) -> Tensor:
        if not (self.slice.requires_grad and torch.is_grad_enabled()):
            return F.linear(input, self.weight, self.bias)
        y: Tensor = _SliceLinear.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.slice, self.indices, self.side
        )
        return y

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the slice into the weight.

        Plain tensors, a plain weight with a sharded slice, or a sharded weight (Shard(0)). With
        a sharded slice every rank of its mesh must call this, in the same order of layers.
        """
        weight = self.weight
        if not isinstance(weight, DTensor):
            values = _full(self.slice).to(weight.dtype)
            weight.index_copy_(self.dim, self.indices, values)
            return
        local, (start, end) = weight.to_local(), _local_rows(weight)
        if self.side == "in":
            whole: Tensor = self.slice
            values = whole.to_local() if isinstance(whole, DTensor) else whole[start:end]
            local.index_copy_(1, self.indices, values.to(local.dtype))
        else:
            here = (self.indices >= start) & (self.indices < end)
            values = _full(self.slice)[here].to(local.dtype)
            local.index_copy_(0, self.indices[here] - start, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weight's selected entries into the slice: the way back from `write_back`."""
        values = _full(self.weight).index_select(self.dim, self.indices)
        if isinstance(self.slice, DTensor):
            start, end = _local_rows(self.slice)
            self.slice.to_local().copy_(values[start:end])
        else:
            self.slice.copy_(values)

    def full_slice(self) -> Tensor:
        """Return the slice whole: fp32 [D, K] or [K, F]; a collective where it is sharded."""
        return _full(self.slice.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}, num_selected={len(self.indices)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _layers[id(self)] = self  # a deep copy or an unpickled layer is written back too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "S2FTLinear":
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


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local_rows(tensor: DTensor) -> tuple[int, int]:
    """Return the range of rows of `tensor` that this rank holds; empty where it has none."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[0], offset[0] + shape[0]


# Every converted layer that is alive, in the order of conversion: write-back may hold
# collectives, so all ranks must walk it alike.
_layers: weakref.WeakValueDictionary[int, S2FTLinear] = weakref.WeakValueDictionary()


def _write_back_stepped(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Make the layers current whose slices this optimizer holds.

    Found by the parameter that the layer has now: fully_shard and .to() replace Parameters.
    A tensor's version would not do: fused AdamW doesn't raise it.
    """
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for layer in list(_layers.values()):
        if id(layer.slice) in stepped:
            layer.write_back()


register_optimizer_step_post_hook(_write_back_stepped)
