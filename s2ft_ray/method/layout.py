"""The permuted layout: coupled weights reordered so that what is trained lies together.

A coupling's units change places in all of its projections at once, with their biases and with
norms as wide as a projection, so the model computes the same (arXiv 2412.06289, section 3.2).
Under grouped-query attention a group of query heads moves with its key/value head, and heads
change places only within their group; where that leaves a slice in pieces it stays gathered.

Invariant: outside the parameters themselves nothing tells the layout: a permuted module's
`state_dict` and `load_state_dict` are in the original order.

Dimensions: E experts, U units (heads or channels), G key/value heads, K rows or columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from s2ft_ray.errors import ConfigError
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.method.geometry import Coupling, Part
from s2ft_ray.method.weights import as_place, gather, stored_dim

_ORDERS = "_s2ft_orders"


@dataclass(frozen=True, eq=False)
class Order:
    """How one parameter is permuted."""

    dim: int
    """From the end."""
    original: Tensor
    """int64 [K] or [E, K], on the CPU: what was at each place before."""

    def permute(self, tensor: Tensor) -> Tensor:
        """Return a copy in the permuted order of a tensor in the original order."""
        return gather(tensor, self.dim, self.original.to(tensor.device))

    def restore(self, tensor: Tensor) -> Tensor:
        """Return a copy in the original order of a tensor in the permuted order."""
        return gather(tensor, self.dim, self.original.argsort(dim=-1).to(tensor.device))

    def find(self, indices: Tensor) -> Tensor:
        """Return where original rows or columns [K] or [E, K] are now, in the same order."""
        return self.original.argsort(dim=-1).take_along_dim(indices, dim=-1)


@dataclass(frozen=True, eq=False)
class _Orders:
    """What a permuted module remembers."""

    parameters: dict[str, Order]
    hooks: list[RemovableHandle]


def permute(model: nn.Module, decoder: Decoder, indices: dict[str, Tensor]) -> None:
    """Reorder the couplings in which that puts a slice of `indices` in one piece, in place.

    `indices` holds rows or columns by module: [K] or [E, K].
    """
    for coupling in decoder.geometry.couplings.values():
        orders = _unit_orders(coupling, indices)
        modules = {
            part.module: _module_order(coupling, part.module, orders)
            for part in coupling.parts.values()
        }
        if any(
            _is_in_one_piece(order, indices[name])
            for name, order in modules.items()
            if name in indices
        ):
            _permute_coupling(model, decoder, coupling, orders, modules)


def restore_order(model: nn.Module) -> None:
    """Put every permuted parameter back into its original order, in place."""
    for module in model.modules():
        if hasattr(module, _ORDERS):
            orders: _Orders = getattr(module, _ORDERS)
            for name, order in orders.parameters.items():
                parameter = getattr(module, name)
                with torch.no_grad():
                    parameter.copy_(order.restore(parameter))
            for hook in orders.hooks:
                hook.remove()
            delattr(module, _ORDERS)


def order_of(module: nn.Module, parameter_name: str) -> Order | None:
    """Return how a module's parameter is permuted; None where it isn't."""
    orders: _Orders | None = getattr(module, _ORDERS, None)
    return None if orders is None else orders.parameters.get(parameter_name)


def permuted_parameters(model: nn.Module) -> Iterator[tuple[str, Order]]:
    """Yield the names of all permuted parameters."""
    for prefix, module in model.named_modules():
        if hasattr(module, _ORDERS):
            for name, order in getattr(module, _ORDERS).parameters.items():
                yield f"{prefix}.{name}", order


def _unit_orders(coupling: Coupling, indices: dict[str, Tensor]) -> dict[int, Tensor]:
    """Return by their number the units of each kind in their new order: [U] or [E, U].

    What most projections train comes first: budgets take prefixes of one order of preference, so
    each one's units then are the first. Nothing else changes places.
    """
    held = {p: _count(part, indices) for p, part in coupling.parts.items()}
    if coupling.structure != "heads":
        return {coupling.num_units: _most_first(held["up"] + held["down"] + held.get("gate", 0))}
    num_groups = coupling.parts["k"].num_units
    queries = (held["q"] + held["o"]).view(num_groups, coupling.group_size)
    keys = held["k"] + held["v"]
    # Groups: by their key/value head, then whole ones before those trained in part.
    rank = (keys * 3 + queries.amin(1)) * 3 + queries.amax(1)
    groups = _most_first(rank)
    within = _most_first(queries)  # [G, group_size]
    heads = groups.unsqueeze(1) * coupling.group_size + within[groups]
    return {coupling.num_units: heads.flatten(), num_groups: groups}


def _count(part: Part, indices: dict[str, Tensor]) -> Tensor:
    """Return 1 for each unit that a projection trains, else 0: [U] or [E, U]."""
    if part.module not in indices:
        return torch.zeros(part.num_units, dtype=torch.int64)
    selected = indices[part.module]
    counts = torch.zeros((*selected.shape[:-1], part.num_units), dtype=torch.int64)
    if selected.dim() == 1:
        counts[part.to_units(selected)] = 1
    else:
        for mine, row in zip(counts, selected, strict=True):
            mine[part.to_units(row)] = 1
    return counts


def _most_first(counts: Tensor) -> Tensor:
    return counts.argsort(dim=-1, descending=True, stable=True)


def _module_order(coupling: Coupling, module: str, orders: dict[int, Tensor]) -> Tensor:
    """Return the order of all rows or columns of a weight: [K] or [E, K]."""
    places, originals = [], []
    for part in coupling.parts.values():
        if part.module == module:
            order = orders[part.num_units]
            originals.append(part.to_indices(order))
            places.append(part.to_indices(torch.arange(part.num_units)))
    return torch.cat(originals, dim=-1)[..., torch.cat(places).argsort()]


def _is_in_one_piece(order: Tensor, indices: Tensor) -> bool:
    place = order.argsort(dim=-1).take_along_dim(indices, dim=-1).sort(dim=-1).values
    return isinstance(as_place(place), range)


def _permute_coupling(
    model: nn.Module,
    decoder: Decoder,
    coupling: Coupling,
    orders: dict[int, Tensor],
    modules: dict[str, Tensor],
) -> None:
    for part in coupling.parts.values():
        weight = decoder.weights[part.module]
        if order_of(weight.module, weight.parameter_name) is not None:
            continue  # another projection's in the same module
        order = modules[part.module]
        dim = stored_dim(part.side, weight.is_transposed)
        _permute_parameter(weight.module, weight.parameter_name, Order(dim, order))
        if part.side == "out" and getattr(weight.module, "bias", None) is not None:
            _permute_parameter(weight.module, "bias", Order(-1, order))
    for projection, name in coupling.norms:
        order = _norm_order(coupling.parts[projection], orders)
        _permute_parameter(model.get_submodule(name), "weight", Order(-1, order))


def _norm_order(part: Part, orders: dict[int, Tensor]) -> Tensor:
    entries = torch.arange(part.unit_size)
    return (orders[part.num_units].unsqueeze(-1) * part.unit_size + entries).flatten()


def _permute_parameter(module: nn.Module, name: str, order: Order) -> None:
    if not hasattr(module, _ORDERS):
        untyped: Any = module
        hooks = [
            untyped.register_state_dict_post_hook(_save_original),
            untyped.register_load_state_dict_pre_hook(_load_original),
        ]
        setattr(module, _ORDERS, _Orders({}, hooks))
    getattr(module, _ORDERS).parameters[name] = order
    parameter: Tensor = getattr(module, name)
    with torch.no_grad():
        parameter.copy_(order.permute(parameter))


def _save_original(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, order in getattr(module, _ORDERS).parameters.items():
        tensor = state[prefix + name]
        if isinstance(tensor, DTensor):
            raise ConfigError(
                f"state_dict: {prefix}{name} is permuted and sharded; extract_adapter gives what"
                " training changed, or convert with method.layout gathered"
            )
        state[prefix + name] = order.restore(tensor.detach())


def _load_original(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    for name, order in getattr(module, _ORDERS).parameters.items():
        tensor = state.get(prefix + name)
        # One of another shape is left for load_state_dict to refuse.
        if tensor is not None and tensor.shape == getattr(module, name).shape:
            state[prefix + name] = order.permute(tensor)
