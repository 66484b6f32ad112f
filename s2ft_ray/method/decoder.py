"""A supported model seen as coupled structures and the weights that hold them.

Invariant: a `Decoder` that exists fits its model: every weight is there, of a module that
computes what its kind does, with as many rows and columns as the configuration says.
"""

from typing import Any

from torch import nn

from s2ft_ray.config import Projection
from s2ft_ray.errors import ConfigError
from s2ft_ray.method.geometry import Coupling, Geometry
from s2ft_ray.method.weights import Weight, find_weight


class Decoder:
    """The couplings of a model, and by name the weights that their parts lie in."""

    def __init__(self, model: nn.Module) -> None:
        """Find the weights of `model`; ConfigError where it isn't what its config says."""
        self.geometry = Geometry.of(getattr(model, "config", None))
        self._members: dict[str, list[tuple[Coupling, Projection]]] = {}
        for coupling in self.geometry.couplings.values():
            for projection, part in coupling.parts.items():
                self._members.setdefault(part.module, []).append((coupling, projection))
        self.weights = {name: self._find(model, name) for name in self._members}
        """By the names that adapters use: a module's, for experts a parameter's."""

    def members(self, name: str) -> list[tuple[Coupling, Projection]]:
        """Return what lies in a weight: a projection, or several fused ones. None: empty."""
        return self._members.get(name, [])

    def _find(self, model: nn.Module, name: str) -> Weight:
        weight = find_weight(model, name)
        if weight is None:
            raise ConfigError(
                f"model: {type(model).__name__} has no module {name};"
                " convert takes the causal LM of a supported architecture"
            )
        if fault := self._misfit(name, weight):
            raise ConfigError(f"model: {name} {fault}")
        return weight

    def _misfit(self, name: str, weight: Weight) -> str | None:
        coupling, projection = self._members[name][0]
        view, hidden_size = weight.view(), self.geometry.hidden_size
        selected = sum(
            it.parts[p].num_units * it.parts[p].unit_size for it, p in self._members[name]
        )
        is_in = coupling.parts[projection].side == "in"
        expected = [hidden_size, selected] if is_in else [selected, hidden_size]
        if coupling.num_experts is not None:
            expected.insert(0, coupling.num_experts)
        if list(view.shape) != expected:
            return f"has the shape {list(view.shape)}, its config says {expected}"
        return None


def check_convertible(name: str, weight: Weight) -> None:
    """Raise ConfigError unless the module computes what its kind does, with unquantized weights."""
    module: Any = weight.module
    kind = type(module)
    if isinstance(module, nn.Linear):
        is_plain = kind.forward is nn.Linear.forward
    elif weight.is_transposed:
        is_plain = kind.__module__ == "transformers.pytorch_utils"
    else:
        is_plain = weight.parameter.dim() == 3 and _has_known_experts(module)
    if not (is_plain and weight.parameter.is_floating_point()):
        raise ConfigError(
            f"model: {name} is a {kind.__name__} of {weight.parameter.dtype}; only plain,"
            " unquantized Linear, Conv1D and fused expert layers can be converted"
        )


def _has_known_experts(experts: Any) -> bool:
    """Tell experts that `run_experts` computes as they do: gated, [gate; up], without biases."""
    known = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    return hasattr(experts, "_apply_gate") and all(
        getattr(experts, name, None) is value for name, value in known.items()
    )
