"""Small worlds for the queue's policy: nodes of CPU slots, jobs of one line."""

from typing import Any

from s2ft_ray.scheduler.views import JobView, NodeView, Snapshot, TenantView, WorkerShape

NOW = 1_000_000.0
CPU = WorkerShape.of({"CPU": 1})


def node(slots: int, name: str = "n0", **changes: Any) -> NodeView:
    return NodeView(name, {"CPU": float(slots)}, **changes)


def queued(name: str, tenant: str = "acme", workers: int = 1, **changes: Any) -> JobView:
    values = {"sizes": (workers,), "submitted_at": NOW - 100, "time_left_s": 3600.0, **changes}
    return JobView(name, tenant, "queued", values.pop("worker", CPU), **values)


def running(
    name: str, tenant: str = "acme", workers: int = 1, left_s: float | None = 3600.0, **changes: Any
) -> JobView:
    values = {
        "sizes": (workers,),
        "submitted_at": NOW - 7200,
        "started_at": NOW - 3600,
        "num_workers": workers,
        "state": "running",
        **changes,
    }
    return JobView(name, tenant, worker=values.pop("worker", CPU), time_left_s=left_s, **values)


def world(
    *jobs: JobView, slots: int = 4, tenants: tuple[TenantView, ...] = (), **changes: Any
) -> Snapshot:
    return Snapshot(jobs, tenants, changes.pop("nodes", [node(slots)]), **changes)
