"""What is asked of a job before it may queue."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from s2ft_ray.accounts import Tenant, is_inside
from s2ft_ray.config import ParallelConfig, RunConfig, parse_config, s2ft_home
from s2ft_ray.errors import ConfigError
from s2ft_ray.scheduler.models import FailureReason, Job, State, Submission
from s2ft_ray.scheduler.policy import never_fits
from s2ft_ray.scheduler.views import NodeView, WorkerShape

_LONGEST_KEY = 255
_LARGEST_PRIORITY = 1_000_000
FAILS_AGAIN: Mapping[FailureReason | None, str] = {
    FailureReason.DIVERGED: "would diverge again; lower optim.lr, and submit it anew",
    FailureReason.RUN_DEADLINE: "has used its time up; submit it anew with a longer --run-timeout",
}
"""Failures that the same job comes to again, and the way out."""


def read_config(document: Mapping[str, Any]) -> RunConfig:
    """Return the run that a document describes. Raises ConfigError with every fault in it."""
    return parse_config(dict(document), source="job")


def build_submission(
    config: RunConfig,
    tenant: Tenant,
    num_queued: int,
    nodes: Sequence[NodeView],
    *,
    idempotency_key: str,
    num_rows: int | None = None,
    queue_timeout_s: float | None = None,
    run_timeout_s: float | None = None,
) -> Submission:
    """Return what a run asks of the queue.

    Raises ConfigError where the tenant may not ask for it, or no node of the cluster ever holds
    it. An empty list of nodes (the cluster can't be seen) refuses nothing.
    """
    worker, sizes = worker_shape(config.parallel), _sizes(config.parallel)
    faults = _faults(config, tenant, num_queued, sizes[0])
    if not 1 <= len(idempotency_key) <= _LONGEST_KEY:
        faults.append(
            f"idempotency key: has {len(idempotency_key)} characters; take 1 to {_LONGEST_KEY}"
        )
    for name, seconds in (("queue", queue_timeout_s), ("run", run_timeout_s)):
        if seconds is not None and not 0 < seconds < inf:
            faults.append(f"{name} timeout: {seconds:g} is no number of seconds above 0")
    if nodes and (misfit := never_fits(nodes, worker, sizes[0])):
        faults.append(
            f"parallel: {misfit}; lower num_workers or resources_per_worker, or add nodes"
        )
    if faults:
        raise ConfigError(*faults)
    steps, batch = config.optim.max_steps, config.optim.global_batch_size
    return Submission(
        tenant=config.tenant,
        name=config.name,
        config=config.to_document(),
        idempotency_key=idempotency_key,
        priority=config.priority,
        worker=worker,
        sizes=sizes,
        base=config.model.name_or_path,
        num_rows=num_rows or (steps * batch if steps else 0),
        queue_timeout_s=queue_timeout_s,
        run_timeout_s=run_timeout_s,
    )


def default_key(config: RunConfig) -> str:
    """Return the idempotency key of a run that has none: its tenant, name and digest."""
    document = config.to_document()
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{config.tenant}/{config.name}/{digest[:32]}"


def check_resumable(job: Job, config: RunConfig, tenant: Tenant, live: Sequence[Job]) -> None:
    """Raise ConfigError for a failed job that would fail again, or may not be asked for now.

    `live` are the tenant's jobs that haven't ended.
    """
    faults: list[str] = []
    if job.failure in FAILS_AGAIN:
        faults.append(f"job {job.id}: {FAILS_AGAIN[job.failure]}")
    num_queued = sum(it.state == State.QUEUED for it in live)
    faults += _faults(config, tenant, num_queued, job.sizes[0])
    faults += [
        f"job {job.id}: {it.id} is the same run, and {it.state}; cancel that first"
        for it in live
        if it.idempotency_key == job.idempotency_key
    ]
    if faults:
        raise ConfigError(*faults)


def check_priority(priority: int, tenant: Tenant) -> None:
    """Raise ConfigError for a priority that nobody, or not the tenant, may ask for."""
    if abs(priority) > _LARGEST_PRIORITY:
        raise ConfigError(
            f"priority {priority}: take one from -{_LARGEST_PRIORITY} to {_LARGEST_PRIORITY}"
        )
    if tenant.priority_cap is not None and priority > tenant.priority_cap:
        raise ConfigError(
            f"priority {priority}: above tenant {tenant.name}'s cap of {tenant.priority_cap}"
        )


def worker_shape(parallel: ParallelConfig) -> WorkerShape:
    """Return what one worker needs."""
    resources = dict(parallel.resources_per_worker)
    if parallel.use_gpu:
        resources.setdefault("GPU", 1.0)
    return WorkerShape.of(resources, parallel.labels_per_worker)


def _sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    workers = parallel.num_workers
    if isinstance(workers, int):
        return (workers,)
    return tuple(range(workers[0], workers[1] + 1))


def _faults(config: RunConfig, tenant: Tenant, num_queued: int, num_workers: int) -> list[str]:
    faults: list[str] = []
    try:
        check_priority(config.priority, tenant)
    except ConfigError as error:
        faults += error.faults
    if tenant.max_workers is not None and num_workers > tenant.max_workers:
        faults.append(
            f"parallel.num_workers {num_workers}: tenant {tenant.name} may hold"
            f" {tenant.max_workers} workers at most"
        )
    if tenant.max_queued is not None and num_queued >= tenant.max_queued:
        faults.append(
            f"tenant {tenant.name}: {num_queued} jobs are queued, its limit is"
            f" {tenant.max_queued}; wait for one to start, or cancel one"
        )
    return faults + _data_faults(config, tenant)


def _data_faults(config: RunConfig, tenant: Tenant) -> list[str]:
    """Name the data that lies outside the roots of a tenant that has some; uploads are its own."""
    if not tenant.data_roots:
        return []
    roots = (*tenant.data_roots, str(s2ft_home() / "files"))
    named = [("data.train", file.path) for file in config.data.train_files]
    named += [("data.eval", config.data.eval)] if config.data.eval else []
    return [
        f"{key}: {name} lies in none of tenant {tenant.name}'s data roots"
        f" ({', '.join(tenant.data_roots)}); move it there, or have the operator add a root"
        for key, name in named
        if not is_inside(name, roots)
    ]
