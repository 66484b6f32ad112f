"""The reservation of the first job that doesn't fit, and who may pass it (EASY backfill).

The reservation is the earliest time at which the gang fits once the jobs that hold workers have
ended as expected. Invariant: given right estimates no job that passes delays it: a passing job
has ended by then, or leaves room for the gang at that time.
"""

from collections.abc import Iterable, Mapping
from math import inf
from typing import NamedTuple

from s2ft_ray.scheduler.policy.placement import Room
from s2ft_ray.scheduler.views import JobView, WorkerShape


class Release(NamedTuple):
    """Room that comes free at a time."""

    at: float
    shape: WorkerShape
    placement: Mapping[str, int]


class Reservation:
    """A gang's claim to room that comes free later."""

    def __init__(self, job: JobView, room: Room, releases: Iterable[Release]) -> None:
        self._shape, self._workers = job.worker, job.min_workers
        self._room = room.copy()
        self._refused: dict[WorkerShape, int] = {}
        self.at = inf
        self._room.count(self._shape)
        for release in sorted(releases, key=lambda release: release.at):
            if self.at < inf and release.at > self.at:
                break
            self._room.give(release.shape, release.placement)
            if self.at == inf and self._room.count(self._shape) >= self._workers:
                self.at = release.at

    def may_allow(self, shape: WorkerShape, num_workers: int, until: float) -> bool:
        """Say whether it is worth finding a place for such a gang: a smaller one was refused."""
        return until <= self.at or num_workers < self._refused.get(shape, num_workers + 1)

    def allows(self, shape: WorkerShape, placement: Mapping[str, int], until: float) -> bool:
        """Say whether a gang placed there until then leaves the reservation as it is.

        A gang that is allowed and stays longer is remembered.
        """
        if until <= self.at:
            return True
        self._room.take(shape, placement)
        if self._room.count(self._shape) >= self._workers:
            return True
        self._room.give(shape, placement)
        self._refused[shape] = sum(placement.values())
        return False
