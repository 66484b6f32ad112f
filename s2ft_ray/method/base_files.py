"""A base's checkpoint on disk, under the names and in the shapes that the loaded model has.

Some files differ: per-expert matrices that the model fuses, other names, a missing prefix, masks
that older versions saved. The table of architectures says so, family by family.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.architectures import ARCHITECTURES, Architecture, Files

INDEX_NAME = "model.safetensors.index.json"
_Piece = tuple[int, int]
"""(expert, place among the projections that are fused): where a matrix is in a parameter."""
WHOLE = (-1, -1)


class BaseFiles:
    """The tensors of a Hugging Face folder; each is read when it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Look into `folder`; AdapterError where it holds no readable safetensors checkpoint."""
        self._folder = Path(folder)
        try:
            hf_config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
            self._sources = self._find(hf_config)
        except (OSError, ValueError, SafetensorError) as error:
            raise self._unreadable(error) from error

    @property
    def names(self) -> list[str]:
        """Return the names of the model's parameters, sorted."""
        return sorted(self._sources)

    def read(self, name: str) -> Tensor:
        """Return a parameter; AdapterError where the files lack it or a part of it."""
        if name not in self._sources:
            raise AdapterError(f"{self._folder}: holds no {name}")
        try:
            pieces = {at: _read(*source) for at, source in self._sources[name].items()}
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        if WHOLE in pieces:
            return pieces[WHOLE]
        num_experts = 1 + max(expert for expert, _ in pieces)
        num_fused = 1 + max(place for _, place in pieces)
        if len(pieces) != num_experts * num_fused:
            raise AdapterError(f"{self._folder}: {name} lacks the matrices of some experts")
        experts = range(num_experts)
        return torch.stack([torch.cat([pieces[e, i] for i in range(num_fused)]) for e in experts])

    def pieces(self, name: str) -> dict[tuple[int, int], tuple[Path, str]]:
        """Return the file and the tensor of each matrix of a parameter, by (expert, place).

        A parameter that is stored whole has one piece, `WHOLE`; one that isn't there has none.
        """
        return self._sources.get(name, {})

    def _find(self, hf_config: dict[str, Any]) -> dict[str, dict[_Piece, tuple[Path, str]]]:
        """Return where each parameter's pieces are: by name, then by piece (file, tensor)."""
        model_type = hf_config.get("model_type")
        architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        files = architecture.files if architecture else Files()
        found = {files.model_name(name): (path, name) for path, name in self._list()}
        if not any(name.startswith(files.prefix) for name in found):
            missing = [name for name in found if not name.startswith("lm_head.")]
            found |= {files.prefix + name: found.pop(name) for name in missing}
        if hf_config.get("tie_word_embeddings"):
            found.pop("lm_head.weight", None)  # the embedding under a second name
        sources: dict[str, dict[_Piece, tuple[Path, str]]] = {}
        for name, source in found.items():
            if not name.endswith(files.ignored):
                parameter, piece = _locate(name, architecture)
                sources.setdefault(parameter, {})[piece] = source
        return sources

    def _list(self) -> Iterator[tuple[Path, str]]:
        for file in checkpoint_files(self._folder):
            with safe_open(self._folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                    yield self._folder / file, name

    def _unreadable(self, error: Exception) -> AdapterError:
        return AdapterError(f"{self._folder}: no readable safetensors checkpoint: {error}")


def checkpoint_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a Hugging Face folder."""
    index = folder / INDEX_NAME
    if not index.exists():
        return ["model.safetensors"]
    document = json.loads(index.read_text(encoding="utf-8"))
    return sorted(set(document["weight_map"].values()))


def _locate(name: str, architecture: Architecture | None) -> tuple[str, _Piece]:
    """Return the model's parameter that a tensor is of, and which piece of it."""
    for block in architecture.feed_forward if architecture else ():
        for projection, path in block.files.items():
            pattern = rf"(.*\.\d+\.){re.escape(path)}\.weight".replace(r"\{\}", r"(\d+)")
            if match := re.fullmatch(pattern, name):
                fused = [
                    p for p in block.files if block.projections[p] == block.projections[projection]
                ]
                layer, expert = match[1], int(match[2])
                return layer + block.projections[projection], (expert, fused.index(projection))
    return name, WHOLE


def _read(path: Path, name: str) -> Tensor:
    # Opened for one tensor: what a file has mapped is freed when it is closed.
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
