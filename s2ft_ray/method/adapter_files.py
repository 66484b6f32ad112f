"""An adapter on disk: ``adapter_config.json`` beside ``adapter_model.safetensors``, no pickle.

Invariant: what `read` returns is whole and consistent in itself, down to its fingerprint; any
damage is an AdapterError that names the file and the fault. Files appear by a rename, the
configuration last, so that a folder that was cut short has none or one that doesn't match.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method.fingerprint import fingerprint_slices
from s2ft_ray.method.parts import AdapterSlice, BaseInfo

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PEFT_TYPE = "S2FT"


def write(adapter: "Adapter", folder: Path) -> None:
    """Write both files into `folder`, which is made where it is missing."""
    document = {
        "peft_type": _PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "base": asdict(adapter.base),
        "config": adapter.config.model_dump(mode="json"),
        "modules": {name: _describe(part) for name, part in adapter.slices.items()},
        "training": adapter.training,
        "fingerprint": adapter.fingerprint,
    }
    tensors = {}
    for name, part in adapter.slices.items():
        tensors[f"{name}.indices"] = part.indices.contiguous()
        tensors[f"{name}.delta"] = part.delta.contiguous()
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_files(
        folder,
        {
            TENSORS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
            CONFIG_NAME: text.encode(),
        },
    )


def read(folder: Path) -> tuple[dict[str, AdapterSlice], BaseInfo, S2FTConfig, dict[str, Any]]:
    """Return what an Adapter is made of; AdapterError names every fault of the files."""
    document = _read_document(folder / CONFIG_NAME)
    base, config = _parse_base(folder, document), _parse_config(folder, document)
    modules = _parse_modules(folder, document)
    tensors = _read_tensors(folder / TENSORS_NAME)
    _raise_faults(folder / TENSORS_NAME, _check_tensors(modules, tensors))
    slices = {
        name: AdapterSlice(
            entry["side"],
            tensors[f"{name}.indices"],
            tensors[f"{name}.delta"],
            entry.get("size"),
            entry.get("transposed", False),
        )
        for name, entry in modules.items()
    }
    fingerprint = fingerprint_slices(slices, base.fingerprint)
    if fingerprint != document.get("fingerprint"):
        raise AdapterError(
            f"{folder}: the fingerprint of the files is {fingerprint[:12]},"
            f" {CONFIG_NAME} says {str(document.get('fingerprint'))[:12]}: one of them was changed"
        )
    return slices, base, config, document.get("training", {})


def _describe(part: AdapterSlice) -> dict[str, Any]:
    entry = {"side": part.side, "count": part.count, "size": part.size}
    return {**entry, "transposed": True} if part.transposed else entry


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all files beside their places, then rename them in order."""
    written: list[tuple[str, str]] = []
    try:
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            written.append((temporary, name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that others can't read
        for temporary, name in written:
            os.replace(temporary, folder / name)
    finally:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise AdapterError(f"{path}: holds {type(document).__name__}, not an object")
    if document.get("peft_type") != _PEFT_TYPE:
        raise AdapterError(
            f"{path}: peft_type is {document.get('peft_type')!r}, not {_PEFT_TYPE!r}:"
            " another method's adapter"
        )
    if document.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format_version is {document.get('format_version')!r};"
            f" this package reads {FORMAT_VERSION}"
        )
    if not isinstance(document.get("training", {}), dict):
        raise AdapterError(f"{path}: training is not an object")
    return document


def _parse_base(folder: Path, document: dict[str, Any]) -> BaseInfo:
    match document.get("base"):
        case {
            "name": str() | None as name,
            "revision": str() | None as revision,
            "fingerprint": str() as fingerprint,
        } if re.fullmatch("[0-9a-f]{64}", fingerprint):
            return BaseInfo(name, revision, fingerprint)
    raise AdapterError(
        f"{folder / CONFIG_NAME}: base is not {{name, revision, fingerprint}} with a sha256"
    )


def _parse_config(folder: Path, document: dict[str, Any]) -> S2FTConfig:
    config = document.get("config")
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG_NAME}: config is not an object")
    try:
        return S2FTConfig(**config)
    except ConfigError as error:
        faults = (f"{folder / CONFIG_NAME}: config: {fault}" for fault in error.faults)
        raise AdapterError(*faults) from error


def _parse_modules(folder: Path, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    path = folder / CONFIG_NAME
    modules = document.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise AdapterError(f"{path}: modules is not an object with at least one module")
    for name, entry in modules.items():
        match entry:
            case {"side": "in" | "out", "count": int() as count} if count > 0 and _is_size(
                entry.get("size"), count
            ):
                continue
        raise AdapterError(
            f"{path}: modules.{name} is not {{side: in | out, count: 1 or more, size: count or"
            " more}"
        )
    return modules


def _is_size(size: object, count: int) -> bool:
    # Not in the fingerprint, so it may be missing, but never smaller than what it holds.
    return size is None or (type(size) is int and size >= count)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path}: can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise AdapterError(f"{path}: truncated, or no safetensors file: {error}") from error
    return tensors


def _check_tensors(modules: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> Iterator[str]:
    expected = {f"{name}.{part}" for name in modules for part in ("indices", "delta")}
    for key in sorted(tensors.keys() - expected):
        yield f"{key} belongs to no module of {CONFIG_NAME}"
    for key in sorted(expected - tensors.keys()):
        yield f"{key} is missing"
    for name, entry in modules.items():
        indices, delta = tensors.get(f"{name}.indices"), tensors.get(f"{name}.delta")
        if indices is None or delta is None:
            continue
        if fault := _check_indices(indices, entry["count"], entry.get("size")):
            yield f"{name}.indices {fault}"
        if fault := _check_delta(delta, entry["side"], indices):
            yield f"{name}.delta {fault}"


def _check_indices(indices: Tensor, count: int, size: int | None) -> str | None:
    if indices.dtype != torch.int32:
        return f"is {indices.dtype}, not int32"
    if indices.dim() not in (1, 2) or indices.shape[-1] != count or not len(indices):
        shape = f"[{count}], or [experts, {count}]"
        return f"has shape {list(indices.shape)}, {CONFIG_NAME} says {shape}"
    if int(indices.min()) < 0 or bool((indices.diff() <= 0).any()):
        return "is not ascending from 0 on, each index once"
    if size is not None and int(indices.max()) >= size:
        return f"has index {int(indices.max())}, {CONFIG_NAME} says a weight of {size}"
    return None


def _check_delta(delta: Tensor, side: str, indices: Tensor) -> str | None:
    if delta.dtype != torch.float32:
        return f"is {delta.dtype}, not float32"
    *experts, count = indices.shape
    along = -1 if side == "in" else -2
    if (
        delta.dim() != indices.dim() + 1
        or list(delta.shape[:-2]) != experts
        or delta.shape[along] != count
    ):
        expected = [*experts, "out", count] if side == "in" else [*experts, count, "in"]
        shape = f"[{', '.join(map(str, expected))}]"
        return f"has shape {list(delta.shape)}, {CONFIG_NAME} says {shape}"
    if not bool(delta.isfinite().all()):
        return "holds NaN or infinity"
    return None


def _raise_faults(path: Path, faults: Iterator[str]) -> None:
    lines = [f"{path}: {fault}" for fault in faults]
    if lines:
        raise AdapterError(*lines)
