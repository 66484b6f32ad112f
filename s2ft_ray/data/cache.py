"""Encoded files, kept by digest: a file is tokenized once for all runs that want it alike.

    <cache>/<key>/rows.arrow    the encoded rows, mapped into memory by whoever reads them
    <cache>/<key>/file.json     what else is known of the file, and its first faults

The key is a digest of the file's bytes and of all that turns them into rows. Invariant: an entry
appears by rename, complete; any entry may be deleted at any time, it is then made again.
"""

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

# Of the encoding itself: raise it when the same bytes become other rows.
FORMAT_VERSION = 3
ROWS, ABOUT = "rows.arrow", "file.json"


class CacheEntry:
    """The place of one encoded file."""

    def __init__(self, cache: Path, **identity: str) -> None:
        text = json.dumps({"version": FORMAT_VERSION, **identity}, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.folder = cache / self.key
        self._partial = cache / f".{self.key}.{secrets.token_hex(4)}.partial"

    def read(self) -> dict[str, Any] | None:
        """Return what `commit` was given; None where there is no entry."""
        try:
            about: dict[str, Any] = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return about if (self.folder / ROWS).is_file() else None

    def begin(self) -> Path:
        """Return the path at which the rows are to be written."""
        self._partial.mkdir(parents=True)
        return self._partial / ROWS

    def commit(self, about: dict[str, Any]) -> None:
        """Make the entry from the rows written; where another process was first, keep its own."""
        (self._partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        try:
            self._partial.rename(self.folder)
        except OSError:
            if self.read() is None:
                raise
            self.discard()

    def discard(self) -> None:
        """Remove what was written and not committed."""
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def rows(self) -> Path:
        return self.folder / ROWS
