"""From a plain model to a selection: what is to be trained, and its description.

Invariant: the model is not changed. It may be sharded: then choosing is a collective.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.calibration import Batch, SharedCalibration
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.method.geometry import Part
from s2ft_ray.method.parts import SIDES
from s2ft_ray.method.scores import check_calibration, score_units
from s2ft_ray.method.selection import ModuleSelection, Selection, Taken, select, to_modules
from s2ft_ray.method.slices import SliceOf
from s2ft_ray.method.switching import bind, check_switched_out, plain_model


def choose(
    model: nn.Module,
    config: S2FTConfig,
    calibration: Iterable[Batch] | SharedCalibration | None = None,
    avoid: Sequence[Adapter] = (),
) -> Selection:
    """Return what `convert` would train, of a model that may be sharded, and change nothing.

    `convert_with` takes the selection, on a model that isn't sharded yet. Raises ConfigError and
    AdapterError like `convert`; adapters to avoid need a whole model.
    """
    model = plain_model(model)
    if any(isinstance(module, SliceOf) for module in model.modules()):
        raise ConfigError("the model is converted already; restore(model) first")
    check_switched_out(model)
    decoder = Decoder(model)
    return describe(model, decoder, choose_indices(model, decoder, config, calibration, avoid))


def choose_indices(
    model: nn.Module,
    decoder: Decoder,
    config: S2FTConfig,
    calibration: Iterable[Batch] | SharedCalibration | None,
    avoid: Sequence[Adapter],
) -> dict[str, Tensor]:
    """Return the rows or columns of each weight: int64 [K] or [E, K], ascending."""
    check_calibration(config, calibration is not None)
    taken = Taken()
    for adapter in avoid:
        bind(model, adapter)
        for name, part in adapter.slices.items():
            for coupling, projection in decoder.members(name):
                taken.add(coupling, projection, part.indices)
    scores = score_units(config, model, decoder, calibration)
    chosen = select(config, decoder.geometry, scores, taken)
    return to_modules(chosen, decoder.geometry)


def describe(model: nn.Module, decoder: Decoder, indices: dict[str, Tensor]) -> Selection:
    """Return the rows or columns of each weight as a `Selection`."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    ordered = sorted(indices, key=lambda name: places.get(f"{name}.weight", places.get(name, 0)))
    selection = Selection(
        modules={
            name: ModuleSelection(SIDES[decoder.members(name)[0][1]], _to_tuple(indices[name]))
            for name in ordered
        },
        heads={},
        kv_heads={},
        channels={},
        expert_channels={},
        shared_channels={},
        num_units=_count_units(decoder),
        num_layers=decoder.geometry.num_layers,
        num_trainable=decoder.geometry.hidden_size * sum(it.numel() for it in indices.values()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    for name in ordered:
        _add_units(selection, decoder, name, indices[name])
    return selection


def _add_units(selection: Selection, decoder: Decoder, name: str, indices: Tensor) -> None:
    """List the heads or channels that rows or columns of a weight belong to."""
    for coupling, projection in decoder.members(name):
        units = _units(coupling.parts[projection], indices)
        if not any(units):
            continue
        kind: str = "kv_heads" if projection in ("k", "v") else coupling.structure
        by_layer = getattr(selection, kind)
        if held := by_layer.get(coupling.layer):
            each = held if coupling.num_experts else [held]
            units = [sorted({*a, *b}) for a, b in zip(each, units, strict=True)]
        by_layer[coupling.layer] = units if coupling.num_experts else units[0]


def _count_units(decoder: Decoder) -> dict[str, int]:
    counts: dict[str, int] = {}
    for coupling in decoder.geometry.couplings.values():
        counts[coupling.structure] = coupling.num_units
        if coupling.structure == "heads":
            counts["kv_heads"] = coupling.parts["k"].num_units
    return counts


def _units(part: Part, indices: Tensor) -> list[list[int]]:
    """Return the units of each expert, or of the one weight."""
    return [part.to_units(row).tolist() for row in indices.reshape(-1, indices.shape[-1])]


def _to_tuple(indices: Tensor) -> Any:
    return tuple(map(tuple, indices.tolist())) if indices.dim() == 2 else tuple(indices.tolist())
