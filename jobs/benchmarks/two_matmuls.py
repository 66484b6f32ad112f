"""The layer as the paper describes it: a product of the frozen part and one of the slice.

A plain reimplementation to compare with. Its input is in the co-permuted order, selected columns
first, so both parts are contiguous blocks of the weight; the slice is trained in the base's dtype.
Autograd keeps the selected columns of the input as a view, and with it the whole input.

Dimensions: D out, F in, K selected.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import convert, restore


class TwoMatmulLinear(nn.Module):
    """y = x[K:] frozenᵀ + x[:K] sliceᵀ."""

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.slice = nn.Parameter(weight[:, :count].clone())  # [D, K]
        self.frozen = nn.Parameter(weight[:, count:].clone(), requires_grad=False)  # [D, F - K]

    def forward(self, x: Tensor) -> Tensor:
        count = self.slice.shape[1]
        return F.linear(x[..., count:], self.frozen) + F.linear(x[..., :count], self.slice)


def use_two_matmuls(model: nn.Module) -> nn.Module:
    """Replace the layers that S2FT would train of `model` (columns only) by such layers."""
    chosen = convert(model, S2FTConfig()).modules
    restore(model)
    for name, module in chosen.items():
        assert module.side == "in", f"{name}: rows are not what the paper's layer selects"
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, TwoMatmulLinear(linear, len(module.indices)))
    return model
