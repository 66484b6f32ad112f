"""A base whose weights stay in their files, mapped into memory, until somebody takes a part.

For bases that are sharded: FSDP copies a worker's part of a parameter and lets go of the rest, so
a worker reads its own part of the files and holds no more than that. What else it looked at are
pages of the files, shared by the workers of a machine and given up under pressure.

Invariant: what is returned equals what ``from_pretrained`` loads, ties, buffers and all; where
that can't be had by mapping (another dtype than the files', other names), nothing is returned.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from s2ft_ray.config import ModelConfig


def map_base_model(
    folder: Path, config: PretrainedConfig, model: ModelConfig
) -> PreTrainedModel | None:
    """Build the model over the files in `folder`; None where they can't be mapped as they are."""
    dtype = (config.dtype or torch.float32) if model.dtype == "auto" else model.dtype
    # Buffers are small and computed: rotary frequencies among them, which no file has.
    with init_empty_weights(include_buffers=False):
        base: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    wanted = base.state_dict()
    tensors = _map_tensors(folder, wanted)
    if any(not _is_alike(tensor, wanted[name]) for name, tensor in tensors.items()):
        return None
    base.load_state_dict(tensors, strict=False, assign=True)
    base.tie_weights()  # assigning has broken the ties
    buffers = {name for name, _ in base.named_buffers()}
    lacking = [name for name in buffers & wanted.keys() if name not in tensors]
    if lacking or any(parameter.is_meta for parameter in base.parameters()):
        return None
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    loaded: PreTrainedModel = base
    return loaded


def _map_tensors(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map those of the files' tensors that the model has."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors = {}
    for name in sorted(names):
        with safe_open(folder / name, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys() if key in wanted})  # noqa: SIM118 - no mapping
    return tensors


def _is_alike(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and tensor.dtype == wanted.dtype
