"""The live jobs, in memory beside the store: what is asked often costs no query.

Invariant: every change is in the store first. Heartbeats alone are written now and then only,
and those that say something new.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from s2ft_ray.errors import StaleAttempt
from s2ft_ray.scheduler.liveness import Liveness
from s2ft_ray.scheduler.models import HOLDING, LIVE, Job, Progress, State, StopCause
from s2ft_ray.scheduler.settings import ServiceSettings
from s2ft_ray.scheduler.store import Store


class LiveJobs:
    """The jobs that haven't ended.

    Whoever reads one to change it holds `lock` until what the store gave back is kept.
    """

    def __init__(
        self,
        store: Store,
        liveness: Liveness,
        clock: Callable[[], float],
        settings: ServiceSettings,
    ) -> None:
        self._store, self._liveness = store, liveness
        self._clock, self._settings = clock, settings
        self.lock = threading.RLock()
        self._jobs: dict[str, Job] | None = None
        self._next_beats: dict[str, float] = {}
        """When a heartbeat that says nothing new is written again, by job id."""

    def get(self, job_id: str) -> Job | None:
        """Return a job, None where it isn't live."""
        return self._by_id().get(job_id)

    def find(self, job_id: str) -> Job:
        """Return a job, also one that has ended. Raises UnknownJob."""
        return self.get(job_id) or self._store.job(job_id)

    def current(self, job_id: str, attempt: int) -> Job:
        """Return the job of an attempt. Raises StaleAttempt where it has gone on without it."""
        job = self.find(job_id)
        if job.state not in HOLDING or job.attempt != attempt:
            raise StaleAttempt(job_id, attempt, f"{job.state}, attempt {job.attempt}")
        return job

    def all(self) -> list[Job]:
        """Return all of them, as they are now."""
        with self.lock:
            return list(self._by_id().values())

    def holding(self) -> list[Job]:
        """Return those that hold workers."""
        return [job for job in self.all() if job.state in HOLDING]

    def last_known(self) -> Mapping[str, Job]:
        """Return them by id without waiting for the lock, for answers alone."""
        return self._jobs or {}

    def keep(self, job: Job) -> Job:
        """Take over what the store says of a job now."""
        jobs = self._by_id()
        if job.state not in LIVE:
            jobs.pop(job.id, None)
            self._next_beats.pop(job.id, None)
            self._liveness.forget(job.id)
            return job
        known = jobs.get(job.id)
        if known and known.attempt == job.attempt and known.heartbeat_at and job.heartbeat_at:
            job = replace(job, heartbeat_at=known.heartbeat_at, progress=known.progress)
        jobs[job.id] = job
        return job

    def admit(self, job_id: str, num_workers: int, placement: Mapping[str, int]) -> None:
        """Give a queued job its workers, by node id; silence counts from now on."""
        job = self._store.admit(job_id, num_workers, placement, self._clock())
        self._liveness.hear(job.id, job.attempt)
        self.keep(job)

    def beat(
        self,
        job: Job,
        told: Progress | None,
        saved_at: float | None,
        placement: Mapping[str, int] | None,
    ) -> Job:
        """Note a sign of life of a job's current attempt."""
        now = self._clock()
        self._liveness.hear(job.id, job.attempt)
        before = job.progress.starts if job.progress else 0
        is_event = told is not None and (
            job.state == State.STARTING or told.starts > max(before, 1)
        )
        if job.next_workers > job.num_workers:  # its ledger is that of its next size
            placement = None
        has_moved = placement is not None and dict(placement) != dict(job.placement)
        due = self._next_beats.get(job.id, 0.0)
        if is_event or has_moved or not now < due <= now + self._settings.save_s:
            self._next_beats[job.id] = now + self._settings.save_s
            job = self._store.beat(job.id, job.attempt, now, told, saved_at, placement)
        job = self._by_id()[job.id] = replace(
            job,
            heartbeat_at=now,
            progress=told or job.progress,
            saved_at=saved_at or job.saved_at,
        )
        return job

    def ask_stop(
        self,
        job: Job,
        cause: StopCause,
        *,
        detail: str | None = None,
        next_workers: int = 0,
        placement: Mapping[str, int] | None = None,
    ) -> None:
        """Ask a job's attempt to stop within the grace period, see ``Store.ask_stop``."""
        now = self._clock()
        self.keep(
            self._store.ask_stop(
                job.id,
                job.attempt,
                cause,
                now + self._settings.grace_s,
                now,
                detail=detail,
                next_workers=next_workers,
                placement=placement,
            )
        )

    def forget(self) -> None:
        """Read them from the store again: nobody knows whether a write came through."""
        with self.lock:
            self._jobs = None

    def _by_id(self) -> dict[str, Job]:
        if self._jobs is None:
            self._jobs = {job.id: job for job in self._store.live_jobs()}
        return self._jobs


def is_paused(job: Job) -> bool:
    """Say whether a job waits and may not be admitted."""
    return job.held and job.state == State.QUEUED
