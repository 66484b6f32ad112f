"""Which heads and channels are trained.

Invariant: there is one order of preference for each coupled structure (heads; channels), made
of scores that depend on (seed, layer, structure) or on the weights alone; every budget takes a
prefix of it. So o and v, or up, gate and down, share what they can, and neither the layout, the
sharding, the other budgets, the other layers nor the global random state changes a choice.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from s2ft_ray.config import Projection, S2FTConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.method.architectures import Geometry
from s2ft_ray.method.parts import Side
from s2ft_ray.method.scores import Scores, Structure, random_scores

Unit = tuple[int, int]
"""(layer, head or channel)."""
Key = tuple[int, Projection]

_QUERY: tuple[Projection, ...] = ("q", "o")
_KEY_VALUE: tuple[Projection, ...] = ("k", "v")


@dataclass(frozen=True)
class ModuleSelection:
    """What is trained of one module: these rows or columns of its weight, ascending."""

    side: Side
    indices: tuple[int, ...]


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
                "count": len(module.indices),
                "indices": list(module.indices),
            }
        return {**document, "trainable_share": self.trainable_share}


@dataclass
class Taken:
    """Heads and channels that other adapters hold."""

    heads: set[Unit] = field(default_factory=set)
    channels: set[Unit] = field(default_factory=set)

    def add(self, key: Key, indices: Iterable[int], geometry: Geometry) -> None:
        """Take what `indices` of a module touch; a KV head takes all the query heads it serves."""
        layer, projection = key
        units = to_units(projection, indices, geometry)
        group_size = geometry.num_heads // geometry.num_kv_heads
        if projection in _QUERY:
            self.heads.update((layer, head) for head in units)
        elif projection in _KEY_VALUE:
            heads = (kv * group_size + i for kv in units for i in range(group_size))
            self.heads.update((layer, head) for head in heads)
        else:
            self.channels.update((layer, channel) for channel in units)


def check_available(config: S2FTConfig) -> None:
    """Raise ConfigError for each choice that this version doesn't make, with the ones it does."""
    available = {"selection": ["random", "weight"], "layout": ["gathered"]}
    faults = []
    for key, values in available.items():
        value, known = getattr(config, key), " or ".join(map(repr, values))
        if value not in values:
            faults.append(f"method.{key}: {value!r} is not available; take {known}")
    if faults:
        raise ConfigError(*faults)


def count_trainable(hf_config: Any, config: S2FTConfig) -> int:
    """Return how many parameters `convert` would train, without a model.

    Raises ConfigError where `convert` would for this configuration.
    """
    check_available(config)
    geometry = Geometry.of(hf_config)
    # How many are chosen doesn't depend on which: any scores do.
    chosen = select(config, geometry, random_scores(config.seed, geometry), Taken())
    # Every projection has hidden_size on the side that isn't selected from.
    return sum(len(indices) for indices in chosen.values()) * geometry.hidden_size


def select(
    config: S2FTConfig,
    geometry: Geometry,
    scores: Scores,
    taken: Taken,
) -> dict[Key, tuple[int, ...]]:
    """Choose rows or columns for each (layer, projection): those of the lowest scores.

    `scores` holds one score per query head or channel of each layer. Raises ConfigError where a
    layer doesn't exist or a budget asks for more than `taken` leaves.
    """
    layers = resolve_layers(config, geometry)
    pools = [[layer] for layer in layers] if config.allocation == "uniform" else [layers]
    chosen: dict[Key, tuple[int, ...]] = {}
    faults = []
    for pool in pools:
        heads = _rank(pool, "heads", scores, taken.heads)
        orders = {"heads": heads, "kv_heads": _first_groups(heads, geometry)}
        orders["channels"] = _rank(pool, "channels", scores, taken.channels)
        for projection, budget in config.budgets.items():
            kind, per_layer = _kind(projection, geometry)
            total = per_layer * len(pool)
            count, order = max(1, round(budget * total)), orders[kind]
            if count > len(order):
                where = f"layer {pool[0]}" if len(pool) == 1 else f"{len(pool)} layers"
                faults.append(
                    f"method.budgets.{projection}: {budget} asks for {count} of {total} {kind} in"
                    f" {where}, and the adapters to avoid leave {len(order)};"
                    " take a lower budget or avoid fewer adapters"
                )
                continue
            for layer in pool:
                units = sorted(unit for at, unit in order[:count] if at == layer)
                if units:
                    chosen[layer, projection] = _to_indices(projection, units, geometry)
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


def to_units(projection: Projection, indices: Iterable[int], geometry: Geometry) -> list[int]:
    """Return the heads or channels that rows or columns of a projection belong to, ascending."""
    size = _unit_size(projection, geometry)
    return sorted({index // size for index in indices})


def _rank(
    pool: list[int],
    structure: Structure,
    scores: Scores,
    taken: set[Unit],
) -> list[Unit]:
    scored = [
        (score, layer, unit)
        for layer in pool
        for unit, score in enumerate(scores[layer, structure].tolist())
        if (layer, unit) not in taken
    ]
    return [(layer, unit) for _, layer, unit in sorted(scored)]


def _first_groups(heads: list[Unit], geometry: Geometry) -> list[Unit]:
    """Order the KV heads by the first appearance of their group among the query heads."""
    group_size = geometry.num_heads // geometry.num_kv_heads
    return list(dict.fromkeys((layer, head // group_size) for layer, head in heads))


def _kind(projection: Projection, geometry: Geometry) -> tuple[str, int]:
    if projection in _QUERY:
        return "heads", geometry.num_heads
    if projection in _KEY_VALUE:
        return "kv_heads", geometry.num_kv_heads
    return "channels", geometry.intermediate_size


def _unit_size(projection: Projection, geometry: Geometry) -> int:
    return geometry.head_dim if projection in (*_QUERY, *_KEY_VALUE) else 1


def _to_indices(
    projection: Projection, units: Iterable[int], geometry: Geometry
) -> tuple[int, ...]:
    size = _unit_size(projection, geometry)
    return tuple(index for unit in units for index in range(unit * size, (unit + 1) * size))
