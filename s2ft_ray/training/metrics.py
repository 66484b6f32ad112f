"""The metrics file: what rank 0 tells about the run, one JSON line at a time.

It is the buffer between training and whoever watches: training only ever appends to it, so a
tracking server that is slow or down can't hold a step up. A resumed run tells the steps after its
checkpoint again.
"""

import json
import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)
Value = float | int | str | list[dict[str, str]]


class MetricsLog:
    """Appends lines ``{"kind", "step", "time", ...}`` to one file.

    A line that can't be written (a full disk) is kept and written before the next one; the
    checkpoint is what stops a run on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[str] = []
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._pending.append("\n")  # the writer before was killed within a line

    def write(self, kind: str, step: int, **values: Value) -> None:
        """Append one line; `kind` is ``start``, ``train``, ``eval``, ``stop`` or ``end``."""
        line = {"kind": kind, "step": step, "time": time.time(), **values}
        self._pending.append(json.dumps(line) + "\n")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
        except OSError as error:
            logger.warning("%s: %s; %d lines wait", self._path, error, len(self._pending))
        else:
            self._pending.clear()
