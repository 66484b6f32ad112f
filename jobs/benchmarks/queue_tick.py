"""What one decision costs, at growing numbers of jobs: pure arithmetic on one core."""

import random
import time
from collections.abc import Iterator

from s2ft_ray.scheduler.policy import decide, expected_starts
from s2ft_ray.scheduler.views import JobView, NodeView, Snapshot, TenantView, Usage, WorkerShape

TENANTS = 200
ROUNDS = 5
NOW = 1e9
_SHAPES = [WorkerShape.of({"GPU": 1, "CPU": cpus}) for cpus in (2, 4, 8)]


def measure_ticks(queued: list[int]) -> Iterator[dict[str, float]]:
    """Yield the times, in ms of this process, for so many queued jobs and a tenth running."""
    for number in queued:
        snapshot = busy_snapshot(number, number // 10)
        times = []
        for _ in range(ROUNDS):
            started = time.process_time()
            decide(snapshot, NOW)
            times.append((time.process_time() - started) * 1e3)
        started = time.process_time()
        expected_starts(snapshot, NOW)
        yield {
            "queued": number,
            "running": number // 10,
            "tenants": TENANTS,
            "nodes": len(snapshot.nodes),
            "tick_ms": min(times),
            "worst_ms": max(times),
            "estimates_ms": (time.process_time() - started) * 1e3,
        }


def busy_snapshot(num_queued: int, num_running: int, seed: int = 0) -> Snapshot:
    """Return a full cluster: nodes of 8 GPUs, running jobs on them, the rest waits."""
    rng = random.Random(seed)
    tenants = [
        TenantView(
            f"tenant{number}",
            weight=rng.choice([1, 1, 2, 4]),
            quota=rng.choice([0, 0, 4]),
            usage=Usage({"GPU": rng.random() * 1e6, "CPU": rng.random() * 1e6}, at=NOW),
        )
        for number in range(TENANTS)
    ]
    jobs, slot = [], 0
    for number in range(num_running):
        workers = rng.choice([1, 2, 4])
        placement: dict[str, int] = {}
        for _ in range(workers):
            node = f"node{slot // 8}"
            placement[node] = placement.get(node, 0) + 1
            slot += 1
        jobs.append(_job(rng, f"r{number}", workers, placement))
    jobs += [_job(rng, f"q{n}", rng.choice([1, 2, 4, 8, 16]), {}) for n in range(num_queued)]
    nodes = [NodeView(f"node{n}", {"GPU": 8, "CPU": 64}) for n in range(slot // 8 + 2)]
    return Snapshot(jobs, tenants, nodes)


def _job(rng: random.Random, name: str, workers: int, placement: dict[str, int]) -> JobView:
    return JobView(
        id=name,
        tenant=f"tenant{rng.randrange(TENANTS)}",
        state="running" if placement else "queued",
        worker=rng.choice(_SHAPES),
        sizes=(workers,),
        submitted_at=NOW - rng.random() * 1e5,
        priority=rng.choice([0, 0, 0, 1]),
        time_left_s=rng.random() * 36000,
        num_workers=workers if placement else 0,
        started_at=NOW - rng.random() * 1e4 if placement else None,
        placement=placement,
    )
