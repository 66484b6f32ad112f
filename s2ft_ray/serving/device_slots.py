"""Adapters on the device: rows of one pool, given out by bytes.

A row holds what one selected column or row of one module changes: of input-side slices (o, down)
the delta's column, of output-side slices (q k v up gate) the delta's row; either way it is as wide
as the model. So the pool is one tensor [R, D] whatever an adapter selects, and an adapter is one
range of rows. Nothing is padded to the widest adapter.

Invariant: rows of an adapter that somebody uses are never given to another one.
Dimensions: R rows of the pool, D hidden size, K selected of a module.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter
from s2ft_ray.method.parts import Side
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey


@dataclass(frozen=True, slots=True)
class SlotPart:
    """A module's rows: among those of its adapter, or in the pool."""

    side: Side
    start: int
    count: int


@dataclass(eq=False, frozen=True, slots=True, weakref_slot=True)
class Layout:
    """Where the modules of an adapter lie among its rows. Adapters that are alike share one."""

    parts: dict[str, SlotPart]

    @property
    def num_rows(self) -> int:
        """How many rows that takes."""
        return sum(part.count for part in self.parts.values())


@dataclass(eq=False, slots=True)
class Slot:
    """An adapter's place on the device."""

    key: AdapterKey
    start: int
    length: int
    layout: Layout
    since: float
    last_used: float
    num_users: int = 0
    is_pinned: bool = False
    is_draining: bool = False
    """Takes no new users: another adapter waits for its rows."""


class DeviceSlots:
    """The pool and who has which rows. Used from one thread; `copy_in` may run in another."""

    def __init__(
        self,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        size_bytes: int,
        events: AdapterEvents,
    ) -> None:
        """Reserve `size_bytes` of the device, at least one row."""
        row_bytes = hidden_size * dtype.itemsize + 8
        num_rows = max(1, size_bytes // row_bytes)
        # Not zeros: nobody reads a row before it is filled, and the CPU gives out memory by use.
        self.rows = torch.empty(num_rows, hidden_size, dtype=dtype, device=device)
        """[R, D]"""
        self.places = torch.empty(num_rows, dtype=torch.int64, device=device)
        """[R]: the column or row of its module's weight that each row changes."""
        self._row_bytes = row_bytes
        self._slots: dict[AdapterKey, Slot] = {}
        self._layouts: WeakValueDictionary[tuple[tuple[str, SlotPart], ...], Layout]
        self._layouts = WeakValueDictionary()
        self._events = events

    @property
    def size_bytes(self) -> int:
        """What the pool takes of the device."""
        return self.rows.shape[0] * self._row_bytes

    @property
    def used_bytes(self) -> int:
        """What of it belongs to an adapter."""
        return sum(slot.length for slot in self._slots.values()) * self._row_bytes

    def slot_bytes(self, slot: Slot) -> int:
        """What of the device one slot takes."""
        return slot.length * self._row_bytes

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def find(self, key: AdapterKey) -> Slot | None:
        """Return the adapter's slot, if it has one."""
        return self._slots.get(key)

    def check_fits(self, key: AdapterKey, adapter: Adapter) -> None:
        """Raise AdapterError unless the empty pool could hold the adapter."""
        for name, part in adapter.slices.items():
            if part.delta.dim() != 2:
                raise AdapterError(
                    f"{key}: {name} changes experts, which can't be served in a mixed batch;"
                    " s2ft export --format merged makes a model of its own"
                )
            width = part.delta.shape[0 if part.side == "in" else 1]
            if width != self.rows.shape[1]:
                raise AdapterError(
                    f"{key}: {name} changes rows of {width} values, the slots hold"
                    f" {self.rows.shape[1]}"
                )
        needed = sum(part.count for part in adapter.slices.values())
        if needed > self.rows.shape[0]:
            raise AdapterError(
                f"{key}: takes {needed * self._row_bytes:,} bytes of the device, the slots have"
                f" {self.size_bytes:,}; serve it with more slot bytes"
            )

    def layout_of(self, adapter: Adapter) -> Layout:
        """Return where the adapter's modules will lie among its rows."""
        parts, at = {}, 0
        for name, part in adapter.slices.items():
            parts[name] = SlotPart(part.side, at, part.count)
            at += part.count
        return self._layouts.setdefault(tuple(parts.items()), Layout(parts))

    def allocate(self, key: AdapterKey, layout: Layout) -> Slot | None:
        """Give an adapter rows, at the cost of the least recently used ones that nobody uses.

        None where those in use leave no range that is long enough. The rows are still to be
        filled by `copy_in`.
        """
        needed = layout.num_rows
        start = self._find_gap(needed)
        idle = sorted(
            (slot for slot in self if not slot.num_users and not slot.is_pinned),
            key=lambda slot: slot.last_used,
        )
        evicted = []
        while start is None and idle:
            slot = idle.pop(0)
            evicted.append(slot)
            del self._slots[slot.key]
            start = self._find_gap(needed)
        for slot in evicted:  # those that are in nobody's way stay, and so do all if it was in vain
            if start is None or slot.start >= start + needed or slot.start + slot.length <= start:
                self._slots[slot.key] = slot
            else:
                self._events.add(slot.key, "eviction")
        if start is None:
            return None
        now = time.monotonic()
        slot = Slot(key, start, needed, layout, since=now, last_used=now)
        self._slots[key] = slot
        return slot

    def copy_in(self, slot: Slot, adapter: Adapter) -> None:
        """Fill the slot's rows."""
        for name, part in adapter.slices.items():
            place = slot.layout.parts[name]
            rows = slice(slot.start + place.start, slot.start + place.start + place.count)
            delta: Tensor = part.delta.T if part.side == "in" else part.delta
            self.rows[rows].copy_(delta)
            self.places[rows].copy_(part.indices)
        if self.rows.is_cuda:  # the steps read on a stream of their own
            torch.cuda.current_stream(self.rows.device).synchronize()

    def free(self, slot: Slot) -> None:
        """Give the rows of a slot that nobody uses back."""
        assert not slot.num_users, f"{slot.key} is in use"
        self._slots.pop(slot.key, None)

    def _find_gap(self, needed: int) -> int | None:
        at = 0
        for slot in sorted(self._slots.values(), key=lambda slot: slot.start):
            if slot.start - at >= needed:
                return at
            at = max(at, slot.start + slot.length)
        return at if self.rows.shape[0] - at >= needed else None
