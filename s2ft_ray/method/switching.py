"""Adapters in and out of a plain model's weights, in place.

Invariant: the model carries a stack of what each adapter replaced; taking the last one out
copies those entries back, so the base returns bitwise. A switch that fails changes nothing.

Dimensions: D out, F in, K selected.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.fingerprint import fingerprint_base
from s2ft_ray.method.linear import S2FTLinear
from s2ft_ray.method.parts import AdapterSlice, Replaced

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

_STACK = "_s2ft_switched"


@dataclass(frozen=True)
class _Switched:
    """One adapter that is in a model, and the entries that it replaced."""

    fingerprint: str
    replaced: dict[str, Replaced]


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model beneath torch.compile's wrapper, whose names have a prefix."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def switched_fingerprints(model: nn.Module) -> list[str]:
    """Return the fingerprints of the adapters that are in the model, first in first."""
    return [entry.fingerprint for entry in _stack(plain_model(model))]


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the plain base, also of a converted or switched model.

    A collective where parameters are sharded.
    """
    model = plain_model(model)
    replaced: dict[str, list[Replaced]] = {}
    for entry in reversed(_stack(model)):
        for name, part in entry.replaced.items():
            replaced.setdefault(f"{name}.weight", []).append(part)
    slice_names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, S2FTLinear):
            slice_names.add(f"{name}.slice")
            part = Replaced(layer.dim, layer.indices, layer.base_slice)
            replaced.setdefault(f"{name}.weight", []).append(part)
    parameters = ((n, p) for n, p in model.named_parameters() if n not in slice_names)
    return fingerprint_base(parameters, replaced)


def switch_in(model: nn.Module, adapter: "Adapter") -> None:
    """Add the adapter's deltas to the model's weights and remember what they replace.

    Raises AdapterError, with the model as it was, where the model is converted, has the adapter
    already, or isn't the adapter's base.
    """
    model = plain_model(model)
    if any(isinstance(layer, S2FTLinear) for layer in model.modules()):
        raise AdapterError("the model is converted; restore(model) before switching adapters in")
    if adapter.fingerprint in switched_fingerprints(model):
        raise AdapterError(f"adapter {adapter.fingerprint[:12]} is in this model already")
    weights = bind(model, adapter)
    replaced: dict[str, Replaced] = {}
    updates: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in weights.items():
            part = adapter.slices[name]
            indices = part.indices.to(weight.device, torch.int64)
            before = weight.index_select(part.dim, indices)
            replaced[name] = Replaced(part.dim, indices, before)
            updates[name] = (before.float() + part.delta.to(weight.device)).to(weight.dtype)
        try:
            for name, weight in weights.items():
                _write(weight, replaced[name], updates[name])
        except BaseException:
            _put_back(model, replaced)
            raise
    setattr(model, _STACK, [*_stack(model), _Switched(adapter.fingerprint, replaced)])


def switch_out(model: nn.Module, adapter: "Adapter") -> None:
    """Copy back, bitwise, what the adapter replaced. AdapterError unless it was the last in."""
    model = plain_model(model)
    stack = _stack(model)
    fingerprints = switched_fingerprints(model)
    if adapter.fingerprint not in fingerprints:
        raise AdapterError(f"adapter {adapter.fingerprint[:12]} is not in this model")
    if adapter.fingerprint != fingerprints[-1]:
        raise AdapterError(
            f"adapter {adapter.fingerprint[:12]} is not the last one in;"
            f" take {fingerprints[-1][:12]} out first"
        )
    _put_back(model, stack[-1].replaced)
    if len(stack) > 1:
        setattr(model, _STACK, stack[:-1])
    else:
        delattr(model, _STACK)


def bind(model: nn.Module, adapter: "Adapter") -> dict[str, nn.Parameter]:
    """Return the weights that the adapter changes, by module name.

    Raises AdapterError, one fault for each module that is missing or of another shape, else one
    that tells the two bases apart.
    """
    weights: dict[str, nn.Parameter] = {}
    faults = [] if adapter.slices else ["the adapter has no modules: nothing to bind"]
    for name, part in adapter.slices.items():
        try:
            weight = model.get_submodule(name).weight
        except AttributeError:
            faults.append(f"{name}: the adapter has it, {type(model).__name__} doesn't")
            continue
        fault = _misfit(weight, part)
        if fault:
            faults.append(f"{name}: {fault}")
        else:
            weights[name] = cast(nn.Parameter, weight)
    if not faults:
        found = base_fingerprint(model)
        if found != adapter.base.fingerprint:
            faults.append(
                f"the base differs: the adapter was trained on {adapter.base.name or 'a model'}"
                f" (fingerprint {adapter.base.fingerprint[:12]}), this model is"
                f" {getattr(model, 'name_or_path', '') or type(model).__name__}"
                f" (fingerprint {found[:12]}): its shapes fit, other names, shapes or values don't"
            )
    if faults:
        raise AdapterError(*faults)
    return weights


def _misfit(weight: object, part: AdapterSlice) -> str | None:
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return "its weight is no matrix"
    if isinstance(weight, DTensor) or weight.is_meta:
        return "its weight is sharded or on meta; switch into a whole model"
    across = 1 - part.dim
    if weight.shape[across] != part.delta.shape[across]:
        return f"delta is {list(part.delta.shape)}, the weight {list(weight.shape)}"
    last = int(part.indices[-1])
    if last >= weight.shape[part.dim]:
        return f"index {last} is outside the weight {list(weight.shape)}"
    return None


def _put_back(model: nn.Module, replaced: dict[str, Replaced]) -> None:
    with torch.no_grad():
        for name, part in replaced.items():
            _write(cast(Tensor, model.get_submodule(name).weight), part, part.values)


def _write(weight: Tensor, part: Replaced, values: Tensor) -> None:
    # The model may have moved or changed its dtype since the entries were replaced.
    indices = part.indices.to(weight.device)
    weight.index_copy_(part.dim, indices, values.to(weight.device, weight.dtype))


def _stack(model: nn.Module) -> list[_Switched]:
    return cast(list[_Switched], getattr(model, _STACK, []))
