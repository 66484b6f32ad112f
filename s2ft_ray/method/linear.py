"""The converted layers: one matmul forward, a full dX and a thin dW backward.

Dimensions: D out, F in, K selected, N tokens. weight: [D, F]; side "in": slice [D, K] holds
columns; side "out": slice [K, F] holds rows. A Conv1D stores all of them transposed.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from s2ft_ray.method.layout import order_of
from s2ft_ray.method.parts import Side
from s2ft_ray.method.slices import SliceOf
from s2ft_ray.method.weights import Place, gather


class _SliceLinear(torch.autograd.Function):
    """F.linear whose only parameter gradient is the slice's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slice_: Tensor,
        place: Place,
        side: Side,
        is_transposed: bool,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        kept = _copy_columns(x, place).to(y.dtype) if side == "in" else x
        ctx.side, ctx.is_transposed, ctx.slice_dtype = side, is_transposed, slice_.dtype
        ctx.span = place if isinstance(place, range) else None
        ctx.save_for_backward(kept, weight, None if isinstance(place, range) else place)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, indices = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])  # [N, D]
        kept = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)  # [N, K] or [N, F]
        if ctx.side == "out":
            rows = gather(rows, -1, indices if ctx.span is None else ctx.span)  # [N, K]
        grad_slice = kept.T @ rows if ctx.is_transposed else rows.T @ kept
        return grad_x, None, None, grad_slice.to(ctx.slice_dtype), None, None, None


def slice_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slice_: Tensor,
    place: Place,
    side: Side,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Return ``F.linear(x, weight, bias)``; backward gives x's gradient and the slice's.

    weight: [D, F]; slice_: as `weight` at `place`, transposed where `is_transposed`.
    """
    y: Tensor = _SliceLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, slice_, place, side, is_transposed
    )
    return y


def _copy_columns(x: Tensor, place: Place) -> Tensor:
    # A view of x would pin the whole activation until backward.
    if isinstance(place, range):
        return gather(x, -1, place).clone(memory_format=torch.contiguous_format)
    return x.index_select(-1, place)


class _SliceLayer(SliceOf):
    """A layer that became one that trains a slice of its weight."""

    bias: Any
    _plain_class: type[nn.Module]

    def give_back(self) -> None:
        """Become the plain layer again, with the base's weight bitwise."""
        self.detach()
        plain_class = self._plain_class
        del self._plain_class
        self.__class__ = plain_class  # type: ignore[assignment]

    def _take(self, side: Side, indices: Iterable[int]) -> None:
        if self.bias is not None:
            self.bias.requires_grad_(False)
        index = torch.as_tensor(list(indices), dtype=torch.int64)
        self.attach(side, index, order_of(self, "weight"))

    def _is_training(self) -> bool:
        return self.slice.requires_grad and torch.is_grad_enabled()


class S2FTLinear(_SliceLayer, nn.Linear):
    """A Linear of which `slice` alone is trained."""

    @classmethod
    def take_over(cls, linear: nn.Linear, side: Side, indices: Iterable[int]) -> "S2FTLinear":
        """Turn `linear` itself into an S2FTLinear: its hooks and every reference to it stay."""
        plain_class = type(linear)
        linear.__class__ = cls
        layer = cast(S2FTLinear, linear)
        layer._plain_class = plain_class
        layer._take(side, indices)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_training():
            return F.linear(input, self.weight, self.bias)
        return slice_linear(input, self.weight, self.bias, self.slice, self.place, self.side)


class S2FTConv1D(_SliceLayer):
    """A Hugging Face Conv1D (weight [F, D]) of which `slice` alone is trained."""

    is_transposed = True

    @classmethod
    def take_over(cls, conv: nn.Module, side: Side, indices: Iterable[int]) -> "S2FTConv1D":
        """Turn `conv` itself into an S2FTConv1D: its hooks and every reference to it stay."""
        plain_class = type(conv)
        conv.__class__ = cls
        layer = cast(S2FTConv1D, conv)
        layer._plain_class = plain_class
        layer._take(side, indices)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.T
        if not self._is_training():
            return F.linear(input, weight, self.bias)
        return slice_linear(
            input, weight, self.bias, self.slice, self.place, self.side, is_transposed=True
        )
