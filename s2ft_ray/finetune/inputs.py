"""What a run names, where it will still be found when it is started.

A job may be started hours later, again after a failure, and by another process than the one that
submitted it. Invariant: after `settle` every local path is absolute, and none of them leads into
the folder that Ray unpacks an upload into, which goes away with the session.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2ft_ray.config import RunConfig, parse_config, s2ft_home
from s2ft_ray.errors import ConfigError

_CHUNK_BYTES = 2**20
_COUNTED_BYTES = 64 * 2**20


def settle(config: RunConfig) -> RunConfig:
    """Return the run with its inputs and its storage named for good.

    Files of an upload (Ray's working_dir) are copied by digest below ``$S2FT_HOME/files``.
    Raises ConfigError where that can't be written.
    """
    document = config.to_document()
    data, model, registry = document["data"], document["model"], document["registry"]
    for owner, key in (*_train_entries(data), (data, "eval"), (model, "name_or_path")):
        owner[key] = _settle_path(owner[key])
    if registry["parent"] is not None:
        registry["parent"] = _settle_path(registry["parent"])
    registry["avoid"] = [_settle_path(ref) for ref in registry["avoid"]]
    template = data["chat_template"]
    if template and "{" not in template and Path(template).expanduser().is_file():
        data["chat_template"] = Path(template).expanduser().read_text(encoding="utf-8")
    storage = document["checkpoint"]["storage_path"]
    root = Path(storage).expanduser().absolute() if storage else s2ft_home() / "runs"
    document["checkpoint"]["storage_path"] = str(root)
    return parse_config(document)


def expected_rows(config: RunConfig) -> int | None:
    """Return about how many rows a run will go through, None where only reading all could tell.

    For the queue's estimates: of local JSONL files the lines are counted, of large ones their first
    64 MiB, of Parquet what the file says.
    """
    optim = config.optim
    if optim.max_steps is not None:
        return optim.max_steps * optim.global_batch_size
    if config.data.packing or optim.epochs is None:
        return None  # how many rows go into a sequence, nobody knows yet
    counts = [(_count_rows(Path(file.path)), file.weight) for file in config.data.train_files]
    rows = [count * weight for count, weight in counts if count is not None]
    return round(optim.epochs * sum(rows)) if len(rows) == len(counts) else None


def _count_rows(path: Path) -> int | None:
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            return int(ParquetFile(path).metadata.num_rows)
        with path.open("rb") as file:
            head = file.read(_COUNTED_BYTES)
        size = path.stat().st_size
    except (OSError, ValueError):  # what is wrong with it is told where it is checked
        return None
    if not head or head.lstrip().startswith(b"["):
        return None
    lines = head.count(b"\n") + (not head.endswith(b"\n"))
    return round(lines * size / len(head))


def _train_entries(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(data["train"], str):
        yield data, "train"
    else:
        yield from ((entry, "path") for entry in data["train"])


def _settle_path(name: str | None) -> str | None:
    """Return a name that isn't a local path unchanged, a path absolute, one of an upload kept."""
    if name is None or "://" in name:
        return name
    path = Path(os.path.abspath(Path(name).expanduser()))
    if not path.exists():
        return name
    return str(_keep(path) if _is_uploaded(path) else path)


def _is_uploaded(path: Path) -> bool:
    return any(
        folder.name.startswith("_ray_pkg_") and folder.parent.name == "working_dir_files"
        for folder in path.parents
    )


def _keep(path: Path) -> Path:
    """Copy a file or folder to where its digest says; one that is there already is the same."""
    files = s2ft_home() / "files"
    kept = files / _digest(path) / path.name
    if kept.exists():
        return kept
    partial = files / f".{secrets.token_hex(8)}.partial"
    try:
        partial.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, partial / path.name)
        else:
            shutil.copyfile(path, partial / path.name)
        partial.rename(kept.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if kept.exists():  # another submission kept the same in the meantime
            return kept
        raise ConfigError(
            f"{files}: {path.name} can't be kept there ({error.strerror}); free some space, or"
            " name a file that stays where it is"
        ) from error
    return kept


def _digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, or of a folder's names and bytes."""
    digest = hashlib.sha256()
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    for member in members:
        if member.is_file():
            digest.update(f"{member.relative_to(path.parent)}\0".encode())
            with member.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()
