"""A plain model becomes one that trains slices, gives its adapter, and becomes plain again.

Invariant: of a converted model the slices have requires_grad and nothing else; `restore` leaves
the base bitwise, its classes and its requires_grad flags, and no trace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.architectures import Decoder
from s2ft_ray.method.linear import S2FTLinear
from s2ft_ray.method.parts import SIDES, AdapterSlice, BaseInfo
from s2ft_ray.method.scores import score_units
from s2ft_ray.method.selection import (
    Key,
    ModuleSelection,
    Selection,
    Taken,
    check_available,
    select,
    to_units,
)
from s2ft_ray.method.switching import base_fingerprint, bind, plain_model, switched_fingerprints

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
    calibration: Iterable[Any] | None = None,
    avoid: Sequence[Adapter] = (),
) -> Selection:
    """Make `model` train the slices that `config` selects and nothing else, in place.

    `avoid` draws outside the heads and channels of other adapters of the same base. Convert
    before fully_shard. Raises ConfigError for an unsupported or converted model and for budgets
    that can't be met, AdapterError for an adapter of another base; the model is then untouched.
    """
    model = plain_model(model)
    decoder = _check_plain(model)
    check_available(config)
    if calibration is not None:
        raise ConfigError(
            f"calibration: the selection {config.selection!r} looks at no data; leave it out"
        )
    taken = Taken()
    for adapter in avoid:
        bind(model, adapter)
        for name, part in adapter.slices.items():
            if key := decoder.locate(name):
                taken.add(key, part.indices.tolist(), decoder.geometry)
    chosen = select(config, decoder.geometry, score_units(config, decoder), taken)
    return _convert(model, decoder, config, chosen, _describe_base(model))


def convert_like(model: nn.Module, adapter: Adapter) -> Selection:
    """Convert with an adapter's selection and start from its values, in place.

    Training goes on where the adapter ended; `extract_adapter` still gives the delta to the plain
    base. Raises ConfigError like `convert`, AdapterError where the adapter doesn't fit the model.
    """
    model = plain_model(model)
    decoder = _check_plain(model)
    bind(model, adapter)
    chosen: dict[Key, tuple[int, ...]] = {}
    for name, part in adapter.slices.items():
        key = decoder.locate(name)
        if key is None or SIDES[key[1]] != part.side:
            raise AdapterError(
                f"{name}: an adapter's {part.side}-side slice that convert can't train"
            )
        chosen[key] = tuple(part.indices.tolist())
    selection = _convert(model, decoder, adapter.config, chosen, _describe_base(model))
    for name, layer in slice_layers(model):
        layer.slice.data += adapter.slices[name].delta.to(layer.slice.device)
        layer.write_back()
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
            layer.indices.int().cpu(),
            (layer.full_slice() - layer.base_slice.float()).cpu().contiguous(),
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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.requires_grad[name])
    delattr(model, _RECORD)


def slice_layers(model: nn.Module) -> list[tuple[str, S2FTLinear]]:
    """Return the converted layers and their names, in the model's order."""
    modules = plain_model(model).named_modules()
    return [(name, module) for name, module in modules if isinstance(module, S2FTLinear)]


def _check_plain(model: nn.Module) -> Decoder:
    if hasattr(model, _RECORD):
        raise ConfigError("the model is converted already; restore(model) first")
    if switched := switched_fingerprints(model):
        raise ConfigError(
            f"adapter {switched[-1][:12]} is switched into the model; switch_out(model) first"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or parameter.is_meta:
            raise ConfigError(
                f"model: {name} is sharded or on meta; load the model, convert it, then shard it"
            )
    return Decoder(model)


def _convert(
    model: nn.Module,
    decoder: Decoder,
    config: S2FTConfig,
    chosen: dict[Key, tuple[int, ...]],
    base: BaseInfo,
) -> Selection:
    for key in chosen:
        _check_linear(decoder.name(*key), decoder.linear(*key))
    parameters = dict(model.named_parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    setattr(model, _RECORD, _Conversion(config, base, flags))
    for key, indices in chosen.items():
        S2FTLinear.take_over(decoder.linear(*key), SIDES[key[1]], indices)
    return _describe(model, decoder, num_parameters)


def _check_linear(name: str, linear: nn.Linear) -> None:
    if type(linear).forward is not nn.Linear.forward or not linear.weight.is_floating_point():
        raise ConfigError(
            f"model: {name} is a {type(linear).__name__} of {linear.weight.dtype};"
            " only plain, unquantized Linear layers can be converted"
        )


def _describe(model: nn.Module, decoder: Decoder, num_parameters: int) -> Selection:
    layers = slice_layers(model)
    selection = Selection(
        modules={
            name: ModuleSelection(layer.side, tuple(layer.indices.tolist()))
            for name, layer in layers
        },
        heads={},
        kv_heads={},
        channels={},
        num_trainable=sum(layer.slice.numel() for _, layer in layers),
        num_parameters=num_parameters,
    )
    kinds = {"q": selection.heads, "o": selection.heads}
    kinds |= {"k": selection.kv_heads, "v": selection.kv_heads}
    for name, module in selection.modules.items():
        layer, projection = cast(Key, decoder.locate(name))
        units = kinds.get(projection, selection.channels)
        found = to_units(projection, module.indices, decoder.geometry)
        units[layer] = sorted({*units.get(layer, []), *found})
    return selection


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
