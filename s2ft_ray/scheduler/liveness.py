"""Who is alive: when each attempt's driver was heard last, and which drivers wait for their job.

Invariant: only a steady clock counts here, so that neither a wall clock that is put back nor one
that is put forward makes anybody silent, overdue or immortal. A scheduler that has just started
counts from its start.
"""

from collections.abc import Callable

from s2ft_ray.scheduler.models import Job
from s2ft_ray.scheduler.settings import ServiceSettings


class Liveness:
    """What is known in this process; `steady` tells seconds from any start."""

    def __init__(self, steady: Callable[[], float], settings: ServiceSettings) -> None:
        self._steady, self._settings = steady, settings
        self._began = steady()
        self._heard: dict[str, tuple[int, float]] = {}
        self._deadlines: dict[str, tuple[int, float]] = {}
        self._waiting: dict[str, tuple[str, float]] = {}

    def hear(self, job_id: str, attempt: int) -> None:
        """Note a sign of life of an attempt, or its begin."""
        self._heard[job_id] = (attempt, self._steady())

    def silent_s(self, job: Job) -> float:
        """Return for how long nothing was heard of a job's attempt."""
        attempt, at = self._heard.get(job.id, (0, self._began))
        return self._steady() - (at if attempt == job.attempt else self._began)

    def is_overdue(self, job: Job, now: float) -> bool:
        """Say whether an attempt that was asked to stop has had its time, `now` by the wall."""
        if job.stop_deadline is None:
            self._deadlines.pop(job.id, None)
            return False
        attempt, deadline = self._deadlines.get(job.id, (0, 0.0))
        if attempt != job.attempt:
            left_s = min(max(job.stop_deadline - now, 0.0), self._settings.grace_s)
            deadline = self._steady() + left_s
            self._deadlines[job.id] = (job.attempt, deadline)
        return self._steady() > deadline

    def wait(self, job_id: str, driver_id: str) -> None:
        """Note that a driver waits for its job's turn."""
        self._waiting[job_id] = (driver_id, self._steady())

    def is_waited_for(self, job_id: str) -> bool:
        """Say whether a driver waits for the job and has asked lately."""
        _, at = self._waiting.get(job_id, ("", -float("inf")))
        return self._steady() - at < self._settings.waits_for_s

    def may_wait(self, job_id: str) -> bool:
        """Say whether one more driver may wait."""
        others = [it for it in self._waiting if it != job_id and self.is_waited_for(it)]
        return len(others) < self._settings.max_waiting

    def stop_waiting(self, job_id: str) -> None:
        """The job's turn has come."""
        self._waiting.pop(job_id, None)

    def forget(self, job_id: str) -> None:
        """The job has ended."""
        for of in (self._heard, self._deadlines, self._waiting):
            of.pop(job_id, None)
