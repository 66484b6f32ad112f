"""Fused experts (3-D parameters) of which slices are trained.

Each expert has rows or columns of its own: indices [E, K], slices [E, D, K] or [E, K, F]. The
slices are modules beside the parameters, ``experts.down_proj_slice``: one may have a slice, or
both. Without gradients the experts run as they did before.

Dimensions: E experts, D out, F in, K selected, N tokens, M of them routed to one expert.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft_ray.method.layout import order_of
from s2ft_ray.method.linear import slice_linear
from s2ft_ray.method.parts import Side
from s2ft_ray.method.slices import SliceOf

_SUFFIX = "_slice"
ExpertLinear = Callable[[str, int, Tensor], Tensor]
"""(parameter, expert, x [M, F]) to the expert's product [M, D]."""


class ExpertSlice(SliceOf):
    """The slice of one parameter of fused experts."""

    def __init__(self, experts: nn.Module, parameter_name: str, side: Side, indices: Tensor):
        super().__init__()
        # Not registered: a child that held its parent as a module would make a ring of them.
        object.__setattr__(self, "_experts", experts)
        self.parameter_name = parameter_name
        self.attach(side, indices, order_of(experts, parameter_name))

    @property
    def weight(self) -> Any:
        """The experts' parameter [E, D, F] as it is now."""
        return getattr(self._experts, self.parameter_name)

    def give_back(self) -> None:
        """Leave the experts, with the base's weight bitwise; the last slice makes them plain."""
        self.detach()
        experts = cast("S2FTExperts", self._experts)
        delattr(experts, self.parameter_name + _SUFFIX)
        experts.become_plain()


class S2FTExperts(nn.Module):
    """Fused experts with at least one `ExpertSlice`."""

    _plain_class: type[nn.Module]

    @classmethod
    def take_over(
        cls, experts: nn.Module, parameter_name: str, side: Side, indices: Tensor
    ) -> ExpertSlice:
        """Turn `experts` themselves into S2FTExperts that train a slice [E, K] of a parameter."""
        if not isinstance(experts, cls):
            plain_class = type(experts)
            experts.__class__ = cls
            cast(S2FTExperts, experts)._plain_class = plain_class
        part = ExpertSlice(experts, parameter_name, side, indices)
        experts.add_module(parameter_name + _SUFFIX, part)
        return part

    def become_plain(self) -> None:
        """Take on the class from before conversion, unless a slice is left."""
        if not self.parts():
            plain_class = self._plain_class
            del self._plain_class
            self.__class__ = plain_class  # type: ignore[assignment]

    def parts(self) -> dict[str, ExpertSlice]:
        """Return the slices by their parameter's name."""
        return {it.parameter_name: it for it in self.children() if isinstance(it, ExpertSlice)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        parts = self.parts()
        if not (torch.is_grad_enabled() and any(it.slice.requires_grad for it in parts.values())):
            y: Tensor = self._plain_class.forward(self, hidden_states, top_k_index, top_k_weights)
            return y
        # One unbind: its backward stacks the experts' gradients, where slicing would add up E
        # tensors of the whole slice's size.
        slices = {name: part.slice.unbind() for name, part in parts.items()}

        def linear(name: str, expert: int, x: Tensor) -> Tensor:
            weight = getattr(self, name)[expert]
            if name not in parts:
                return F.linear(x, weight)
            place, side = parts[name].place, parts[name].side
            place = place if isinstance(place, range) else place[expert]
            return slice_linear(x, weight, None, slices[name][expert], place, side)

        return run_experts(self, hidden_states, top_k_index, top_k_weights, linear)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        plain: Any = self._plain_class
        channels: Tensor = plain._apply_gate(self, gate_up)
        return channels

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, part in self.parts().items():  # they get to see none of their parent's keys
            if prefix + name in state_dict:
                part.refresh()


def run_experts(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    linear: ExpertLinear,
) -> Tensor:
    """Compute what plain experts do, with `linear` for every product of an expert.

    hidden_states: [N, hidden_size]; top_k_index, top_k_weights: [N, experts of a token].
    """
    output = torch.zeros_like(hidden_states)
    counts = torch.bincount(top_k_index.flatten(), minlength=experts.num_experts)
    for expert in counts.nonzero().flatten().tolist():
        token, place = torch.where(top_k_index == expert)
        channels = experts._apply_gate(linear("gate_up_proj", expert, hidden_states[token]))
        result = linear("down_proj", expert, channels) * top_k_weights[token, place, None]
        output.index_add_(0, token, result.to(output.dtype))
    return output
