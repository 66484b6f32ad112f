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

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method.fingerprint import fingerprint_base
from s2ft_ray.method.layout import permuted_parameters
from s2ft_ray.method.parts import AdapterSlice, Replaced
from s2ft_ray.method.slices import SliceOf
from s2ft_ray.method.weights import Weight, find_weight, gather, put, stored_dim

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

_STACK = "_s2ft_switched"
_CACHED_ENTRIES = 2**15  # on each core, of a cache line each: 2 MiB


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


def check_switched_out(model: nn.Module) -> None:
    """Raise ConfigError where an adapter is in the model: its weights are not the base's."""
    if switched := switched_fingerprints(model):
        raise ConfigError(
            f"adapter {switched[-1][:12]} is switched into the model; switch_out(model) first"
        )


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the plain base, also of a converted or switched model.

    A collective where parameters are sharded.
    """
    model = plain_model(model)
    by_parameter: dict[int, list[Replaced]] = {}
    for entry in reversed(_stack(model)):
        for name, part in entry.replaced.items():
            parameter = _located(model, name).parameter
            by_parameter.setdefault(id(parameter), []).append(part)
    slices = set()
    for layer in model.modules():
        if isinstance(layer, SliceOf):
            slices.add(id(layer.slice))
            held = layer.indices if layer.original is None else layer.original
            part = Replaced(layer.dim, held, layer.base_slice)
            by_parameter.setdefault(id(layer.weight), []).append(part)
    parameters = [(n, p) for n, p in model.named_parameters() if id(p) not in slices]
    replaced = {name: by_parameter[id(p)] for name, p in parameters if id(p) in by_parameter}
    return fingerprint_base(parameters, replaced, dict(permuted_parameters(model)))


def switch_in(model: nn.Module, adapter: "Adapter") -> None:
    """Add the adapter's deltas to the model's weights and remember what they replace.

    Raises AdapterError, with the model as it was, where the model is converted, has the adapter
    already, or isn't the adapter's base.
    """
    model = plain_model(model)
    if any(isinstance(layer, SliceOf) for layer in model.modules()):
        raise AdapterError("the model is converted; restore(model) before switching adapters in")
    if adapter.fingerprint in switched_fingerprints(model):
        raise AdapterError(f"adapter {adapter.fingerprint[:12]} is in this model already")
    weights, stack = bind(model, adapter), _stack(model)
    replaced: dict[str, Replaced] = {}
    written: list[_Piece] = []
    try:
        for name, weight in weights.items():
            replaced[name] = _add(weight, adapter.slices[name], written)
        _remember(model, [*stack, _Switched(adapter.fingerprint, replaced)])
    except BaseException:
        for piece in written:
            put(*piece)
        _remember(model, stack)
        raise


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
    _remember(model, stack[:-1])


def bind(model: nn.Module, adapter: "Adapter") -> dict[str, Weight]:
    """Return the weights that the adapter changes, by module name.

    Raises AdapterError, one fault for each module that is missing or of another shape, else one
    that tells the two bases apart.
    """
    weights: dict[str, Weight] = {}
    faults = [] if adapter.slices else ["the adapter has no modules: nothing to bind"]
    for name, part in adapter.slices.items():
        weight = find_weight(model, name)
        if weight is None:
            faults.append(f"{name}: the adapter has it, {type(model).__name__} doesn't")
        elif fault := _misfit(weight, part):
            faults.append(f"{name}: {fault}")
        else:
            weights[name] = weight
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


def _misfit(weight: Weight, part: AdapterSlice) -> str | None:
    if isinstance(weight.parameter, DTensor) or weight.parameter.is_meta:
        return "its weight is sharded or on meta; switch into a whole model"
    shape = list(weight.view().shape)
    if len(shape) not in (2, 3):
        return "its weight is no matrix"
    expected = list(part.delta.shape)
    if len(shape) == len(expected):
        expected[part.dim] = shape[part.dim]
    if shape != expected:
        return f"delta is {list(part.delta.shape)}, the weight {shape}"
    last = int(part.indices.max())
    if last >= shape[part.dim]:
        return f"index {last} is outside the weight {shape}"
    return None


_Piece = tuple[Tensor, int, Tensor, Tensor]
"""Rows of a weight, and what `put` needs to make them as they were."""


def _add(weight: Weight, part: AdapterSlice, written: list[_Piece]) -> Replaced:
    """Add the delta and return what it replaced; `written` gets each piece before it changes."""
    stored = weight.parameter.detach()
    dim = stored_dim(part.side, weight.is_transposed)
    indices = part.indices.to(stored.device, torch.int64)
    delta = (part.delta.mT if weight.is_transposed else part.delta).to(stored.device)
    before = torch.empty(delta.shape, dtype=stored.dtype, device=stored.device)
    for piece, kept, added in _cut(dim, stored, before, delta):
        kept.copy_(gather(piece, dim, indices))
        written.append((piece, dim, indices, kept))
        put(piece, dim, indices, (kept.float() + added).to(kept.dtype))
    return Replaced(dim, indices, before)


def _cut(dim: int, *wholes: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of equally many rows alike: what is read of a piece's columns is in a core's
    cache when it is written. Rows lie together and need no cut."""
    if dim == -2 or wholes[0].device.type != "cpu":
        return [wholes]
    rows = max(1, torch.get_num_threads() * _CACHED_ENTRIES // wholes[-1].shape[-1])
    return list(zip(*(torch.split(whole, rows, dim=-2) for whole in wholes), strict=True))


def _put_back(model: nn.Module, replaced: dict[str, Replaced]) -> None:
    with torch.no_grad():
        for name, part in replaced.items():
            _write(_located(model, name).parameter, part, part.values)


def _located(model: nn.Module, name: str) -> Weight:
    weight = find_weight(model, name)
    assert weight is not None, f"{name} had an adapter switched in and is gone"
    return weight


def _write(weight: Tensor, part: Replaced, values: Tensor) -> None:
    # The model may have moved or changed its dtype since the entries were replaced.
    indices = part.indices.to(weight.device)
    put(weight, part.dim, indices, values.to(weight.device, weight.dtype))


def _stack(model: nn.Module) -> list[_Switched]:
    return cast(list[_Switched], getattr(model, _STACK, []))


def _remember(model: nn.Module, stack: list[_Switched]) -> None:
    if stack:
        setattr(model, _STACK, stack)
    elif hasattr(model, _STACK):
        delattr(model, _STACK)
