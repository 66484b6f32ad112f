"""How long a job will take, and when it will start: computed beside the tick, from what was seen.

Both are guesses that get truer: durations come from jobs that were measured, starts from the
durations of everything ahead. A start assumes that nobody is passed or stopped; backfill makes
it earlier, a job of higher priority later.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from s2ft_ray.scheduler.policy.decision import build_world
from s2ft_ray.scheduler.policy.order import build_lines, in_order
from s2ft_ray.scheduler.policy.shares import expected_left_s
from s2ft_ray.scheduler.views import JobView, Snapshot, TenantView, WorkerShape

# The newest measurements of a kind that are looked at: a cluster changes.
_NEWEST = 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one attempt of a job showed."""

    tenant: str
    base: str
    """The base model's name."""
    worker: WorkerShape
    rows: int
    """Training rows that it went through."""
    worker_seconds: float
    """Spent on them, over all workers."""
    startup_s: float
    """From its admission to its first step."""


def expected_duration_s(
    tenant: str,
    base: str,
    worker: WorkerShape,
    rows: int,
    num_workers: int,
    measured: Sequence[Measurement],
) -> float | None:
    """Return how long a job of `rows` rows will hold its workers, or None where nothing is known.

    `measured` is in order of time. Measurements of the same base on the same workers count, those
    of the same tenant alone where there are any: tenants' rows differ in length.
    """
    similar = [it for it in measured if it.base == base and it.worker == worker and it.rows > 0]
    own = [it for it in similar if it.tenant == tenant]
    seen = (own or similar)[-_NEWEST:]
    if not seen:
        return None
    per_row = median(it.worker_seconds / it.rows for it in seen)
    return median(it.startup_s for it in seen) + per_row * rows / num_workers


def expected_starts(snapshot: Snapshot, now: float) -> dict[str, float]:
    """Return when each queued job is expected to start, in seconds since the epoch, by job id.

    Jobs that can never start are left out. Nothing starts while the cluster is drained.
    """
    if snapshot.draining:
        return {}
    world = build_world(snapshot, now)
    settings, room = snapshot.settings, world.room
    limits = _Limits(world.tenants.values())
    ends: list[tuple[float, int, JobView, Mapping[str, int]]] = []
    for number, holder in enumerate(world.holders):
        at = now + expected_left_s(holder.job, now, settings)
        ends.append((at, -number, holder.job, holder.placement))
        limits.hold(holder.job.tenant, holder.job.held_workers, at)
    heapq.heapify(ends)
    queued = [job for job in snapshot.jobs if job.state == "queued"]
    lines = build_lines(queued, world.tenants)
    order = in_order(lines, world.tenants, world.standings, world.held, settings)
    starts: dict[str, float] = {}
    clock = now
    for number, (job, _, _) in enumerate(order, 1):
        needs = job.min_workers
        allowed_at = limits.free_at(job.tenant, needs)
        if allowed_at is None or needs > world.empty_room.count(job.worker):
            continue
        while ends and room.count(job.worker) < needs:
            end, _, ended, placement = heapq.heappop(ends)
            clock = max(clock, end)
            room.give(ended.worker, placement)
        start = max(clock, allowed_at, job.not_before or 0.0)
        end = start + expected_left_s(job, now, settings)
        limits.hold(job.tenant, needs, end)
        starts[job.id] = start
        # One that waits for its tenant alone is passed: it takes its room from nobody here.
        if start == clock and (place := room.place(job.worker, needs)) is not None:
            heapq.heappush(ends, (end, number, job, place))
    return starts


class _Limits:
    """When tenants with a limit of workers will be far enough under it."""

    def __init__(self, tenants: Iterable[TenantView]) -> None:
        self._most = {it.name: it.max_workers for it in tenants if it.max_workers is not None}
        self._held = dict.fromkeys(self._most, 0)
        self._ends: dict[str, list[tuple[float, int]]] = {name: [] for name in self._most}

    def hold(self, tenant: str, num_workers: int, until: float) -> None:
        if tenant in self._most:
            self._held[tenant] += num_workers
            heapq.heappush(self._ends[tenant], (until, num_workers))

    def free_at(self, tenant: str, num_workers: int) -> float | None:
        """Return when the tenant may hold so many more; None: never. Asked in order of time."""
        most = self._most.get(tenant)
        if most is None:
            return 0.0
        if num_workers > most:
            return None
        at = 0.0
        while self._held[tenant] + num_workers > most:
            at, ended = heapq.heappop(self._ends[tenant])
            self._held[tenant] -= ended
        return at
