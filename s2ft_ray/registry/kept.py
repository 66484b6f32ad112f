"""The disk cache: adapters that were fetched from the registry, kept for the next time.

``$S2FT_HOME/adapters/<name>/<version>-<fingerprint>``: a version never changes, so what is here is
right; it is checked by its fingerprint whenever it is read. Invariant: removing any of it costs
another fetch and nothing else.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s2ft_ray.config import s2ft_home

_KEPT = re.compile(r"\d+-[0-9a-z]+\Z")  # not what is being fetched, nor what is being removed


def kept_folder(name: str, version: str, fingerprint: str) -> Path:
    """Return where a fetched version is kept, whether it is or not."""
    return s2ft_home() / "adapters" / name / f"{version}-{fingerprint[:16]}"


def note_read(folder: Path) -> None:
    """Remember that an adapter was wanted now, so that others are removed before it."""
    if folder.exists():
        os.utime(folder)


@dataclass(frozen=True)
class KeptAdapter:
    """A version whose files were fetched and are still here."""

    name: str
    version: int
    base_fingerprint: str
    size_bytes: int
    wanted_at: float
    """Seconds since the epoch, of the last time."""


def list_kept() -> list[KeptAdapter]:
    """Return the versions in the cache, by name and version; none that can't be read."""
    kept = []
    for wanted_at_ns, size_bytes, folder in _kept():
        try:
            text = (folder / "adapter_config.json").read_text(encoding="utf-8")
            base_fingerprint = str(json.loads(text)["base"]["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged: it is fetched again
            continue
        version = int(folder.name.partition("-")[0])
        name, wanted_at = folder.parent.name, wanted_at_ns / 1e9
        kept.append(KeptAdapter(name, version, base_fingerprint, size_bytes, wanted_at))
    return sorted(kept, key=lambda it: (it.name, it.version))


def trim_kept(size_bytes: int) -> int:
    """Remove the adapters that were wanted longest ago until the rest fits; return what it takes.

    The one that was wanted last stays, whatever its size.
    """
    kept = sorted(_kept())
    used = sum(size for _, size, _ in kept)
    for _, size, folder in kept[:-1]:
        if used <= size_bytes:
            break
        _remove(folder)
        used -= size
    return used


def _kept() -> Iterator[tuple[int, int, Path]]:
    """Yield when each was wanted last, in ns, its bytes and its folder."""
    for folder in s2ft_home().joinpath("adapters").glob("*/*"):
        if _KEPT.match(folder.name):
            try:
                yield folder.stat().st_mtime_ns, _size_bytes(folder), folder
            except FileNotFoundError:  # another process has removed it
                continue


def forget_kept(folder: Path) -> bool:
    """Remove a damaged copy, so that it is fetched again; False where `folder` is the original."""
    if not folder.is_relative_to(s2ft_home() / "adapters"):
        return False
    _remove(folder)
    return True


def _remove(folder: Path) -> None:
    # out of the way first: who looks meanwhile finds all of it or nothing
    gone = folder.with_name(f"removed-{uuid.uuid4().hex}")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
