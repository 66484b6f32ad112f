"""What an adapter changes in a base's files: matrix by matrix, to the byte.

Invariant: the changes found are all that the adapter makes, each in a float matrix that has the
rows and columns that it changes; where one can't be found, none is returned.

Dimensions: E experts, D out, F in, K selected.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.base_files import WHOLE, BaseFiles
from s2ft_ray.method.parts import AdapterSlice

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: str
    tensor: str
    dtype: torch.dtype | None
    """None for those that aren't plain floats: quantized ones."""
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""


@dataclass(frozen=True)
class Change:
    """One tensor of a file, and what is added to it."""

    stored: Stored
    part: AdapterSlice
    """Of this tensor: rows or columns of its own."""


def find_changes(slices: Mapping[str, AdapterSlice], base: Path) -> list[Change]:
    """Return what `slices` change in the files of `base`; AdapterError, one fault a module."""
    files = BaseFiles(base)
    headers: dict[Path, dict[str, Stored]] = {}
    changes: list[Change] = []
    faults = [] if slices else ["the adapter has no modules: nothing to merge"]
    for name, part in slices.items():
        pieces: dict[tuple[int, int], Stored] = {}
        is_experts = part.indices.dim() == 2
        for at, (path, tensor) in files.pieces(name if is_experts else f"{name}.weight").items():
            headers.setdefault(path, dict(_read_header(path)))
            pieces[at] = headers[path][tensor]
        if not pieces or any(piece.dtype is None for piece in pieces.values()):
            faults.append(
                f"{name}: {base} has no float weight of this name; the model's names or dtypes"
                " differ from its files': load the model and export_merged from it"
            )
        elif fault := _misfit(pieces, part):
            faults.append(f"{name}: {fault}")
        else:
            changes += _split(pieces, part)
    if faults:
        raise AdapterError(*faults)
    return changes


def _misfit(pieces: Mapping[tuple[int, int], Stored], part: AdapterSlice) -> str | None:
    """Compare a weight as it is stored with what the adapter changes of it."""
    if WHOLE in pieces:
        shape = list(pieces[WHOLE].shape)
        seen = [*shape[:-2], shape[-1], shape[-2]] if part.transposed else shape
    else:
        experts = {expert for expert, _ in pieces}
        rows = sum(pieces[at].shape[0] for at in pieces if at[0] == 0)
        seen = [len(experts), rows, pieces[0, 0].shape[1]]
    expected = list(part.delta.shape)
    if len(seen) == len(expected):
        expected[part.dim] = seen[part.dim]
    if seen != expected:
        return f"delta is {list(part.delta.shape)}, the weight {seen}"
    if int(part.indices.max()) >= seen[part.dim]:
        return f"index {int(part.indices.max())} is outside the weight {seen}"
    return None


def _split(pieces: Mapping[tuple[int, int], Stored], part: AdapterSlice) -> Iterator[Change]:
    """Yield the changes of a weight's pieces: its own rows of each expert, or all of it."""
    if WHOLE in pieces:
        yield Change(pieces[WHOLE], part)
        return
    start = dict.fromkeys({expert for expert, _ in pieces}, 0)
    for expert, place in sorted(pieces):
        stored = pieces[expert, place]
        first, last = start[expert], start[expert] + stored.shape[0]
        start[expert] = last
        indices, delta = part.indices[expert], part.delta[expert]
        if part.side == "in":
            own = AdapterSlice("in", indices, delta[first:last])
        else:
            inside = (indices >= first) & (indices < last)
            own = AdapterSlice("out", indices[inside] - first, delta[inside])
        if own.count:
            yield Change(stored, own)


def _read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield each tensor of a safetensors file by its name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            offset = 8 + length + entry["data_offsets"][0]
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            yield name, Stored(path.name, name, dtype, shape, offset)
