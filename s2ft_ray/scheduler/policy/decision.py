"""One decision: who starts, who is stopped, who is resized, and why the others wait."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from s2ft_ray.scheduler.policy.backfill import Release, Reservation
from s2ft_ray.scheduler.policy.elastic import (
    freed_placement,
    grow,
    shrink_for,
)
from s2ft_ray.scheduler.policy.order import build_lines, effective_priority, in_order
from s2ft_ray.scheduler.policy.placement import Room, kept_placement, place_holders
from s2ft_ray.scheduler.policy.preemption import (
    Holder,
    build_holders,
    can_be_stopped,
    cause_to_stop,
    choose_victims,
    ran_long_enough,
)
from s2ft_ray.scheduler.policy.shares import (
    Standings,
    advance,
    expected_left_s,
    lift_entrants,
)
from s2ft_ray.scheduler.policy.waits import Waits
from s2ft_ray.scheduler.views import (
    Admit,
    JobView,
    Plan,
    PolicySettings,
    Preempt,
    PreemptCause,
    Resize,
    Snapshot,
    TenantView,
    Usage,
    WaitCause,
    WorkerShape,
)

# Of the jobs that don't fit, so many of the first may have others stopped for them in one tick.
_MOST_PREEMPTORS = 16


@dataclass
class World:
    """The snapshot, sorted: what is held, what is free, how the tenants stand."""

    tenants: dict[str, TenantView]
    holders: list[Holder]
    held: dict[str, int]
    room: Room
    empty_room: Room
    standings: Standings
    usages: dict[str, Usage]


@dataclass
class Outcome:
    """What the walk over the queue found."""

    admissions: list[Admit]
    waits: Waits
    blocked: list[tuple[JobView, bool]]
    """The first jobs that wait for workers, and whether each is a claim within quota."""
    admitted_tenants: set[str]
    level: float
    """The highest level at which a job was admitted."""
    highest: str
    """The tenant of that job."""


def decide(snapshot: Snapshot, now: float) -> Plan:
    """Return what to do at `now`. The same snapshot and time give the same plan."""
    world = build_world(snapshot, now)
    ready: list[JobView] = []
    resting: list[JobView] = []
    for job in snapshot.jobs:
        if job.state == "queued":
            later = job.not_before is not None and job.not_before > now
            (resting if later else ready).append(job)
    lines = build_lines(ready, world.tenants)
    claiming = {name for name, line in lines.items() if _can_claim(world, line[0][4])}
    lift_entrants(world.standings, world.usages, claiming, world.tenants.values())
    levels = {name: standing.level for name, standing in world.standings.of.items()}
    order = in_order(lines, world.tenants, world.standings, dict(world.held), snapshot.settings)
    outcome = Outcome([], Waits(), [], set(), 0.0, "")
    if snapshot.draining:
        for job, _, _ in order:
            outcome.waits.add(job, "drain")
    else:
        walk(order, world, snapshot, now, outcome)
    for job in resting:
        outcome.waits.add(job, "backoff")
    preemptions, resizes = make_room(outcome, world, snapshot, now)
    if not snapshot.draining and not outcome.blocked:
        others = {name: levels[name] for name in set(levels) - outcome.admitted_tenants}
        world.standings.raise_entries(world.usages, others, outcome.level, outcome.highest)
        resizes += grow(
            world.holders,
            world.tenants,
            world.held,
            world.standings,
            world.room,
            now,
            snapshot.settings,
        )
    return Plan(outcome.admissions, preemptions, resizes, outcome.waits, world.usages)


def build_world(snapshot: Snapshot, now: float) -> World:
    """Sort a snapshot; a tenant that nobody described has weight 1 and no quota."""
    tenants = {tenant.name: tenant for tenant in snapshot.tenants}
    for name in {job.tenant for job in snapshot.jobs} - set(tenants):
        tenants[name] = TenantView(name)
    holding = [job for job in snapshot.jobs if job.state != "queued"]
    held: dict[str, int] = {}
    for job in holding:
        held[job.tenant] = held.get(job.tenant, 0) + job.held_workers
    empty_room = Room(snapshot.nodes)
    room = empty_room.copy()
    placements = place_holders(room, holding)
    usages = advance(tenants.values(), holding, now, snapshot.settings.half_life_s)
    standings = Standings(snapshot.nodes, tenants.values(), usages)
    standings.commit(holding, now, snapshot.settings)
    holders = build_holders(holding, tenants, placements)
    return World(tenants, holders, held, room, empty_room, standings, usages)


def walk(
    order: Iterable[tuple[JobView, bool, float]],
    world: World,
    snapshot: Snapshot,
    now: float,
    outcome: Outcome,
) -> None:
    """Go through the queue in order: admit what fits and may pass, tell the others why not."""
    room, held, settings = world.room, world.held, snapshot.settings
    limits = {name: tenant.max_workers for name, tenant in world.tenants.items()}
    limited: set[str] = set()
    started: list[Release] = []
    reservation: Reservation | None = None
    for job, within_quota, level in order:
        shape, needs, tenant = job.worker, job.sizes[0], job.tenant
        free = room.count(shape)
        limit = limits[tenant]
        cause: WaitCause = "workers" if needs > free else "order"
        if limit is not None and (tenant in limited or held.get(tenant, 0) + needs > limit):
            # Its tenant's later jobs don't pass it: small ones would keep it at the limit.
            cause = "too large" if needs > limit else "limit"
            if cause == "limit":
                limited.add(tenant)
        elif needs <= free:
            until = now + expected_left_s(job, now, settings)
            if reservation is not None and job.time_left_s is None:
                until = inf  # who doesn't know its end can't promise to be gone
            placement = _place(room, reservation, shape, needs, until)
            if placement is not None:
                outcome.admissions.append(Admit(job.id, needs, placement))
                outcome.admitted_tenants.add(tenant)
                if level > outcome.level:
                    outcome.level, outcome.highest = level, tenant
                held[tenant] = held.get(tenant, 0) + needs
                started.append(Release(until, shape, placement))
                continue
        elif needs > world.empty_room.count(shape):
            cause = "too large"
        elif reservation is None:
            reservation = Reservation(job, room, started + _releases(world, now, settings))
        if len(outcome.blocked) < _MOST_PREEMPTORS and cause in ("workers", "order"):
            outcome.blocked.append((job, within_quota))
        outcome.waits.add(job, cause, free)


def make_room(
    outcome: Outcome, world: World, snapshot: Snapshot, now: float
) -> tuple[list[Preempt], list[Resize]]:
    """Stop or shrink jobs for those that wait and may ask for it.

    The room of jobs that are stopping already counts as free, so nobody is stopped twice over, and
    so does that of jobs near their end, which is waited for.
    """
    settings = snapshot.settings
    if not outcome.blocked:
        return [], []
    future = world.room.copy()
    for holder in world.holders:
        job, freed = holder.job, holder.placement
        if job.state == "preempting":
            freed = freed_placement(freed, job.next_workers)
        elif expected_left_s(job, now, settings) >= settings.near_end_s:
            continue
        future.give(job.worker, freed)
    stoppable = [holder for holder in world.holders if can_be_stopped(holder.job, settings)]
    stoppable.sort(key=lambda holder: holder.cost)
    lowest = min((holder.priority for holder in stoppable), default=0)
    preemptions: list[Preempt] = []
    resizes: list[Resize] = []
    for place, (job, within_quota) in enumerate(outcome.blocked):
        priority = effective_priority(job, world.tenants[job.tenant])
        if place and not within_quota and priority <= lowest:
            continue
        if future.count(job.worker) < job.min_workers:
            shrunk = shrink_for(job, stoppable, future, now, settings)
            resizes += shrunk
            causes = (
                {} if shrunk else _causes(stoppable, job, priority, within_quota, now, settings)
            )
            victims = choose_victims(job, [h for h in stoppable if h.job.id in causes], future)
            preemptions += [Preempt(h.job.id, job.id, causes[h.job.id]) for h in victims]
            taken = {h.job.id for h in victims} | {resize.job_id for resize in shrunk}
            stoppable = [h for h in stoppable if h.job.id not in taken]
        future.place(job.worker, job.min_workers)
    return preemptions, resizes


def _place(
    room: Room, reservation: Reservation | None, shape: WorkerShape, needs: int, until: float
) -> dict[str, int] | None:
    """Take room for a gang that fits, where the reservation allows it until then."""
    if reservation is not None and not reservation.may_allow(shape, needs, until):
        return None
    placement = room.place(shape, needs)
    assert placement is not None
    if reservation is None or reservation.allows(shape, placement, until):
        return placement
    room.give(shape, placement)
    return None


def _can_claim(world: World, job: JobView) -> bool:
    limit = world.tenants[job.tenant].max_workers
    if limit is not None and world.held.get(job.tenant, 0) + job.sizes[0] > limit:
        return False
    return job.sizes[0] <= world.empty_room.count(job.worker)


def _releases(world: World, now: float, settings: PolicySettings) -> list[Release]:
    releases = []
    for holder in world.holders:
        job, placement = holder.job, holder.placement
        if job.state == "preempting":
            freed = freed_placement(placement, job.next_workers)
            releases.append(Release(now, job.worker, freed))
            placement = kept_placement(placement, job.next_workers)
        at = now + expected_left_s(job, now, settings)
        releases.append(Release(at, job.worker, placement))
    return releases


def _causes(
    stoppable: Iterable[Holder],
    job: JobView,
    priority: int,
    within_quota: bool,
    now: float,
    settings: PolicySettings,
) -> dict[str, PreemptCause]:
    """Return whom `job` may have stopped, by job id, and why."""
    causes = {}
    for holder in stoppable:
        cause = cause_to_stop(holder, job, priority, within_quota)
        if cause == "priority" or (cause and ran_long_enough(holder.job, now, settings)):
            causes[holder.job.id] = cause
    return causes
