"""The drivers of attempts, seen from the tick: launched, looked for, given up.

An attempt goes: admitted in the store; claimed by the driver that waits for it, or here for a
driver that is launched; driven, with heartbeats; reported. A driver that falls silent is asked for
at the launcher: where it ended, its job is tried again. Launching under the same submission id and
stopping what has stopped change nothing, so whatever is done twice here does no harm.
"""

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from s2ft_ray.errors import StaleAttempt
from s2ft_ray.scheduler.launcher import Launcher, submission_id_of
from s2ft_ray.scheduler.live_jobs import LiveJobs
from s2ft_ray.scheduler.liveness import Liveness
from s2ft_ray.scheduler.models import HOLDING, FailureReason, Job, State
from s2ft_ray.scheduler.settings import ServiceSettings
from s2ft_ray.scheduler.store import Store

logger = logging.getLogger(__name__)


class Drivers:
    """Looks after the drivers of all jobs that hold workers. For one thread."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        jobs: LiveJobs,
        liveness: Liveness,
        clock: Callable[[], float],
        settings: ServiceSettings,
        wake: threading.Event,
    ) -> None:
        """`wake` is set where workers have become free."""
        self._store, self._launcher, self._jobs = store, launcher, jobs
        self._liveness, self._clock, self._settings = liveness, clock, settings
        self._wake = wake
        self._launched: set[tuple[str, int]] = set()

    def look_after_all(self) -> None:
        """Launch, ask, give up. Raises where the store can't be written."""
        holding = self._jobs.holding()
        self._launched &= {(job.id, job.attempt) for job in holding}
        for job in holding:
            try:
                self._look_after(job)
            except (SQLAlchemyError, StaleAttempt):
                raise
            except Exception:  # Ray or its dashboard is away: the next tick asks again
                logger.exception("%s: its driver can't be looked after now", job.id)

    def _look_after(self, job: Job) -> None:
        now, settings = self._clock(), self._settings
        own_id = submission_id_of(job.id, job.attempt)
        if job.submission_id is None:
            job = self._find(job, own_id, now)
            if job.submission_id is None:
                return
        begins = job.state == State.STARTING and job.submission_id == own_id
        if begins and (job.id, job.attempt) not in self._launched:
            self._launcher.launch(job)
            self._launched.add((job.id, job.attempt))
            return
        assert job.submission_id is not None
        overdue = self._liveness.is_overdue(job, now)
        silent_s = self._liveness.silent_s(job)
        if silent_s < settings.quiet_s and not overdue:
            return
        state = self._launcher.state(job.submission_id)
        is_lost = state == "unknown" and (overdue or silent_s > settings.lost_s)
        if state == "ended" or is_lost:
            self._give_up(job)  # one that lives all the same ends itself at its next heartbeat
        elif state == "alive" and (overdue or silent_s > settings.hung_s):
            self._launcher.stop(job.submission_id)

    def _find(self, seen: Job, own_id: str, now: float) -> Job:
        """Leave an admission to the driver that waits, else claim it for one to be launched."""
        with self._jobs.lock:
            job = self._jobs.get(seen.id) or seen
            if job.state == State.PREEMPTING:  # stopped before anybody drove it
                return self._jobs.keep(self._store.stopped(job.id, job.attempt, now))
            waited_s = self._liveness.silent_s(job)
            if self._liveness.is_waited_for(job.id) and waited_s < self._settings.claim_s:
                return job
            if job.state != State.STARTING or job.submission_id is not None:
                return job
            return self._jobs.keep(self._store.claim(job.id, job.attempt, own_id, now))

    def _give_up(self, seen: Job) -> None:
        """End an attempt whose driver ended without a report."""
        with self._jobs.lock:
            job, now = self._jobs.get(seen.id), self._clock()
            if job is None or job.attempt != seen.attempt or job.state not in HOLDING:
                return
            told = job.progress
            done = (told.rows, told.tokens) if told else (0, 0)
            if job.state == State.PREEMPTING:
                self._jobs.keep(self._store.stopped(job.id, job.attempt, now, *done))
            else:
                reason, message = FailureReason.DRIVER_LOST, "its driver ended without a report"
                self._jobs.keep(self._store.fail(job.id, job.attempt, reason, message, now, *done))
        self._wake.set()
