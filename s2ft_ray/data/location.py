"""What a name in ``data.train`` or ``data.eval`` stands for.

A URL (``s3://bucket/rows.jsonl``) or a path is a file; a folder with data files, or a name that
is neither a file nor looks like one, is a data set of the Hugging Face library.
"""

import re
from pathlib import Path

from s2ft_ray.data.files import is_url, open_file
from s2ft_ray.data.source import SourceFile
from s2ft_ray.data.tables import (
    PARQUET_MAGIC,
    HubDataset,
    ParquetFile,
    is_saved_dataset,
    split_name,
)

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
DataSource = SourceFile | ParquetFile | HubDataset


def open_source(name: str, key: str) -> DataSource:
    """Open what `name` stands for; `key` is the config's key that named it. Raises DataError."""
    if _is_dataset(name):
        return HubDataset(name, key)
    with open_file(name, key) as file:
        head = file.read(len(PARQUET_MAGIC))
    return ParquetFile(name, key) if head == PARQUET_MAGIC else SourceFile(name, key)


def absolute_name(name: str) -> str:
    """Name the same thing for a process in another folder."""
    if is_url(name):
        return name
    source, split = split_name(name)
    if _is_dataset(name) and not Path(source).expanduser().is_dir():
        return name
    if split and Path(source).expanduser().is_dir():
        return f"{Path(source).expanduser().absolute()}:{split}"
    return str(Path(name).expanduser().absolute())


def _is_dataset(name: str) -> bool:
    if is_url(name):
        return False
    source, _ = split_name(name)
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = (path for suffix in FILE_SUFFIXES for path in folder.rglob(f"*{suffix}"))
        return is_saved_dataset(folder) or next(found, None) is not None
    is_name = HUB_NAME.fullmatch(source) is not None
    return is_name and not Path(name).exists() and not source.endswith(FILE_SUFFIXES)
