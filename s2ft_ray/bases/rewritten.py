"""A base's weights as a run needs them, where its files have another dtype or other names.

    <cache>/<key>/<n>.safetensors    a tensor each, as ``from_pretrained`` would have it in memory
    <cache>/<key>/written.json       how many there are; the last file of an entry

They are written once on a machine, by the first worker that asks, and mapped by all its workers
and by later runs, so that no worker holds the whole base. The key is a digest of the files' headers
and ends, the configuration, the dtype and the version of transformers. Invariant: an entry appears
by rename, complete; any entry may be deleted at any time, it is then made again.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import transformers
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)
# Of the entries: raise it when the same files become other tensors.
FORMAT_VERSION = 1
PROGRESS_S = 10.0
GIB = 2**30
PARTIAL = ".partial"
"""The end of the names of what is being written; what is left of it is removed after a day."""
_LEFT_S = 86_400.0
_END_BYTES = 2**16
_WRITTEN = "written.json"


class RewrittenWeights:
    """The place of one base's weights in one dtype."""

    def __init__(self, cache: Path, files: Iterable[Path], **identity: str) -> None:
        """`files` are the base's. Raises OSError where they can't be read."""
        self._base_files = list(files)
        self._base = _identify(self._base_files)
        text = json.dumps(
            {
                "version": FORMAT_VERSION,
                "transformers": transformers.__version__,
                "base": self._base,
                **identity,
            },
            sort_keys=True,
        )
        key = hashlib.sha256(text.encode()).hexdigest()
        self._folder, self._lock = cache / key, cache / f".{key}.lock"
        self._partial = cache / f".{key}.{secrets.token_hex(4)}{PARTIAL}"

    def lock(self) -> FileLock:
        """Return the lock under which `files` is asked and `write` called.

        It spares work where it holds; an entry is right without it, too.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._lock)

    def files(self) -> list[Path] | None:
        """Return the files of the weights; None where they are still to be written."""
        try:
            written = json.loads((self._folder / _WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        files = sorted(self._folder.glob("*.safetensors"))
        return files if len(files) == written["files"] else None

    def write(self, tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> None:
        """Write the weights, one at a time; `num_bytes` is how much they are.

        Raises OSError, and then leaves nothing behind.
        """
        for left in self._folder.parent.glob(f".*{PARTIAL}"):
            if left.stat().st_mtime < time.time() - _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(self._folder.parent).free
        if free < num_bytes:
            raise OSError(
                f"{self._folder.parent} has {free / GIB:.2f} GiB free for"
                f" {num_bytes / GIB:.2f} GiB of weights"
            )
        self._partial.mkdir()
        try:
            self._write(tensors)
            if _identify(self._base_files) != self._base:
                raise OSError("the base's files were replaced while they were read")
            shutil.rmtree(self._folder, ignore_errors=True)  # what somebody deleted parts of
            self._partial.rename(self._folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        except OSError:
            if self.files() is None:  # else another machine was first
                raise
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        logger.info(
            "the base is kept as this run needs it: %.2f GiB in %s", num_bytes / GIB, self._folder
        )

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        told, size, count = time.monotonic(), 0, 0
        for name, tensor in tensors:
            path = self._partial / f"{count}.safetensors"
            save_file({name: tensor.contiguous()}, path)
            _sync(path)
            size, count = size + tensor.nbytes, count + 1
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                logger.info("%.1f GiB of the base are rewritten", size / GIB)
        written = self._partial / _WRITTEN
        written.write_text(json.dumps({"files": count}), encoding="utf-8")
        _sync(written)


def _identify(files: list[Path]) -> list[list[str | int]]:
    """Tell files apart by what costs nothing to read: their sizes, headers and ends."""
    found: list[list[str | int]] = []
    for path in files:
        with path.open("rb") as file:
            header = file.read(8 + int.from_bytes(file.read(8), "little"))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            digest = hashlib.sha256(header + file.read()).hexdigest()
        found.append([path.name, size, digest])
    return found


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
