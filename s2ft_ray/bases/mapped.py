"""A base whose weights stay in their files, mapped into memory, until somebody takes a part.

For bases that are sharded: FSDP copies a worker's part of a parameter and lets go of the rest, so
a worker reads its own part of the files and holds no more than that. What else it looked at are
pages of the files, shared by the workers of a machine and given up under pressure.

Invariant: what is returned equals what ``from_pretrained`` loads, ties, buffers and all. Where the
files have another dtype or other names, they are rewritten first (``rewritten``).
"""

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from s2ft_ray.bases.rewritten import GIB, PARTIAL, RewrittenWeights
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ConfigError

logger = logging.getLogger(__name__)


def map_base_model(
    folder: Path,
    config: PretrainedConfig,
    model: ModelConfig,
    *,
    cache: Path,
    load: Callable[..., PreTrainedModel],
) -> PreTrainedModel | None:
    """Build the model over the files in `folder`, or over what `cache` has of them.

    `load` is ``from_pretrained`` of this model. It is called, by one worker of a machine, where the
    names in the files aren't the model's, and leaves the layers on disk: no more is in memory than
    one parameter and what it is made of. None is returned where there are values that only
    loading can give, or no room.
    """
    if getattr(config, "quantization_config", None) or (
        model.dtype == "auto" and config.dtype is None
    ):
        return None  # what the values are is decided as they are loaded
    config = copy.deepcopy(config)
    config._name_or_path = str(folder)  # where a model's own code is looked for
    dtype = config.dtype if model.dtype == "auto" else getattr(torch, str(model.dtype))
    # Buffers are small and computed: rotary frequencies among them, which no file has.
    with init_empty_weights(include_buffers=False):
        base: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    base.tie_weights()  # parameters on the meta device are made one by one
    wanted = base.state_dict()
    files = _weight_files(folder)
    try:
        weights = RewrittenWeights(cache, files, dtype=str(dtype), config=config.to_json_string())
        tensors = _map_tensors(files, wanted)
        if _are_loaded_otherwise(base, tensors, wanted):
            return None
        source = _rewritten_source(base, tensors, wanted, partial(_loaded, base, cache, load))
        if source is not None:
            with weights.lock():
                if weights.files() is None:
                    weights.write(source, sum(wanted[name].nbytes for name in _names(base)))
                tensors = _map_tensors(weights.files() or [], wanted)
    except OSError as error:
        logger.warning("the base can't be kept as this run needs it: %s", error)
        return None
    base.load_state_dict(tensors, strict=False, assign=True)
    base.tie_weights()  # assigning has broken the ties
    if any(parameter.is_meta for parameter in base.parameters()):
        return None
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    loaded: PreTrainedModel = base
    return loaded


def _rewritten_source(
    base: Any,
    tensors: dict[str, Tensor],
    wanted: dict[str, Tensor],
    loaded: Callable[[], Iterable[tuple[str, Tensor]]],
) -> Iterable[tuple[str, Tensor]] | None:
    """Return what is to be written first; None where the files can be mapped as they are."""
    names = _names(base)
    if not names <= tensors.keys() or _keeps_some_in_fp32(base):
        return loaded()
    if any(tensor.dtype != wanted[name].dtype for name, tensor in tensors.items()):
        return _cast({name: tensors[name] for name in names}, wanted)
    return None


def _are_loaded_otherwise(base: Any, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Say whether loading tells of a fault, or breaks a tie: two names with two tensors."""
    if any(tensor.shape != wanted[name].shape for name, tensor in tensors.items()):
        return True
    first = {id(parameter): name for name, parameter in base.named_parameters()}
    every = base.named_parameters(remove_duplicate=False)
    tied = [(name, first[id(it)]) for name, it in every if first[id(it)] != name]
    return any(
        not torch.equal(tensors[name], tensors[other])
        for name, other in tied
        if name in tensors and other in tensors
    )


def _names(base: Any) -> set[str]:
    """Name the parameters, each once, and the buffers that are saved."""
    names = {name for name, _ in base.named_parameters()}
    buffers = {name for name, _ in base.named_buffers()}
    saved: set[str] = set(base.state_dict())
    return names | (buffers & saved)


def _keeps_some_in_fp32(base: Any) -> bool:
    return bool(base._keep_in_fp32_modules or base._keep_in_fp32_modules_strict)


def _cast(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors in the dtypes that are wanted, each valid until the next is asked for."""
    # One buffer for all: an allocator keeps what is freed for a while.
    buffer = torch.empty(max(wanted[name].nbytes for name in tensors), dtype=torch.uint8)
    for name, tensor in tensors.items():
        like = wanted[name]
        yield name, buffer[: like.nbytes].view(like.dtype).view(like.shape).copy_(tensor)


def _loaded(
    base: Any, cache: Path, load: Callable[..., PreTrainedModel]
) -> Iterable[tuple[str, Tensor]]:
    """Yield what ``from_pretrained`` makes of the files, through a folder in `cache`."""
    names, device_map = _names(base), _layers_on_disk(base)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".", suffix=PARTIAL) as folder:
        # What is only renamed would be read from the base's files in one dtype for all.
        if device_map is None or _keeps_some_in_fp32(base):
            logger.info("one worker loads the base whole, to keep it as this run needs it")
            model = load()
        else:
            logger.info("one worker reads the base by parameters, to keep it under their names")
            _check_room_for_two(cache, base)
            try:
                model = load(device_map=device_map, offload_folder=folder)
            except ConfigError as error:
                if isinstance(error.__cause__, OSError | SafetensorError):  # a full disk, mostly
                    raise OSError(str(error.__cause__)) from error
                raise
        for name, tensor in model.state_dict().items():
            if name in names:
                yield name, load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _layers_on_disk(base: Any) -> dict[str, str] | None:
    """Return a device map that has the part with the decoder layers on disk, the rest in memory.

    None where no part has them, or where a parameter lies in no part.
    """
    layers = set(base._no_split_modules or ())
    parts: dict[str, Any] = dict(base.named_children())
    for name, child in base.named_children():
        if child is base.base_model:
            del parts[name]
            parts.update({f"{name}.{inner}": it for inner, it in child.named_children()})
    places = {
        name: "disk" if any(type(it).__name__ in layers for it in part.modules()) else "cpu"
        for name, part in parts.items()
    }
    covers = all(name.startswith(tuple(f"{it}." for it in places)) for name in _names(base))
    return places if covers and "disk" in places.values() else None


def _check_room_for_two(cache: Path, base: Any) -> None:
    """Raise OSError where two copies of the base, one made of the other, won't fit."""
    needed = 2 * sum(tensor.nbytes for tensor in base.state_dict().values())
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise OSError(f"{cache} has {free / GIB:.2f} GiB free for {needed / GIB:.2f} GiB")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads: one, or else those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def _map_tensors(files: list[Path], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map those of the files' tensors that the model has."""
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys() if key in wanted})  # noqa: SIM118 - no mapping
    return tensors
