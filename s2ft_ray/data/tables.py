"""Rows that are stored as tables: Parquet files and data sets of the Hugging Face library.

They have no lines; their rows are numbered from 1, and a fault names the row.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from s2ft_ray.data.files import digest_file, open_file
from s2ft_ray.data.source import Record
from s2ft_ray.errors import DataError

PARQUET_MAGIC = b"PAR1"
ROWS_PER_READ = 1_000
DEFAULT_SPLITS = {"data.train": "train", "data.eval": "validation"}


class ParquetFile:
    """A Parquet file, local or behind a URL; read in batches, never whole."""

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._key = key

    @cached_property
    def sha256(self) -> str:
        """Digest of the file's bytes, in hex."""
        return digest_file(self.path, self._key)

    def records(self) -> Iterator[Record]:
        """Read the rows in order. Raises DataError where the file is damaged."""
        number = 0
        with open_file(self.path, self._key) as file:
            try:
                for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_READ):
                    for fields in batch.to_pylist():
                        number += 1
                        yield Record(number, fields, None, f"row {number}")
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{self.path}: is no sound Parquet file (after row {number}):"
                    f" {' '.join(str(error).split())}"
                ) from error


class HubDataset:
    """One split of a data set that ``datasets`` loads: a name of the hub, or a local folder.

    `name` may end in ``:SPLIT``; without it data.train takes train and data.eval validation.
    """

    def __init__(self, name: str, key: str) -> None:
        self.path = name
        source, split = split_name(name)
        split = split or DEFAULT_SPLITS[key]
        try:
            # A cached hub data set is used where the hub can't be reached.
            loaded = (
                datasets.load_from_disk(source)
                if is_saved_dataset(Path(source))
                else datasets.load_dataset(source)
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{key}: {name}: is no file here, and no data set that can be loaded:"
                f" {_told(error)}; name a file, a folder with data files, or a data set"
                " of the hub"
            ) from error
        if isinstance(loaded, datasets.Dataset):
            self._rows = loaded
            return
        if split not in loaded:
            known = ", ".join(f"{source}:{one}" for one in loaded)
            raise DataError(f"{key}: {name}: has no split {split}; name one of {known}")
        self._rows = loaded[split]

    @cached_property
    def sha256(self) -> str:
        """Digest over the rows as JSON, in hex."""
        digest = hashlib.sha256()
        for fields in self._rows:
            digest.update(json.dumps(fields, default=str).encode())
        return digest.hexdigest()

    def records(self) -> Iterator[Record]:
        """Read the rows in order."""
        for number, fields in enumerate(self._rows, 1):
            yield Record(number, fields, None, f"row {number}")


def split_name(name: str) -> tuple[str, str | None]:
    """Take a split's name off: ``squad:validation`` is (squad, validation)."""
    source, colon, split = name.rpartition(":")
    return (source, split) if colon and split.isidentifier() else (name, None)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote `folder`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _told(error: BaseException) -> str:
    """Return the first line of what `error` says; of a file that can't be read, the cause's."""
    if type(error) is datasets.exceptions.DatasetGenerationError and error.__cause__:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
