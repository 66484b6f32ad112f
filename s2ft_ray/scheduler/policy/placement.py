"""Where gangs fit: what is free on each node, counted in whole workers.

Invariant: a worker lies on one node, and no node's free amounts go below zero. A gang goes to the
present node that it leaves least of; where no node holds it whole, to the fewest nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Self

from s2ft_ray.scheduler.views import JobView, NodeView, WorkerShape

# Ray counts resources in ten-thousandths; below that lies rounding.
_EPSILON = 1e-5
_Slots = list[int]


class Room:
    """What is free while a decision is made. Counts of workers that fit are kept by shape."""

    def __init__(self, nodes: Sequence[NodeView]) -> None:
        self._nodes = nodes
        self._present = [node.present for node in nodes]
        self._index = {node.id: position for position, node in enumerate(nodes)}
        self._free: list[dict[str, float]] = [dict(node.total) for node in nodes]
        self._slots: dict[WorkerShape, _Slots] = {}
        self._counts: dict[WorkerShape, int] = {}

    def copy(self) -> Self:
        """Return a room that changes on its own."""
        other = object.__new__(type(self))
        other._nodes, other._present, other._index = self._nodes, self._present, self._index
        other._free = [dict(free) for free in self._free]
        other._slots = {shape: list(slots) for shape, slots in self._slots.items()}
        other._counts = dict(self._counts)
        return other

    def count(self, shape: WorkerShape) -> int:
        """Return how many workers of `shape` fit."""
        known = self._counts.get(shape)
        return sum(self._slots_of(shape)) if known is None else known

    def has(self, node_id: str) -> bool:
        """Say whether the node is one of these."""
        return node_id in self._index

    def place(self, shape: WorkerShape, num_workers: int) -> dict[str, int] | None:
        """Take room for a gang and return its workers by node id; None where it doesn't fit."""
        if self.count(shape) < num_workers:
            return None
        slots = self._slots_of(shape)
        chosen = _choose(slots, self._present, num_workers)
        placement = {self._nodes[position].id: count for position, count in chosen}
        self.take(shape, placement)
        return placement

    def take(self, shape: WorkerShape, placement: Mapping[str, int]) -> None:
        """Take the room of a gang that lies there; nodes that are gone are passed over."""
        self._change(shape, placement, -1)

    def give(self, shape: WorkerShape, placement: Mapping[str, int]) -> None:
        """Give back the room of a gang that lies there."""
        self._change(shape, placement, +1)

    def _change(self, shape: WorkerShape, placement: Mapping[str, int], sign: int) -> None:
        for node_id, count in placement.items():
            position = self._index.get(node_id)
            if position is None:
                continue
            free = self._free[position]
            for name, amount in shape.resources:
                free[name] = free.get(name, 0.0) + sign * amount * count
            for known, slots in self._slots.items():
                fitting = self._fitting(known, position)
                self._counts[known] += fitting - slots[position]
                slots[position] = fitting

    def _slots_of(self, shape: WorkerShape) -> _Slots:
        slots = self._slots.get(shape)
        if slots is None:
            slots = [self._fitting(shape, position) for position in range(len(self._nodes))]
            self._slots[shape] = slots
            self._counts[shape] = sum(slots)
        return slots

    def _fitting(self, shape: WorkerShape, position: int) -> int:
        labels = self._nodes[position].labels
        if any(labels.get(key) != value for key, value in shape.labels):
            return 0
        free = self._free[position]
        fits = [int((free.get(name, 0.0) + _EPSILON) / amount) for name, amount in shape.resources]
        return max(0, min(fits, default=0))


def _choose(slots: _Slots, present: Sequence[bool], wanted: int) -> list[tuple[int, int]]:
    """Return (node's position, workers) for a gang that fits; the autoscaler's nodes come last."""
    open_nodes = [position for position, count in enumerate(slots) if count]
    here = [position for position in open_nodes if present[position]]
    if sum(slots[position] for position in here) >= wanted:
        open_nodes = here
    open_nodes.sort(key=lambda position: (not present[position], -slots[position], position))
    chosen = []
    while wanted:
        whole = [position for position in open_nodes if slots[position] >= wanted]
        if whole:
            best = min(whole, key=lambda position: (not present[position], slots[position]))
            chosen.append((best, wanted))
            break
        largest = open_nodes.pop(0)
        chosen.append((largest, slots[largest]))
        wanted -= slots[largest]
    return chosen


def kept_placement(placement: Mapping[str, int], num_workers: int) -> dict[str, int]:
    """Return where `num_workers` of a gang stay: on the nodes that hold most of it."""
    kept = {}
    for node_id, count in sorted(placement.items(), key=lambda item: (-item[1], item[0])):
        if num_workers > 0:
            kept[node_id] = min(count, num_workers)
            num_workers -= kept[node_id]
    return kept


def place_holders(room: Room, jobs: Iterable[JobView]) -> dict[str, Mapping[str, int]]:
    """Take the room of the jobs that hold workers; return where each lies, by job id.

    Workers whose node isn't known, or isn't there any more, are put where they fit, as many as do,
    after the others: unless their job ends, they are started somewhere soon.
    """
    placements: dict[str, Mapping[str, int]] = {}
    unplaced = []
    for job in jobs:
        known: Mapping[str, int] = {
            node_id: count for node_id, count in job.placement.items() if room.has(node_id)
        }
        missing = job.held_workers - sum(known.values())
        if missing < 0:  # it was relaunched with fewer
            known = kept_placement(known, job.held_workers)
        room.take(job.worker, known)
        placements[job.id] = known
        if missing > 0:
            unplaced.append((job, missing))
    for job, missing in unplaced:
        fitting = min(missing, room.count(job.worker))
        guessed = (room.place(job.worker, fitting) if fitting else None) or {}
        places = dict(placements[job.id])
        for node_id, count in guessed.items():
            places[node_id] = places.get(node_id, 0) + count
        placements[job.id] = places
    return placements


def never_fits(nodes: Sequence[NodeView], shape: WorkerShape, num_workers: int) -> str | None:
    """Return why a gang can't start even on an empty cluster, or None where it can.

    What others hold of a node now may be free tomorrow, and what the autoscaler may add counts.
    """
    empty = [replace(node, total=node.capacity or node.total) for node in nodes]
    fitting = Room(empty).count(shape)
    if fitting >= num_workers:
        return None
    totals: dict[str, float] = {}
    for node in empty:
        for name, amount in node.total.items():
            totals[name] = totals.get(name, 0.0) + amount
    there = ", ".join(f"{totals.get(name, 0.0):g} {name}" for name, _ in shape.resources)
    added = sum(not node.present for node in nodes)
    with_added = f", {added} of them still to be added by the autoscaler," if added else ""
    labelled = ""
    if shape.labels:
        wanted = ", ".join(f"{key}={value}" for key, value in shape.labels)
        those = sum(node.labels.items() >= dict(shape.labels).items() for node in nodes)
        labelled = f"; {those} of {len(nodes)} nodes carry {wanted}"
    return (
        f"{num_workers} x ({shape}) don't fit: all nodes together{with_added} have"
        f" {there or 'nothing'}, room for {fitting} such workers when empty{labelled}"
    )
