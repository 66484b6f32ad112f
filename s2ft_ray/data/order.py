"""In which order rows (packed sequences) are trained on: the endless stream of a run.

Rows may come in groups (one for each file) with a weight, the passes over the group in an epoch.
A group's rows are taken in turn, so that a part of a pass sees other rows in the next epoch.

Invariant: an order is a function of (seed, groups, how it is mixed) and has every row of an epoch
once; what ``state_dict`` gives says what comes next.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Group = tuple[int, float]
"""How many rows, one after the other, and their weight."""
GROUP_STREAM, BUFFER_STREAM = 3, 4
"""Keep these draws apart from each other and from those of the epochs, seeded by 2-tuples."""
Rows = npt.NDArray[np.int64]


class Order(Protocol):
    """A stream of row numbers, and the place in it."""

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""

    def take(self, count: int) -> list[int]:
        """Return the next rows and move on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place, as JSON-able values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""


def num_drawn(group: Group) -> int:
    """Return the rows of a group in one epoch."""
    count, weight = group
    return max(1, round(count * weight))


class Permutation:
    """Every epoch a permutation of all rows by (seed, epoch); the position is the whole state."""

    def __init__(self, seed: int, groups: Sequence[Group]) -> None:
        self._seed, self._groups = seed, list(groups)
        self._position = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        return sum(map(num_drawn, self._groups))

    def take(self, count: int) -> list[int]:
        positions = range(self._position, self._position + count)
        self._position += count
        return [self._row_at(position) for position in positions]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = int(state["position"])

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._order, self._epoch = self._draw(epoch), epoch
        return int(self._order[index])

    def _draw(self, epoch: int) -> Rows:
        order = np.random.default_rng((self._seed, epoch)).permutation(self.num_rows)
        if all(weight == 1.0 for _, weight in self._groups):
            return order
        rows: list[Rows] = []
        start = 0
        for number, group in enumerate(self._groups):
            count = group[0]
            places = _places(group, epoch)
            for turn in range(int(places[0]) // count, int(places[-1]) // count + 1):
                seeds = (self._seed, turn, GROUP_STREAM, number)
                turned = np.random.default_rng(seeds).permutation(count)
                rows.append(start + turned[places[places // count == turn] % count])
            start += count
        return np.concatenate(rows)[order]


class ShuffleBuffer:
    """Rows as they lie in the files, mixed by a buffer of `size` rows that each is drawn from.

    Reading stays within the buffer's stretch of a file: for one that is larger than memory, on a
    disk that is slow at random places. Several files are read side by side, each evenly over the
    epoch. The buffer and its generator are part of the state.
    """

    def __init__(self, seed: int, groups: Sequence[Group], size: int) -> None:
        self._seed, self._groups, self._size = seed, list(groups), size
        self._position = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._num_read = 0
        self._buffer: list[int] = []
        self._generator = np.random.default_rng(0)

    @property
    def num_rows(self) -> int:
        return sum(map(num_drawn, self._groups))

    def take(self, count: int) -> list[int]:
        self._position += count
        return [self._next() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "epoch": self._epoch,
            "num_read": self._num_read,
            "buffer": list(self._buffer),
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = int(state["position"])
        if state["epoch"] >= 0:
            self._begin(state["epoch"])
        self._num_read, self._buffer = int(state["num_read"]), list(state["buffer"])
        self._generator.bit_generator.state = state["generator"]

    def _begin(self, epoch: int) -> None:
        self._epoch, self._order = epoch, self._reading_order(epoch)
        self._buffer = self._order[: self._size].tolist()
        self._num_read = len(self._buffer)
        self._generator = np.random.default_rng((self._seed, epoch, BUFFER_STREAM))

    def _next(self) -> int:
        if not self._buffer:
            self._begin(self._epoch + 1)
        slot = int(self._generator.integers(len(self._buffer)))
        row, last = self._buffer[slot], self._buffer.pop()
        if self._num_read < len(self._order):
            self._buffer.append(last)
            last = int(self._order[self._num_read])
            self._num_read += 1
        if slot < len(self._buffer):
            self._buffer[slot] = last
        return row

    def _reading_order(self, epoch: int) -> Rows:
        rows: list[Rows] = []
        when: list[npt.NDArray[np.float64]] = []
        start = 0
        for group in self._groups:
            places = _places(group, epoch)
            rows.append(start + places % group[0])
            when.append((np.arange(len(places)) + 0.5) / len(places))
            start += group[0]
        return np.concatenate(rows)[np.argsort(np.concatenate(when), kind="stable")]


def _places(group: Group, epoch: int) -> Rows:
    """Return an epoch's places in the endless turns over a group's rows."""
    drawn = num_drawn(group)
    return np.arange(epoch * drawn, (epoch + 1) * drawn)
