"""A plain model becomes one that trains slices, gives its adapter, and becomes plain again.

Invariant: of a converted model the slices have requires_grad and nothing else; `restore` leaves
the base bitwise, its classes and its requires_grad flags, and no trace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.calibration import Batch, SharedCalibration
from s2ft_ray.method.choice import choose_indices, describe
from s2ft_ray.method.decoder import Decoder, check_convertible
from s2ft_ray.method.experts import ExpertSlice, S2FTExperts
from s2ft_ray.method.layout import permute, restore_order
from s2ft_ray.method.linear import S2FTConv1D, S2FTLinear
from s2ft_ray.method.parts import SIDES, AdapterSlice, BaseInfo, Side
from s2ft_ray.method.selection import ModuleSelection, Selection
from s2ft_ray.method.switching import base_fingerprint, bind, check_switched_out, plain_model
from s2ft_ray.method.weights import Weight

_RECORD = "_s2ft_conversion"


@dataclass(frozen=True)
class _Conversion:
    """What a converted model remembers of how it came to be."""

    config: S2FTConfig
    base: BaseInfo
    requires_grad: dict[str, bool]
    """Of the plain model's parameters before conversion."""


def convert(
    model: nn.Module,
    config: S2FTConfig,
    calibration: Iterable[Batch] | SharedCalibration | None = None,
    avoid: Sequence[Adapter] = (),
) -> Selection:
    """Make `model` train the slices that `config` selects and nothing else, in place.

    `calibration` holds batches of the training data for a selection that looks at data, each a
    mapping of what the model takes (with labels for ``gradient``); with SharedCalibration several
    processes share the work. `avoid` draws outside the heads and channels of other adapters of
    the same base. Convert before fully_shard. Raises ConfigError for an unsupported or converted
    model, for budgets that can't be met and for calibration that can't be used, AdapterError for
    an adapter of another base; the model is then untouched.
    """
    model = plain_model(model)
    decoder = _check_plain(model)
    indices = choose_indices(model, decoder, config, calibration, avoid)
    return _convert(model, decoder, config, indices, _describe_base(model))


def convert_with(model: nn.Module, config: S2FTConfig, selection: Selection) -> Selection:
    """Convert with a selection that `convert` has made before, in place; nothing is measured.

    Raises ConfigError like `convert`, and where the selection is of another kind or size of
    model; the model is then untouched.
    """
    model = plain_model(model)
    decoder = _check_plain(model)
    faults = [
        f"selection: {name}: {fault}"
        for name, module in selection.modules.items()
        if (fault := _misfit(decoder, name, module))
    ]
    if faults:
        raise ConfigError(*faults)
    indices = {name: torch.tensor(it.indices) for name, it in selection.modules.items()}
    return _convert(model, decoder, config, indices, _describe_base(model))


def convert_like(model: nn.Module, adapter: Adapter) -> Selection:
    """Convert with an adapter's selection and start from its values, in place.

    Training goes on where the adapter ended; `extract_adapter` still gives the delta to the plain
    base. Raises ConfigError like `convert`, AdapterError where the adapter doesn't fit the model.
    """
    model = plain_model(model)
    decoder = _check_plain(model)
    bind(model, adapter)
    for name, part in adapter.slices.items():
        if name not in decoder.weights or _side(decoder, name) != part.side:
            raise AdapterError(
                f"{name}: an adapter's {part.side}-side slice that convert can't train"
            )
    indices = {name: part.indices.long() for name, part in adapter.slices.items()}
    selection = _convert(model, decoder, adapter.config, indices, _describe_base(model))
    for name, layer in slice_layers(model):
        layer.add_delta(adapter.slices[name].delta)
    return selection


def extract_adapter(model: nn.Module) -> Adapter:
    """Return what training has changed, at the original indices: a copy, fp32 on the CPU.

    A collective where slices are sharded: every rank must call it, and gets all of it.
    """
    model = plain_model(model)
    record = _record(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what it has gathered for a forward is rounded to its param_dtype
    slices = {
        name: AdapterSlice(
            layer.side,
            layer.original_indices().int().cpu(),
            layer.delta(),
            size=layer.weight.shape[layer.dim],
            transposed=layer.is_transposed,
        )
        for name, layer in slice_layers(model)
    }
    return Adapter(slices, record.base, record.config)


def restore(model: nn.Module) -> None:
    """Make a converted model the plain base again: bitwise, with its classes and flags."""
    model = plain_model(model)
    record = _record(model)
    layers = slice_layers(model)
    for name, layer in layers:
        if isinstance(layer.slice, DTensor):
            raise ConfigError(f"{name} is sharded; only an unsharded model can be restored")
    for _, layer in layers:
        layer.give_back()
    restore_order(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.requires_grad[name])
    delattr(model, _RECORD)


def slice_layers(model: nn.Module) -> list[tuple[str, S2FTLinear | S2FTConv1D | ExpertSlice]]:
    """Return what trains a slice and the names that adapters use, in the model's order.

    They are the converted layers; of experts the slices themselves, named by their parameter.
    """
    kinds = (S2FTLinear, S2FTConv1D, ExpertSlice)
    return [
        (name.removesuffix("_slice") if isinstance(module, ExpertSlice) else name, module)
        for name, module in plain_model(model).named_modules()
        if isinstance(module, kinds)
    ]


def _check_plain(model: nn.Module) -> Decoder:
    if hasattr(model, _RECORD):
        raise ConfigError("the model is converted already; restore(model) first")
    check_switched_out(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or parameter.is_meta:
            raise ConfigError(
                f"model: {name} is sharded or on meta; load the model, convert it, then shard it"
            )
    return Decoder(model)


def _misfit(decoder: Decoder, name: str, module: ModuleSelection) -> str | None:
    if name not in decoder.weights or _side(decoder, name) != module.side:
        return f"this model has no such {module.side}-side slice"
    shape = decoder.weights[name].view().shape
    size = shape[-1 if module.side == "in" else -2]
    per_expert = [it for it in module.indices if isinstance(it, tuple)]
    expected = shape[0] if len(shape) == 3 else 0
    if len(per_expert) != expected:
        return f"its indices are of {len(per_expert)} experts; this model has {expected}"
    if len(set(map(len, per_expert))) > 1:
        return f"its indices are of {expected} experts, each of which must have as many"
    for row in per_expert or [cast(tuple[int, ...], module.indices)]:
        if list(row) != sorted(set(row)) or not row:
            return "its indices do not ascend"
        if row[0] < 0 or row[-1] >= size:
            outside = row[0] if row[0] < 0 else row[-1]
            return f"index {outside} is outside of {list(shape)}"
    return None


def _convert(
    model: nn.Module,
    decoder: Decoder,
    config: S2FTConfig,
    indices: dict[str, Tensor],
    base: BaseInfo,
) -> Selection:
    for name in indices:
        check_convertible(name, decoder.weights[name])
    description = describe(model, decoder, indices)
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    setattr(model, _RECORD, _Conversion(config, base, flags))
    if config.layout == "permuted":
        permute(model, decoder, indices)
    # In the decoder's order, wherever the indices come from: it is the order of write-back, whose
    # collectives all ranks must meet in.
    for name in sorted(indices, key=list(decoder.weights).index):
        _take_over(decoder.weights[name], _side(decoder, name), indices[name])
    return description


def _take_over(weight: Weight, side: Side, indices: Tensor) -> None:
    module = weight.module
    if isinstance(module, nn.Linear):
        S2FTLinear.take_over(module, side, indices.tolist())
    elif weight.is_transposed:
        S2FTConv1D.take_over(module, side, indices.tolist())
    else:
        S2FTExperts.take_over(module, weight.parameter_name, side, indices)


def _side(decoder: Decoder, name: str) -> Side:
    return SIDES[decoder.members(name)[0][1]]


def _describe_base(model: nn.Module) -> BaseInfo:
    hf_config: Any = getattr(model, "config", None)
    return BaseInfo(
        name=getattr(hf_config, "_name_or_path", None) or None,
        revision=getattr(hf_config, "_commit_hash", None),
        fingerprint=base_fingerprint(model),
    )


def _record(model: nn.Module) -> _Conversion:
    record = getattr(model, _RECORD, None)
    if record is None:
        raise ConfigError("the model is not converted; convert(model, config) first")
    return cast(_Conversion, record)
