"""What people and drivers are told of a job: plain values, times in ISO 8601, UTC."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from s2ft_ray.scheduler.models import Event, Job, State, UsageRow
from s2ft_ray.scheduler.policy.placement import kept_placement
from s2ft_ray.scheduler.views import Wait


def job_answer(job: Job, wait: Wait | None, expected_start: float | None) -> dict[str, Any]:
    """Return a job as ``s2ft jobs --json`` shows it."""
    queued = job.state == State.QUEUED
    return {
        "id": job.id,
        "tenant": job.tenant,
        "name": job.name,
        "state": str(job.state),
        "reason": _reason(job, wait),
        "priority": job.priority,
        "position": wait.position if queued and wait else None,
        "blocker": wait.ahead if queued and wait else None,
        "estimated_start": _iso(expected_start) if queued else None,
        "created_at": _iso(job.created_at),
        "started_at": _iso(job.started_at),
        "finished_at": _iso(job.finished_at),
        "attempt": job.attempt,
        "num_workers": job.num_workers,
        "placement": kept_placement(job.placement, job.num_workers),
        "submission_id": job.submission_id,
        "progress": _progress(job),
        "model": {"name": job.model_name, "version": job.model_version} if job.model_name else None,
        "error": job.error if job.state == State.FAILED else None,
    }


def event_answer(event: Event) -> dict[str, Any]:
    """Return an event as ``s2ft job --json`` shows it."""
    return {
        "at": _iso(event.at),
        "attempt": event.attempt,
        "state": str(event.state),
        "cause": event.cause,
        "detail": event.detail,
    }


def usage_answer(row: UsageRow) -> dict[str, Any]:
    """Return a line of ``s2ft usage --json``."""
    return {
        "tenant": row.tenant,
        "job": row.job_id,
        "num_jobs": row.num_jobs,
        "worker_seconds": dict(row.worker_seconds),
        "tokens": row.tokens,
        "queue_wait_s": row.queue_wait_s,
    }


def _reason(job: Job, wait: Wait | None) -> str | None:
    if job.state != State.QUEUED:
        return str(job.failure) if job.state == State.FAILED and job.failure else job.cause
    if job.held:
        return "paused; s2ft resume lets it go on"
    return wait.lacks if wait else job.cause


def _progress(job: Job) -> Mapping[str, Any] | None:
    it = job.progress
    if it is None:
        return None
    left = it.time_left_s if job.state in (State.RUNNING, State.PREEMPTING) else None
    return {
        "step": it.step,
        "total_steps": it.total_steps,
        "loss": it.loss,
        "time_left_s": left,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
