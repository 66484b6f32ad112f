"""A base's weights as a run needs them, where its files have another dtype or other names.

    <cache>/<key>/<n>.safetensors    a tensor each, as ``from_pretrained`` would have it in memory

They are written once on a machine, by the first worker that asks, and mapped by all its workers
and by later runs, so that no worker holds the whole base. The key is a digest of the files'
identity and of what is asked for. Invariant: an entry appears by rename, complete; any entry may
be deleted at any time, it is then made again.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)
# Of the entries: raise it when the same files become other tensors.
FORMAT_VERSION = 1
PROGRESS_S = 10.0
GIB = 2**30


class RewrittenWeights:
    """The place of one base's weights in one dtype."""

    def __init__(self, cache: Path, files: Iterable[Path], **identity: str) -> None:
        stats = [(str(path.resolve()), path.stat()) for path in files]
        known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        document = {"version": FORMAT_VERSION, "files": known, **identity}
        text = json.dumps(document, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self._folder, self._partial = cache / key, cache / f".{key}.partial"
        self._lock = cache / f".{key}.lock"

    def lock(self) -> FileLock:
        """Return the lock under which `files` is asked and `write` called."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._lock)

    def files(self) -> list[Path] | None:
        """Return the files of the weights; None where they are still to be written."""
        return sorted(self._folder.glob("*.safetensors")) if self._folder.is_dir() else None

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write the weights, one at a time. Raises OSError, and then leaves nothing behind."""
        shutil.rmtree(self._partial, ignore_errors=True)  # of a process that died
        self._partial.mkdir()
        told, size = time.monotonic(), 0
        try:
            for number, (name, tensor) in enumerate(tensors):
                save_file({name: tensor.contiguous()}, self._partial / f"{number}.safetensors")
                size += tensor.numel() * tensor.element_size()
                if time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    logger.info("%.1f GiB of the base are rewritten", size / GIB)
            self._partial.rename(self._folder)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        logger.info(
            "the base is kept as this run needs it: %.2f GiB in %s", size / GIB, self._folder
        )
