"""Which heads and channels are trained.

Invariant: there is one order of preference for each coupled structure (heads; channels), made
of scores that depend on (seed, layer, structure) or on the model alone; every budget takes a
prefix of it. So o and v, or up, gate and down, share what they can, and neither the layout, the
sharding, the other budgets, the other layers nor the global random state changes a choice.

The experts of a layer each choose among their own channels, and the same number of them. Where
layers compete (global allocation), the j-th best channels of a layer's experts compete together,
by their mean score.

Dimensions: C candidates, E experts, U units (heads or channels), K rows or columns.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from s2ft_ray.config import Projection, S2FTConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.method.geometry import Coupling, CouplingKey, Geometry
from s2ft_ray.method.parts import Side
from s2ft_ray.method.scores import Scores, random_scores

Chosen = dict[CouplingKey, dict[Projection, Tensor]]
"""Units by coupling and projection: int64 [U], ascending, or [E, U] of the experts."""

KINDS = ("heads", "kv_heads", "channels", "expert_channels", "shared_channels")
"""What a `Selection` lists by layer."""
_KEY_VALUE: tuple[Projection, ...] = ("k", "v")


@dataclass(frozen=True)
class ModuleSelection:
    """What is trained of one module: these rows or columns of its weight, ascending."""

    side: Side
    indices: tuple[int, ...] | tuple[tuple[int, ...], ...]
    """Of experts one tuple for each expert, all of one length."""

    @property
    def count(self) -> int:
        """How many rows or columns (of each expert) are trained."""
        first = self.indices[0]
        return len(first) if isinstance(first, tuple) else len(self.indices)


@dataclass(frozen=True)
class Selection:
    """What a converted model trains."""

    modules: dict[str, ModuleSelection]
    """By module name, in the model's order."""
    heads: dict[int, list[int]]
    """By layer: the query heads of q and o."""
    kv_heads: dict[int, list[int]]
    """By layer: the key/value heads of k and v."""
    channels: dict[int, list[int]]
    """By layer: the intermediate channels of up, gate and down."""
    expert_channels: dict[int, list[list[int]]]
    """By layer, for each expert: its channels of up, gate and down."""
    shared_channels: dict[int, list[int]]
    """By layer: the channels of the expert that every token passes."""
    num_units: dict[str, int]
    """How many there are in a layer (of experts in each) to choose from: heads, kv_heads, ..."""
    num_layers: int
    num_trainable: int
    num_parameters: int
    """Of the plain model, the trainable ones included."""

    @property
    def trainable_share(self) -> float:
        """Trainable parameters divided by all of the plain model."""
        return self.num_trainable / self.num_parameters

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings; each module's side, count and indices."""
        document = asdict(self)
        for name, module in self.modules.items():
            document["modules"][name] = {
                "side": module.side,
                "count": module.count,
                "indices": torch.tensor(module.indices).tolist(),
            }
        return {**document, "trainable_share": self.trainable_share}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Selection":
        """Return what `to_json` was made of, also after a way through a file."""
        values = {it.name: document[it.name] for it in fields(cls)}
        for kind in KINDS:
            values[kind] = {int(layer): units for layer, units in values[kind].items()}
        values["modules"] = {
            name: ModuleSelection(module["side"], _to_tuple(module["indices"]))
            for name, module in values["modules"].items()
        }
        return cls(**values)


def _to_tuple(indices: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(it) if isinstance(it, list) else it for it in indices)


@dataclass
class Taken:
    """Heads and channels that other adapters hold."""

    masks: dict[CouplingKey, Tensor] = field(default_factory=dict)
    """By coupling: bool [U] or [E, U]."""

    def add(self, coupling: Coupling, projection: Projection, indices: Tensor) -> None:
        """Take what `indices` of a weight touch; a KV head takes all the query heads it serves."""
        part = coupling.parts[projection]
        rows = indices.long().reshape(coupling.num_experts or 1, -1)
        mask = torch.zeros(len(rows), part.num_units, dtype=torch.bool)
        for mine, row in zip(mask, rows, strict=True):
            mine[part.to_units(row)] = True
        if projection in _KEY_VALUE:
            mask = mask.repeat_interleave(coupling.group_size, dim=1)
        mask = mask if coupling.num_experts else mask[0]
        key = (coupling.layer, coupling.structure)
        self.masks[key] = self.masks.get(key, torch.zeros_like(mask)) | mask


@dataclass(frozen=True)
class _Order:
    """The candidates of couplings that compete with each other, best first."""

    at: Tensor
    """int64 [C]: which of the couplings a candidate is of."""
    units: Tensor
    """int64 [C], or [C, E]: one unit of each expert."""

    def prefix(self, count: int, coupling: int) -> Tensor:
        """Return the units of one coupling among the first: [U] or [E, U], ascending."""
        return self.units[:count][self.at[:count] == coupling].movedim(0, -1).sort(dim=-1).values


def count_trainable(hf_config: Any, config: S2FTConfig) -> int:
    """Return how many parameters `convert` would train, without a model.

    Raises ConfigError where `convert` would for this configuration.
    """
    geometry = Geometry.of(hf_config)
    # How many are chosen doesn't depend on which: any scores do.
    chosen = select(config, geometry, random_scores(config.seed, geometry), Taken())
    entries = sum(
        units.numel() * geometry.couplings[key].parts[projection].unit_size
        for key, by_projection in chosen.items()
        for projection, units in by_projection.items()
    )
    return entries * geometry.hidden_size


def select(config: S2FTConfig, geometry: Geometry, scores: Scores, taken: Taken) -> Chosen:
    """Choose heads or channels for each coupling and projection: those of the lowest scores.

    `scores` holds one score per query head or channel of each coupling. Raises ConfigError where
    a layer or a projection doesn't exist or a budget asks for more than `taken` leaves.
    """
    _check_projections(config, geometry)
    layers = resolve_layers(config, geometry)
    couplings = [it for it in geometry.couplings.values() if it.layer in layers]
    chosen: Chosen = {}
    faults = []
    for pool in _pools(couplings, config):
        order = _rank(pool, scores, taken)
        for projection, budget in config.budgets.items():
            if projection not in pool[0].parts:
                continue
            fault = _choose(projection, budget, pool, order, chosen)
            if fault:
                faults.append(fault)
    if faults:
        raise ConfigError(*faults)
    return chosen


def resolve_layers(config: S2FTConfig, geometry: Geometry) -> list[int]:
    """Return the layers to train, ascending; ConfigError names those that don't exist."""
    if config.layers is None:
        return list(range(geometry.num_layers))
    wrong = [layer for layer in config.layers if not 0 <= layer < geometry.num_layers]
    if wrong or not config.layers:
        raise ConfigError(
            f"method.layers: {wrong or 'an empty list'} names no layer of this model;"
            f" it has 0 to {geometry.num_layers - 1}"
        )
    return sorted(set(config.layers))


def to_modules(chosen: Chosen, geometry: Geometry) -> dict[str, Tensor]:
    """Return the rows or columns of each weight: int64 [K] or [E, K], ascending."""
    found: dict[str, list[Tensor]] = {}
    for key, by_projection in chosen.items():
        for projection, units in by_projection.items():
            part = geometry.couplings[key].parts[projection]
            found.setdefault(part.module, []).append(part.to_indices(units))
    return {name: torch.cat(parts, dim=-1).sort(dim=-1).values for name, parts in found.items()}


def _check_projections(config: S2FTConfig, geometry: Geometry) -> None:
    known = geometry.projections
    faults = [
        f"method.budgets.{projection}: a {geometry.model_type} model has no {projection};"
        f" its projections are {' '.join(known)}"
        for projection in config.budgets
        if projection not in known
    ]
    if faults:
        raise ConfigError(*faults)


def _pools(couplings: Sequence[Coupling], config: S2FTConfig) -> Iterable[list[Coupling]]:
    """Return the couplings that compete: each alone, or all that have the same structure."""
    if config.allocation == "uniform":
        return [[coupling] for coupling in couplings]
    pools: dict[str, list[Coupling]] = {}
    for coupling in couplings:
        pools.setdefault(coupling.structure, []).append(coupling)
    return pools.values()


def _rank(pool: list[Coupling], scores: Scores, taken: Taken) -> _Order:
    values, at, units = [], [], []
    for index, coupling in enumerate(pool):
        key = (coupling.layer, coupling.structure)
        score = scores[key].to(torch.float64)
        if key in taken.masks:
            score = score.masked_fill(taken.masks[key], math.inf)
        ranked, order = score.sort(dim=-1, stable=True)
        if coupling.num_experts:
            ranked = ranked.mean(dim=0)
        left = ranked != math.inf
        values.append(ranked[left])
        units.append(order.movedim(-1, 0)[left])
        at.append(torch.full_like(values[-1], index, dtype=torch.int64))
    best = torch.cat(values).argsort(stable=True)
    return _Order(torch.cat(at)[best], torch.cat(units)[best])


def _choose(
    projection: Projection, budget: float, pool: list[Coupling], order: _Order, chosen: Chosen
) -> str | None:
    """Add a budget's share of a pool to `chosen`; return the fault where too few are left."""
    kind: str = pool[0].structure
    if projection in _KEY_VALUE:
        kind, order = "kv_heads", _first_groups(order, pool[0].group_size)
    total = sum(coupling.parts[projection].num_units for coupling in pool)
    count = max(1, round(budget * total))
    if count > len(order.at):
        where = f"layer {pool[0].layer}" if len(pool) == 1 else f"{len(pool)} layers"
        return (
            f"method.budgets.{projection}: {budget} asks for {count} of {total} {kind} in"
            f" {where}, and the adapters to avoid leave {len(order.at)};"
            " take a lower budget or avoid fewer adapters"
        )
    for index, coupling in enumerate(pool):
        units = order.prefix(count, index)
        if units.numel():
            chosen.setdefault((coupling.layer, coupling.structure), {})[projection] = units
    return None


def _first_groups(heads: _Order, group_size: int) -> _Order:
    """Order the KV heads by the first appearance of their group among the query heads."""
    pairs = zip(heads.at.tolist(), (heads.units // group_size).tolist(), strict=True)
    first = torch.tensor(list(dict.fromkeys(pairs)), dtype=torch.int64).reshape(-1, 2)
    return _Order(first[:, 0], first[:, 1])
