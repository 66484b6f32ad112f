"""Reads a run's ``metrics.jsonl`` while it grows.

Invariant: a line is given once, when it is whole. A torn one (a full disk, a killed writer, and
another line behind it) is passed over. Imports no torch: a driver that waits loads this.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsReader:
    """Gives the lines that came after it was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Give the lines that are new and whole, in order."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return  # still being written
                self._offset += len(text)
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and "kind" in line:
                    yield line
