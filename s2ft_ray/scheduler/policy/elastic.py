"""Elastic jobs: they start with the fewest workers, grow while nobody waits, shrink when asked.

Invariant: a job grows only while no job waits for workers, and is left alone for a time after
each start, so growing and shrinking can't chase each other.
"""

from collections.abc import Iterable, Mapping, Sequence

from s2ft_ray.scheduler.policy.placement import Room, kept_placement
from s2ft_ray.scheduler.policy.preemption import Holder, can_be_stopped, ran_long_enough
from s2ft_ray.scheduler.policy.shares import Standings
from s2ft_ray.scheduler.views import JobView, PolicySettings, Resize, TenantView


def freed_placement(placement: Mapping[str, int], num_workers: int) -> dict[str, int]:
    """Return what a gang gives back when `num_workers` of it stay."""
    kept = kept_placement(placement, num_workers)
    freed = {node_id: count - kept.get(node_id, 0) for node_id, count in placement.items()}
    return {node_id: count for node_id, count in freed.items() if count}


def shrink_for(
    job: JobView, holders: Iterable[Holder], room: Room, now: float, settings: PolicySettings
) -> list[Resize]:
    """Return the resizes that let `job` fit, their room given to `room`; none where all won't do.

    Workers above the fewest are lent: whoever is first in the queue gets them.
    """
    resizes: list[Resize] = []
    given = []
    for holder in sorted(holders, key=lambda holder: holder.cost):
        it = holder.job
        if it.num_workers <= it.min_workers or not can_be_stopped(it, settings):
            continue
        if not ran_long_enough(it, now, settings):
            continue
        for size in (size for size in reversed(it.sizes) if size < it.num_workers):
            freed = freed_placement(holder.placement, size)
            room.give(it.worker, freed)
            fits = room.count(job.worker) >= job.min_workers
            if fits or size == it.min_workers:
                kept = kept_placement(holder.placement, size)
                resizes.append(Resize(it.id, size, kept, "workers wanted"))
                given.append((it.worker, freed))
                break
            room.take(it.worker, freed)
        if room.count(job.worker) >= job.min_workers:
            return resizes
    for shape, freed in given:
        room.take(shape, freed)
    return []


def grow(
    holders: Sequence[Holder],
    tenants: Mapping[str, TenantView],
    held: Mapping[str, int],
    standings: Standings,
    room: Room,
    now: float,
    settings: PolicySettings,
) -> list[Resize]:
    """Return the resizes that put idle workers to use, tenants of the lowest level first."""
    resizes = []
    claimed = dict(held)
    for holder in sorted(holders, key=lambda holder: standings.of[holder.job.tenant].level):
        job = holder.job
        if job.state != "running" or job.num_workers >= job.sizes[-1] or job.started_at is None:
            continue
        if job.time_left_s is None or job.time_left_s < settings.grow_min_left_s:
            continue
        if now - job.started_at < settings.grow_after_s:
            continue
        limit = tenants[job.tenant].max_workers
        most = job.num_workers + room.count(job.worker)
        if limit is not None:
            most = min(most, job.num_workers + limit - claimed.get(job.tenant, 0))
        size = max((size for size in job.sizes if size <= most), default=0)
        extra = size - job.num_workers
        if extra <= 0:
            continue
        added = room.place(job.worker, extra)
        assert added is not None
        placement = dict(holder.placement)
        for node_id, count in added.items():
            placement[node_id] = placement.get(node_id, 0) + count
        claimed[job.tenant] = claimed.get(job.tenant, 0) + extra
        resizes.append(Resize(job.id, size, placement, "idle workers"))
    return resizes
