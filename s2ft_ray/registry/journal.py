"""What a run owes MLflow, and how far it has been delivered: ``tracking.json`` in the run folder.

The file holds an outbox, an ordered list of entries of which the first ``settled`` are delivered,
and for each kind of line in ``metrics.jsonl`` the last step delivered.

Invariant: what is owed is on disk before MLflow is asked, and is marked as delivered only after
MLflow has taken it. A killed driver therefore loses nothing; what it delivers a second time is
the same point or value again, which MLflow keeps once.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

KINDS = ("train", "eval")
"""Of the lines that are points; others tell of the run's course and are not numbers of a step."""
EntryKind = Literal["params", "tags", "dataset", "metrics", "artifact", "status"]


@dataclass(frozen=True)
class Entry:
    """One thing that MLflow is to hold."""

    kind: EntryKind
    payload: dict[str, Any]


@dataclass
class Point:
    """One line of ``metrics.jsonl``: the numbers of one step, of one kind."""

    kind: str
    step: int
    time: float
    values: dict[str, float]


@dataclass
class _State:
    run_id: str | None = None
    outbox: list[dict[str, Any]] = field(default_factory=list)
    settled: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)


class Journal:
    """The outbox of one run folder; safe to use from the driver and its delivery thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._state = _State(**json.loads(path.read_text())) if path.exists() else _State()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._state.run_id

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever owed here."""
        return not self._state.outbox

    @property
    def started_at(self) -> float:
        """When the run began, in unix seconds: the time of its first status."""
        with self._lock:
            statuses = (e["payload"] for e in self._state.outbox if e["kind"] == "status")
            return float(next(statuses)["time"])

    @property
    def last_steps(self) -> dict[str, int]:
        """For each kind of point the last step that was delivered."""
        with self._lock:
            return dict(self._state.last_steps)

    def owe(self, *entries: Entry) -> None:
        """Add to what is to be delivered."""
        with self._lock:
            self._state.outbox += [asdict(entry) for entry in entries]
            self._save()

    def next_entry(self) -> Entry | None:
        """Return the first entry that isn't delivered yet."""
        with self._lock:
            if self._state.settled == len(self._state.outbox):
                return None
            return Entry(**self._state.outbox[self._state.settled])

    def settle_entry(self) -> None:
        """Mark that entry as delivered."""
        with self._lock:
            self._state.settled += 1
            self._save()

    def settle_points(self, points: list[Point]) -> None:
        """Mark points as delivered."""
        with self._lock:
            for point in points:
                last = self._state.last_steps.get(point.kind, point.step)
                self._state.last_steps[point.kind] = max(last, point.step)
            self._save()

    def begin(self, run_id: str) -> None:
        """Deliver to `run_id`; where that is another run than before, everything is owed again."""
        with self._lock:
            if run_id != self._state.run_id:
                self._state.run_id = run_id
                self._state.settled = 0
                self._state.last_steps = {}
                self._save()

    def _save(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_text(json.dumps(asdict(self._state), indent=1))
            os.replace(partial, self.path)
        except OSError as error:  # a full disk is the checkpoint's to report; this can wait
            log.warning("%s can't be written now: %s", self.path, error)


class MetricsFile:
    """Reads ``metrics.jsonl`` while it grows; a line counts once it ends in a newline."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self, last_steps: dict[str, int], limit: int) -> list[Point]:
        """Return up to `limit` new points in their order, without those already delivered.

        A resumed run writes the steps after its checkpoint once more: a step of a kind counts
        the first time.
        """
        last_steps = dict(last_steps)
        points: list[Point] = []
        for line, end in self._lines():
            self._offset = end
            point = _parse_point(line)
            if point is None or point.kind not in KINDS:
                continue
            if point.step <= last_steps.get(point.kind, -1):
                continue
            last_steps[point.kind] = point.step
            points.append(point)
            if len(points) == limit:
                break
        return points

    def rewind(self) -> None:
        """Read from the beginning again: what was read last was not delivered."""
        self._offset = 0

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                yield line, file.tell()


def _parse_point(line: bytes) -> Point | None:
    # A writer that was killed leaves a torn line, and its successor goes on behind it.
    try:
        fields = json.loads(line)
        step, time, kind = int(fields.pop("step")), float(fields.pop("time")), fields.pop("kind")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    values = {
        key: float(value)
        for key, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Point(str(kind), step, time, values)
