"""Jobs as the policy sees them."""

from collections.abc import Callable, Sequence
from typing import cast

from s2ft_ray.scheduler.models import LONGEST_PAUSE_S, Job, State
from s2ft_ray.scheduler.policy import Measurement, expected_duration_s
from s2ft_ray.scheduler.views import JobView
from s2ft_ray.scheduler.views import State as LiveState

Estimate = Callable[[Job], float | None]


class Durations:
    """How long queued jobs will hold their workers, from measurements; equal jobs ask once."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        self._measured = measured
        self._known: dict[tuple[object, ...], float | None] = {}

    def __call__(self, job: Job) -> float | None:
        """Return the seconds, None where nobody knows."""
        rows = job.num_rows
        if not rows:
            return None
        kind = (job.tenant, job.base, job.worker, rows, job.sizes[0])
        if kind not in self._known:
            self._known[kind] = expected_duration_s(
                job.tenant, job.base, job.worker, rows, job.sizes[0], self._measured
            )
        return self._known[kind]


def build_view(job: Job, now: float, durations: Estimate) -> JobView:
    """Return what the policy may know of a live job at `now`."""
    holds = job.state != State.QUEUED
    saved_at = max(job.saved_at or 0.0, job.admitted_at or 0.0)
    return JobView(
        id=job.id,
        tenant=job.tenant,
        state=cast(LiveState, job.state.value),
        worker=job.worker,
        sizes=job.sizes,
        submitted_at=job.created_at,
        priority=job.priority,
        time_left_s=_time_left_s(job, now, durations),
        not_before=_not_before(job, now),
        num_preemptions=job.num_preemptions,
        attempt=job.attempt,
        num_workers=job.num_workers,
        next_workers=job.next_workers,
        started_at=job.admitted_at,
        placement=job.placement,
        progress_lost_s=max(now - saved_at, 0.0) if holds else 0.0,
    )


def _not_before(job: Job, now: float) -> float | None:
    """When its pause ends; one that is longer than any pause is of a clock that was put back."""
    at = job.not_before
    return None if at is None or at - now > LONGEST_PAUSE_S else at


def _time_left_s(job: Job, now: float, durations: Estimate) -> float | None:
    """What its steps say, while it trains; before that, the measured length of jobs like it."""
    progress = job.progress
    if job.state == State.RUNNING and progress and progress.time_left_s is not None:
        told_at = job.heartbeat_at or now
        return max(progress.time_left_s - (now - told_at), 0.0)
    left = durations(job)
    if left is None:
        return None
    if progress and progress.total_steps:
        left *= max(1.0 - progress.step / progress.total_steps, 0.0)
    if job.num_workers:
        left = left * job.sizes[0] / job.num_workers - (now - (job.admitted_at or now))
    return max(left, 0.0)
