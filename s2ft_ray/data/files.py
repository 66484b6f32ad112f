"""The bytes of a data file, local or behind a URL that fsspec knows (s3://, gs://, memory://).

Invariant: a file that can't be opened or read is a DataError that names the config's key, the
file and the reason.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from s2ft_ray.errors import DataError

WANTED = "name a JSONL, JSON or Parquet file"


def is_url(name: str) -> bool:
    """Return whether `name` is for fsspec."""
    return "://" in name


@contextmanager
def open_file(name: str, key: str) -> Iterator[BinaryIO]:
    """Open `name` for reading; `key` is the config's key that named it.

    Raises DataError, also for what the block meets while it reads.
    """
    with _open(name, key) as file:
        try:
            yield file
        except OSError as error:
            raise _unreadable(name, key, error) from error


def _open(name: str, key: str) -> BinaryIO:
    local = Path(name).expanduser()
    try:
        if is_url(name):
            return cast(BinaryIO, fsspec.open(name, "rb").open())
        return local.open("rb")
    except FileNotFoundError:
        sought = "" if is_url(name) else f" (looked for {local.absolute()})"
        raise DataError(f"{key}: {name}: no such file{sought}; {WANTED}") from None
    except IsADirectoryError:
        raise DataError(f"{key}: {name} is a folder; {WANTED} in it") from None
    except OSError as error:
        raise _unreadable(name, key, error) from error
    except Exception as error:  # what a file system of fsspec raises is its own affair
        reason = " ".join(str(error).split())
        raise DataError(f"{key}: {name}: can't be opened: {reason}") from error


def _unreadable(name: str, key: str, error: OSError) -> DataError:
    return DataError(f"{key}: {name}: can't be read: {error.strerror or error}")


def digest_file(name: str, key: str) -> str:
    """Return the sha256 of the bytes, in hex."""
    digest = hashlib.sha256()
    with open_file(name, key) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
