"""A base with an adapter in, as a plain Hugging Face checkpoint.

Two ways, the same weights: from a loaded model, which switches the adapter in while it saves; and
from the base's files, copied and then changed matrix by matrix, for models that don't fit into
memory. Invariant: never two copies of the model in memory; the base is as it was before.
"""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import switching
from s2ft_ray.method.base_files import INDEX_NAME, checkpoint_files
from s2ft_ray.method.file_changes import Change, find_changes
from s2ft_ray.method.fingerprint import base_fingerprint_of_files
from s2ft_ray.method.weights import gather, put, stored_dim

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

SHARD_SIZE = "5GB"
"""Of a saved model: a shard on a GPU passes through the host's memory whole."""
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


def save_merged(adapter: "Adapter", model: nn.Module, folder: Path) -> None:
    """Save `model` with the adapter in through its ``save_pretrained``, then take it out."""
    switching.switch_in(model, adapter)
    try:
        plain: Any = switching.plain_model(model)
        plain.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    finally:
        switching.switch_out(model, adapter)


def merge_files(adapter: "Adapter", base: Path, folder: Path) -> None:
    """Copy the checkpoint in `base`, tokenizer and settings too, and add the deltas to its weights.

    One matrix is in memory at a time; dtypes, shards and names stay the base's. config.json comes
    last, so that a copy that was cut short is no model. Raises AdapterError where `folder` holds
    something, or the files aren't the adapter's base under the names of its modules.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder}: is not empty; name a new folder for the merged model")
    found = base_fingerprint_of_files(base)
    changes = find_changes(adapter.slices, base)
    _check_dtype(base, changes)
    if found != adapter.base.fingerprint:
        raise AdapterError(
            f"{base}: the base differs: the adapter was trained on {adapter.base.name or 'a model'}"
            f" (fingerprint {adapter.base.fingerprint[:12]}), these files have {found[:12]}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    index = [INDEX_NAME] if (base / INDEX_NAME).exists() else []
    for name in [*checkpoint_files(base), *index]:
        shutil.copyfile(base / name, folder / name)
    for change in changes:
        _add_delta(folder, change)
    copy_settings(base, folder)


def _check_dtype(base: Path, changes: Iterable[Change]) -> None:
    """Refuse files of less precision than the model loads with: the sum would be rounded."""
    document = json.loads((base / "config.json").read_text(encoding="utf-8"))
    declared = getattr(torch, str(document.get("dtype") or document.get("torch_dtype")), None)
    for stored in (change.stored for change in changes):
        if declared == torch.float32 != stored.dtype:
            raise AdapterError(
                f"{stored.tensor}: {base} stores {stored.dtype} and its config.json loads"
                f" {declared}; the merged weight needs it: load the model and export_merged from it"
            )


def copy_settings(base: Path, folder: Path) -> None:
    """Copy what `base` has beside its weights (tokenizer, templates) and `folder` hasn't yet."""
    names = {path.name for pattern in _SETTINGS for path in base.glob(pattern)}
    # The indices of files of weights: of pickled ones, and of those that aren't copied as they are.
    names = {name for name in names if not name.endswith(".index.json")}
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        if not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)


def _add_delta(folder: Path, change: Change) -> None:
    """Change one matrix of a file in place, as switching changes it in memory."""
    part, stored = change.part, change.stored
    dim, indices = stored_dim(part.side, part.transposed), part.indices.long()
    delta = part.delta.T if part.transposed else part.delta
    assert stored.dtype is not None
    data = bytearray(math.prod(stored.shape) * stored.dtype.itemsize)
    with (folder / stored.file).open("r+b") as file:
        file.seek(stored.offset)
        file.readinto(data)
        weight = torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)
        before = gather(weight, dim, indices)
        put(weight, dim, indices, (before.float() + delta).to(weight.dtype))
        file.seek(stored.offset)
        file.write(data)
