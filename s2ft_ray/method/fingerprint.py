"""Identities: the sha256 that tells whether a base, or an adapter, is the one that was meant.

Invariant: a base's fingerprint is the same from files, from memory, sharded or not, in fp32 or
bf16; an adapter's depends on its slices and its base's fingerprint, and on nothing else.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.parts import AdapterSlice, Replaced

_NUM_SAMPLES = 64


def fingerprint_base(
    parameters: Iterable[tuple[str, Tensor]], replaced: Mapping[str, list[Replaced]]
) -> str:
    """Hash names, shapes and 64 evenly spaced values of each parameter, rounded to bf16.

    `replaced` tells by parameter name which entries to take instead, the base's own last.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        values = _sample(whole, replaced.get(name, []))
        digest.update(f"{name} {list(whole.shape)}\n".encode())
        digest.update(_to_bytes(values.to(torch.bfloat16).view(torch.int16)))
    return digest.hexdigest()


def base_fingerprint_of_files(folder: str | Path) -> str:
    """Return the base fingerprint of a Hugging Face folder of safetensors; reads few pages.

    Equals `base_fingerprint` of the model loaded from it. Raises AdapterError where the folder
    holds no readable safetensors checkpoint.
    """
    folder = Path(folder)
    try:
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = dict(_read_tensors(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder}: no readable safetensors checkpoint: {error}") from error
    if hf_config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # the embedding under a second name
    parameters = (item for item in tensors.items() if not item[0].endswith("rotary_emb.inv_freq"))
    return fingerprint_base(parameters, {})


def fingerprint_slices(slices: Mapping[str, AdapterSlice], base_fingerprint: str) -> str:
    """Hash the sorted (module, side, indices, delta bytes) and the base's fingerprint."""
    digest = hashlib.sha256(base_fingerprint.encode())
    for name in sorted(slices):
        part = slices[name]
        digest.update(f"\n{name} {part.side} {list(part.delta.shape)}\n".encode())
        digest.update(_to_bytes(part.indices))
        digest.update(_to_bytes(part.delta))
    return digest.hexdigest()


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        document = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(document["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the handle is no mapping
                yield key, file.get_tensor(key)


def _sample(whole: Tensor, replaced: list[Replaced]) -> Tensor:
    """Return the values at 64 evenly spaced places, or all of fewer, as float32 [<= 64]."""
    size, last = whole.numel(), _NUM_SAMPLES - 1
    spaced = list(range(min(size, _NUM_SAMPLES)))
    if size > _NUM_SAMPLES:
        spaced = [i * (size - 1) // last for i in range(_NUM_SAMPLES)]
    positions = torch.tensor(spaced, dtype=torch.int64, device=whole.device)
    values = whole.reshape(-1)[positions].float()
    for entry in replaced:
        row, column = positions // whole.shape[1], positions % whole.shape[1]
        along, across = (row, column) if entry.dim == 0 else (column, row)
        at = torch.searchsorted(entry.indices, along).clamp(max=len(entry.indices) - 1)
        hit = entry.indices[at] == along
        at, across = at[hit], across[hit]
        picked = entry.values[at, across] if entry.dim == 0 else entry.values[across, at]
        values[hit] = picked.float()
    return values


def _to_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy().data
