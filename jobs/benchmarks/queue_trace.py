"""Synthetic months of many tenants' fine-tunes on one cluster.

Three kinds of tenants: steady ones submit by day more than by night, campaigners submit days of
their share at once, small ones now and then. Invariant: the work adds up to `demand` of the
capacity, and no job is more than 5% of what the cluster does in a day.
"""

from dataclasses import dataclass

import numpy as np

from s2ft_ray.scheduler.views import NodeView, TenantView, WorkerShape

HOUR, DAY = 3600.0, 86400.0
# The largest job's part of a day's capacity.
LARGEST = 0.05
LONGEST_HOURS = 12.0
_SIZES, _SIZE_ODDS = (1, 2, 4, 8), (0.45, 0.27, 0.18, 0.1)
_SHAPES = [WorkerShape.of({"GPU": 1, "CPU": cpus}) for cpus in (2, 4, 8)]
_WORKERS_A_NODE = 8


@dataclass(frozen=True)
class TraceJob:
    """A job as it is submitted."""

    id: str
    tenant: str
    worker: WorkerShape
    sizes: tuple[int, ...]
    work_s: float
    """Worker-seconds of training."""
    submitted_at: float
    priority: int
    estimate_factor: float | None
    """Estimated over true length; None: nobody knows."""


@dataclass(frozen=True)
class Trace:
    """A cluster, its tenants and what they submit."""

    nodes: tuple[NodeView, ...]
    tenants: tuple[TenantView, ...]
    jobs: tuple[TraceJob, ...]
    duration_s: float

    @property
    def num_workers(self) -> int:
        """How many workers the cluster holds."""
        return int(sum(node.total["GPU"] for node in self.nodes))


def build_trace(
    days: float,
    num_tenants: int = 20,
    num_nodes: int = 8,
    demand: float = 0.95,
    mean_hours: float = 2.5,
    seed: int = 0,
) -> Trace:
    """Return `days` of submissions; the same arguments give the same trace."""
    rng = np.random.default_rng(seed)
    nodes = tuple(
        NodeView(f"node{i}", {"GPU": _WORKERS_A_NODE, "CPU": 64.0}) for i in range(num_nodes)
    )
    tenants = tuple(_tenant(position, rng) for position in range(num_tenants))
    duration_s = days * DAY
    num_workers = num_nodes * _WORKERS_A_NODE
    largest_s = LARGEST * num_workers * DAY
    wanted = demand * num_workers * duration_s
    weights = np.array([tenant.weight for tenant in tenants])
    # Campaigners want twice their share, the small ones little, so that somebody always waits.
    appetite = weights * np.resize([2.0, 1.0, 0.35], num_tenants)
    budgets = wanted * appetite / appetite.sum()
    jobs = []
    for position, (tenant, budget) in enumerate(zip(tenants, budgets, strict=True)):
        sizes, works = _draw_work(rng, budget, mean_hours, largest_s)
        arrivals = _draw_arrivals(rng, position % 3, len(works), duration_s)
        for number, (size, work, at) in enumerate(zip(sizes, works, arrivals, strict=True)):
            jobs.append(_job(rng, tenant, number, int(size), float(work), float(at)))
    jobs.sort(key=lambda job: job.submitted_at)
    return Trace(nodes, tenants, tuple(jobs), duration_s)


def _tenant(position: int, rng: np.random.Generator) -> TenantView:
    quota = 4 if position % 5 == 2 else 0
    limit = 24 if position % 5 == 3 else None
    weight = float(rng.choice([1, 1, 2, 4]))
    return TenantView(f"tenant{position:02}", weight, quota, limit, priority_cap=10)


def _draw_work(
    rng: np.random.Generator, budget: float, mean_hours: float, largest_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes and worker-seconds that add up to `budget`."""
    most = int(budget / (mean_hours * HOUR)) + 50
    sizes = rng.choice(_SIZES, size=most, p=_SIZE_ODDS)
    hours = rng.lognormal(np.log(mean_hours) - 0.5, 1.0, size=most)
    works = np.minimum(sizes * np.clip(hours, 0.1, LONGEST_HOURS) * HOUR, largest_s)
    count = int(np.searchsorted(np.cumsum(works), budget)) + 1
    return sizes[:count], works[:count] * (budget / works[:count].sum())


def _draw_arrivals(
    rng: np.random.Generator, kind: int, count: int, duration_s: float
) -> np.ndarray:
    if kind == 0:  # campaigns of about three days' work each
        num_campaigns = max(1, int(duration_s / (3 * DAY)))
        starts = np.sort(rng.uniform(0, duration_s * 0.95, num_campaigns))
        return np.sort(starts[rng.integers(num_campaigns, size=count)] + rng.uniform(0, 600, count))
    if kind == 1:  # four times as busy by day as by night
        times = rng.uniform(0, duration_s, 4 * count)
        busy = 0.625 + 0.375 * np.sin(2 * np.pi * times / DAY)
        return np.sort(times[rng.uniform(size=len(times)) < busy][:count])
    return np.sort(rng.uniform(0, duration_s, count))


def _job(
    rng: np.random.Generator, tenant: TenantView, number: int, size: int, work: float, at: float
) -> TraceJob:
    elastic = size > 1 and rng.random() < 0.2
    known = rng.random() < 0.9
    return TraceJob(
        id=f"{tenant.name}-{number:05}",
        tenant=tenant.name,
        worker=_SHAPES[rng.integers(len(_SHAPES))],
        sizes=tuple(range(max(1, size // 2), size + 1)) if elastic else (size,),
        work_s=work,
        submitted_at=at,
        priority=10 if rng.random() < 0.02 else 0,
        estimate_factor=float(rng.lognormal(0.0, 0.2)) if known else None,
    )
