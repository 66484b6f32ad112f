"""The only writer of jobs, attempts and events.

Every method is one transaction. Those that a driver's report leads to take its `attempt` and raise
StaleAttempt where the job has gone on without it. Times are given by the caller, in seconds since
the epoch; a clock that went backwards moves no job's time back.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import and_, insert, or_, select, update

from s2ft_ray.database import open_database, reading, writing
from s2ft_ray.errors import StaleAttempt
from s2ft_ray.scheduler.models import (
    HOLDING,
    LIVE,
    Event,
    FailureReason,
    Job,
    Progress,
    State,
    StopCause,
    Submission,
    retry_delay_s,
)
from s2ft_ray.scheduler.rows import to_event, to_job
from s2ft_ray.scheduler.tables import ATTEMPTS, EVENTS, JOBS, USAGES
from s2ft_ray.scheduler.transitions import (
    NOTHING_HELD,
    SELECT_JOBS,
    change,
    count_attempts,
    end,
    end_attempt,
    fail_for_good,
    get,
    get_current,
    move,
    note,
    start_attempt,
    tell,
    unknown,
)
from s2ft_ray.scheduler.views import Usage


class Store:
    """The jobs of one database."""

    def __init__(self, url: str | None = None) -> None:
        """Open the database at an SQLAlchemy `url`, None: ``$S2FT_HOME/scheduler.db``.

        Raises ConfigError where it can't be opened or is of a newer version.
        """
        self.engine = open_database(url)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    # Reading

    def job(self, job_id: str) -> Job:
        """Return a job. Raises UnknownJob where there is none of that id."""
        with reading(self.engine) as connection:
            return get(connection, job_id)

    def config(self, job_id: str) -> dict[str, Any]:
        """Return the run document that a job was submitted with."""
        with reading(self.engine) as connection:
            query = select(JOBS.c.config).where(JOBS.c.id == job_id)
            row = connection.execute(query).first()
        if row is None:
            raise unknown(job_id)
        return dict(row.config)

    def live_jobs(self) -> list[Job]:
        """Return every job that waits or holds workers, oldest first."""
        query = SELECT_JOBS.where(JOBS.c.finished_at.is_(None)).order_by(
            JOBS.c.created_at, JOBS.c.id
        )
        with reading(self.engine) as connection:
            return [to_job(row) for row in connection.execute(query)]

    def jobs(
        self,
        tenant: str | None = None,
        states: Iterable[State] = (),
        limit: int = 100,
        after: str | None = None,
    ) -> list[Job]:
        """Return a page of jobs, newest first; `after` is the last id of the page before."""
        query = SELECT_JOBS.order_by(JOBS.c.created_at.desc(), JOBS.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(JOBS.c.tenant == tenant)
        if wanted := [str(state) for state in states]:
            query = query.where(JOBS.c.state.in_(wanted))
        with reading(self.engine) as connection:
            if after is not None:
                last = get(connection, after)
                older = JOBS.c.created_at < last.created_at
                same = and_(JOBS.c.created_at == last.created_at, JOBS.c.id < last.id)
                query = query.where(or_(older, same))
            return [to_job(row) for row in connection.execute(query)]

    def events(self, job_id: str) -> list[Event]:
        """Return what happened to a job, oldest first."""
        query = select(EVENTS).where(EVENTS.c.job_id == job_id).order_by(EVENTS.c.id)
        with reading(self.engine) as connection:
            return [to_event(row) for row in connection.execute(query)]

    # The way of a job

    def submit(self, submission: Submission, at: float, job_id: str | None = None) -> Job:
        """Queue a job; of a tenant's active jobs with the same key there is one, which is returned.

        `job_id` is the id that a new job gets; None: a fresh one.
        """
        same = and_(
            JOBS.c.tenant == submission.tenant,
            JOBS.c.idempotency_key == submission.idempotency_key,
            JOBS.c.finished_at.is_(None),
        )
        with writing(self.engine) as connection:
            if row := connection.execute(SELECT_JOBS.where(same)).first():
                return to_job(row)
            values = asdict(submission)
            job_id = job_id or f"job-{secrets.token_hex(5)}"
            connection.execute(
                insert(JOBS).values(
                    **{**values, "sizes": list(submission.sizes)},
                    id=job_id,
                    state=State.QUEUED,
                    cause="submitted",
                    attempt=0,
                    held=False,
                    num_preemptions=0,
                    num_failures=0,
                    created_at=at,
                    queued_at=at,
                    updated_at=at,
                    **NOTHING_HELD,
                )
            )
            tell(connection, job_id, 0, at, State.QUEUED, "submitted", None)
            return get(connection, job_id)

    def admit(self, job_id: str, num_workers: int, placement: Mapping[str, int], at: float) -> Job:
        """Give a queued job its workers: a new attempt starts."""
        with writing(self.engine) as connection:
            job = get(connection, job_id)
            return start_attempt(connection, job, num_workers, placement, at, "admitted")

    def claim(self, job_id: str, attempt: int, submission_id: str, at: float) -> Job:
        """Record the Ray job that drives an attempt; a second one is refused."""
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            if job.submission_id not in (None, submission_id):
                raise StaleAttempt(job_id, attempt, f"driven by {job.submission_id}")
            return change(connection, job, at, submission_id=submission_id, heartbeat_at=at)

    def beat(
        self,
        job_id: str,
        attempt: int,
        at: float,
        progress: Progress | None = None,
        saved_at: float | None = None,
        placement: Mapping[str, int] | None = None,
    ) -> Job:
        """Note a sign of life; the first progress makes a starting job a running one.

        `placement` is where its workers are, by node id. Workers that were started again since
        the progress before are an event.
        """
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            changes: dict[str, Any] = {"heartbeat_at": at}
            if saved_at is not None:
                changes["saved_at"] = saved_at
            if placement is not None:
                changes["placement"] = dict(placement)
            if progress is not None:
                changes["progress"] = asdict(progress)
                before = job.progress.starts if job.progress else 0
                if progress.starts > max(before, 1):
                    note(connection, job, at, "workers started again", "some have died")
                this = and_(ATTEMPTS.c.job_id == job_id, ATTEMPTS.c.attempt == attempt)
                first = and_(this, ATTEMPTS.c.stepped_at.is_(None))
                connection.execute(update(ATTEMPTS).where(first).values(stepped_at=at))
            if progress is not None and job.state == State.STARTING:
                changes["started_at"] = job.started_at or at
                return move(connection, job, State.RUNNING, at, "first step", **changes)
            return change(connection, job, at, **changes)

    def ask_stop(
        self,
        job_id: str,
        attempt: int,
        cause: StopCause,
        deadline: float,
        at: float,
        *,
        detail: str | None = None,
        next_workers: int = 0,
        placement: Mapping[str, int] | None = None,
    ) -> Job:
        """Ask an attempt to stop at its next step; it is killed after `deadline`.

        With `next_workers` the job is relaunched with so many and isn't queued again. A later
        request takes the place of an earlier one where it ends more: cancel over all others.
        """
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            if job.state == State.PREEMPTING:
                if job.stop_cause == StopCause.CANCEL:
                    return job
                changes = {"stop_cause": cause, "next_workers": next_workers}
                note(connection, job, at, f"asked to stop: {cause}", detail)
                return change(connection, job, at, **changes)
            if placement is not None:
                job = change(connection, job, at, placement=dict(placement))
            return move(
                connection,
                job,
                State.PREEMPTING,
                at,
                f"asked to stop: {cause}",
                detail,
                stop_cause=cause,
                stop_deadline=deadline,
                next_workers=next_workers,
            )

    def stopped(self, job_id: str, attempt: int, at: float, rows: int = 0, tokens: int = 0) -> Job:
        """Take the workers of an attempt that stopped as asked, or was ended for it.

        A cancelled job ends, a resized one starts again, others wait at the front of their class.
        """
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            end_attempt(connection, job, f"stopped: {job.stop_cause}", at, rows, tokens)
            if job.stop_cause == StopCause.CANCEL:
                return end(connection, job, State.CANCELLED, at, "cancelled")
            if job.stop_cause == StopCause.DEADLINE:
                return fail_for_good(
                    connection, job, FailureReason.RUN_DEADLINE, "ran longer than it may", at
                )
            if job.next_workers:
                cause = f"relaunched with {job.next_workers} workers"
                return start_attempt(connection, job, job.next_workers, job.placement, at, cause)
            held = job.held or job.stop_cause == StopCause.PAUSE
            cause = "paused" if held else f"stopped for {job.stop_cause}"
            counts = job.stop_cause in (StopCause.PRIORITY, StopCause.QUOTA)
            return move(
                connection,
                job,
                State.QUEUED,
                at,
                cause,
                queued_at=max(at, job.updated_at),
                held=held,
                num_preemptions=job.num_preemptions + counts,
                **NOTHING_HELD,
            )

    def succeed(
        self,
        job_id: str,
        attempt: int,
        model: tuple[str, str],
        at: float,
        rows: int = 0,
        tokens: int = 0,
    ) -> Job:
        """End a job whose adapter is registered as `model`: name and version."""
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            end_attempt(connection, job, "succeeded", at, rows, tokens)
            detail = f"{model[0]} version {model[1]}"
            names = {"model_name": model[0], "model_version": model[1]}
            return end(connection, job, State.SUCCEEDED, at, "registered", detail, **names)

    def fail(
        self,
        job_id: str,
        attempt: int,
        reason: FailureReason,
        message: str,
        at: float,
        rows: int = 0,
        tokens: int = 0,
    ) -> Job:
        """End an attempt that failed: the job is tried again after a pause, or has failed."""
        with writing(self.engine) as connection:
            job = get_current(connection, job_id, attempt)
            end_attempt(connection, job, reason, at, rows, tokens)
            if job.stop_cause == StopCause.CANCEL:
                return end(connection, job, State.CANCELLED, at, "cancelled", message)
            failures = job.num_failures + 1
            pause_s = retry_delay_s(reason, count_attempts(connection, job.id, reason))
            if pause_s is None:
                return fail_for_good(connection, job, reason, message, at, num_failures=failures)
            return move(
                connection,
                job,
                State.QUEUED,
                at,
                f"tried again after {reason}",
                message,
                error=message,
                failure=reason,
                queued_at=max(at, job.updated_at),
                not_before=at + pause_s,
                held=job.held or job.stop_cause == StopCause.PAUSE,
                num_failures=failures,
                **NOTHING_HELD,
            )

    def reject(self, job_id: str, reason: FailureReason, message: str, at: float) -> Job:
        """End a queued job that can't be started any more."""
        with writing(self.engine) as connection:
            return fail_for_good(connection, get(connection, job_id), reason, message, at)

    # What people ask

    def cancel(self, job_id: str, deadline: float, at: float) -> Job:
        """End a queued job, or ask an attempt to stop for it; an ended job stays as it is."""
        with writing(self.engine) as connection:
            job = get(connection, job_id)
            if job.state == State.QUEUED:
                return end(connection, job, State.CANCELLED, at, "cancelled")
        if job.state in HOLDING:
            return self.ask_stop(job_id, job.attempt, StopCause.CANCEL, deadline, at)
        return job

    def pause(self, job_id: str, deadline: float, at: float) -> Job:
        """Hold a job back until `resume`; one that has workers is asked to stop."""
        with writing(self.engine) as connection:
            job = get(connection, job_id)
            if job.state == State.QUEUED and not job.held:
                note(connection, job, at, "paused")
                return change(connection, job, at, held=True, cause="paused")
            ends = job.stop_cause in (StopCause.PAUSE, StopCause.CANCEL, StopCause.DEADLINE)
            if job.state == State.PREEMPTING and not (job.next_workers or job.held or ends):
                # it gives its workers to somebody already
                note(connection, job, at, "paused")
                return change(connection, job, at, held=True)
        if job.state in (State.STARTING, State.RUNNING) or job.next_workers:
            return self.ask_stop(job_id, job.attempt, StopCause.PAUSE, deadline, at)
        return job

    def resume(self, job_id: str, at: float) -> Job:
        """Let a paused job be admitted again; one that is about to stop for it goes on after.

        One that has failed is queued again: its next attempt goes on from its newest checkpoint.
        """
        with writing(self.engine) as connection:
            job = get(connection, job_id)
            if job.state == State.FAILED:
                queued = {"queued_at": max(at, job.updated_at), "finished_at": None}
                return move(
                    connection, job, State.QUEUED, at, "resumed", **{**NOTHING_HELD, **queued}
                )
            if job.stop_cause == StopCause.PAUSE:  # it still holds its workers
                note(connection, job, at, "resumed")
                again = {"stop_cause": StopCause.RESIZE, "next_workers": job.num_workers}
                return change(connection, job, at, **again)
            if job.state in LIVE and job.held:
                note(connection, job, at, "resumed")
                queued = {"queued_at": max(at, job.updated_at)} if job.state == State.QUEUED else {}
                return change(connection, job, at, held=False, cause="resumed", **queued)
            return job

    def set_priority(self, job_id: str, priority: int, at: float) -> Job:
        """Change a live job's priority."""
        with writing(self.engine) as connection:
            job = get(connection, job_id)
            if job.state not in LIVE or job.priority == priority:
                return job
            cause = f"priority {job.priority} -> {priority}"
            note(connection, job, at, cause)
            return change(connection, job, at, priority=priority)

    # What the policy remembers

    def usages(self) -> dict[str, Usage]:
        """Return each tenant's decayed usage, as the policy left it."""
        with reading(self.engine) as connection:
            rows = connection.execute(select(USAGES)).all()
        return {row.tenant: Usage(dict(row.amounts), dict(row.entries), row.at) for row in rows}

    def save_usages(self, usages: Mapping[str, Usage]) -> None:
        """Store the usages that a plan gave."""
        rows = [
            {
                "tenant": tenant,
                "amounts": dict(it.amounts),
                "entries": dict(it.entry),
                "at": it.at,
            }
            for tenant, it in usages.items()
        ]
        if not rows:
            return
        with writing(self.engine) as connection:
            connection.execute(USAGES.delete().where(USAGES.c.tenant.in_(list(usages))))
            connection.execute(insert(USAGES), rows)
