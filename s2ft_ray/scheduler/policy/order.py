"""The order of the queue: claims within quota, then priority, then fair share, then age.

Each tenant's jobs stand in one line (priority, then those that were preempted, then age); the
next job is the first in line of the tenant whose turn it is, and it is charged to that tenant
before the next turn. So a place in the order is where the job would start if nothing changed.
The cost is one heap operation a job over the number of tenants that wait.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping

from s2ft_ray.scheduler.policy.shares import Standings
from s2ft_ray.scheduler.views import JobView, PolicySettings, TenantView

Line = list[tuple[int, int, float, str, JobView]]


def effective_priority(job: JobView, tenant: TenantView) -> int:
    """Return the job's priority under its tenant's cap."""
    cap = tenant.priority_cap
    return job.priority if cap is None or job.priority < cap else cap


def build_lines(jobs: Iterable[JobView], tenants: Mapping[str, TenantView]) -> dict[str, Line]:
    """Return the jobs of each tenant in line, the first first."""
    lines: dict[str, Line] = {}
    for job in jobs:
        line = lines.get(job.tenant)
        if line is None:
            line = lines[job.tenant] = []
        priority = effective_priority(job, tenants[job.tenant])
        line.append((-priority, -(job.num_preemptions > 0), job.submitted_at, job.id, job))
    for line in lines.values():
        line.sort()
    return lines


def in_order(
    lines: Mapping[str, Line],
    tenants: Mapping[str, TenantView],
    standings: Standings,
    held: Mapping[str, int],
    settings: PolicySettings,
) -> Iterator[tuple[JobView, bool, float]]:
    """Yield every waiting job in the queue's order, whether it is a claim within quota, and the
    level of its tenant at its turn.

    `held` is the number of workers that each tenant holds. Charges each job to `standings`.
    """
    claims = dict(held)
    heads = []
    for name, line in lines.items():
        negative_priority, _, submitted_at, _, job = line[0]
        lent = claims.get(name, 0) + job.sizes[0] > tenants[name].quota
        level = standings.of[name].level
        heads.append((lent, negative_priority, level, submitted_at, name, 0))
    heapq.heapify(heads)
    unknown_s = settings.unknown_duration_s
    while heads:
        lent, _, _, _, name, place = heads[0]
        line, standing = lines[name], standings.of[name]
        job = line[place][4]
        workers = job.sizes[0]
        yield job, not lent, standing.level
        seconds = unknown_s if job.time_left_s is None else job.time_left_s
        standing.charge(standings.units(job.worker), seconds * workers)
        claims[name] = claims.get(name, 0) + workers
        place += 1
        if place == len(line):
            heapq.heappop(heads)
            continue
        negative_priority, _, submitted_at, _, job = line[place]
        lent = claims[name] + job.sizes[0] > tenants[name].quota
        head = (lent, negative_priority, standing.level, submitted_at, name, place)
        heapq.heapreplace(heads, head)
