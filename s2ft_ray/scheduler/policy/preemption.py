"""Who is stopped for a job that can't wait: by higher priority, or to reclaim lent quota.

Invariants: a job within its tenant's quota is stopped for its own tenant's jobs only; a job near
its end is left to finish; no more jobs are stopped than the gang needs. No ping-pong: a claim
within quota stops lent workers only, and a stopped job that had lent workers is no claim within
quota afterwards; a higher priority stops lower ones only. So a victim can never stop, in its
turn, the job that it was stopped for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from s2ft_ray.scheduler.policy.order import effective_priority
from s2ft_ray.scheduler.policy.placement import Room
from s2ft_ray.scheduler.views import JobView, PolicySettings, PreemptCause, TenantView


@dataclass(frozen=True, slots=True)
class Holder:
    """A job that holds workers, as a possible victim."""

    job: JobView
    priority: int
    within_quota: bool
    placement: Mapping[str, int]

    @property
    def cost(self) -> tuple[int, float, int, float]:
        """What sorts victims: the lowest priority, least progress lost, fewest stops, newest."""
        job = self.job
        lost = job.progress_lost_s * job.num_workers
        return self.priority, lost, job.num_preemptions, -(job.started_at or 0.0)


def build_holders(
    jobs: Iterable[JobView],
    tenants: Mapping[str, TenantView],
    placements: Mapping[str, Mapping[str, int]],
) -> list[Holder]:
    """Return the jobs that hold workers, those within their tenant's quota marked.

    Quota covers a tenant's jobs of the highest priority first, then the oldest; of an elastic
    job it covers the fewest workers, the others are lent.
    """
    ranked = sorted(
        jobs,
        key=lambda job: (
            -effective_priority(job, tenants[job.tenant]),
            job.started_at or 0.0,
            job.id,
        ),
    )
    covered: dict[str, int] = {}
    holders = []
    for job in ranked:
        tenant = tenants[job.tenant]
        sum_with_it = covered.get(job.tenant, 0) + job.min_workers
        within_quota = sum_with_it <= tenant.quota
        if within_quota:
            covered[job.tenant] = sum_with_it
        priority = effective_priority(job, tenant)
        holders.append(Holder(job, priority, within_quota, placements[job.id]))
    return holders


def can_be_stopped(job: JobView, settings: PolicySettings) -> bool:
    """Say whether stopping `job` now is worth it at all."""
    near_end = job.time_left_s is not None and job.time_left_s < settings.near_end_s
    return job.state != "preempting" and not near_end


def ran_long_enough(job: JobView, now: float, settings: PolicySettings) -> bool:
    """Say whether `job` had its time since it started, so that stopping it isn't mere loss."""
    return job.started_at is not None and now - job.started_at >= settings.min_run_s


def cause_to_stop(
    holder: Holder, job: JobView, priority: int, within_quota: bool
) -> PreemptCause | None:
    """Return why `holder` may be stopped for `job`, or None where it may not."""
    if holder.job.tenant == job.tenant:
        return "priority" if priority > holder.priority else None
    if holder.within_quota:
        return None
    if within_quota:
        return "quota"
    return "priority" if priority > holder.priority else None


def choose_victims(job: JobView, candidates: Sequence[Holder], room: Room) -> list[Holder]:
    """Return the fewest cheap holders whose room lets `job` fit; none where all would not do.

    `candidates` come cheapest first. Gives the victims' room to `room`.
    """
    chosen = []
    for holder in candidates:
        if room.count(job.worker) >= job.min_workers:
            break
        room.give(holder.job.worker, holder.placement)
        chosen.append(holder)
    if room.count(job.worker) < job.min_workers:
        for holder in chosen:
            room.take(holder.job.worker, holder.placement)
        return []
    for holder in list(reversed(chosen)):  # the dearest first: is it needed at all?
        room.take(holder.job.worker, holder.placement)
        if room.count(job.worker) >= job.min_workers:
            chosen.remove(holder)
        else:
            room.give(holder.job.worker, holder.placement)
    return chosen
