"""What transitions are made of: reads and writes inside the transaction that the store opened.

Invariant: a state is written together with its event, only along ``models.NEXT``, and only where
the row is still as it was read.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, func, insert, select, update

from s2ft_ray.errors import StaleAttempt, UnknownJob
from s2ft_ray.scheduler.models import HOLDING, NEXT, FailureReason, Job, State, StopCause
from s2ft_ray.scheduler.rows import JOB_COLUMNS, to_job
from s2ft_ray.scheduler.tables import ATTEMPTS, EVENTS, JOBS

NOTHING_HELD: Mapping[str, Any] = {
    "submission_id": None,
    "num_workers": 0,
    "next_workers": 0,
    "placement": {},
    "stop_cause": None,
    "stop_deadline": None,
    "admitted_at": None,
    "heartbeat_at": None,
}


# Made once: building the forty columns anew for each read took longer than the read.
SELECT_JOBS: Select[Any] = select(*JOB_COLUMNS)
_SELECT_ONE = SELECT_JOBS.where(JOBS.c.id == bindparam("job_id"))


def unknown(job_id: str) -> UnknownJob:
    """Return the error of an id that no job has."""
    return UnknownJob(f"job {job_id}: there is none; s2ft jobs lists them")


def get(connection: Connection, job_id: str) -> Job:
    """Return a job. Raises UnknownJob."""
    row = connection.execute(_SELECT_ONE, {"job_id": job_id}).first()
    if row is None:
        raise unknown(job_id)
    return to_job(row)


def get_current(connection: Connection, job_id: str, attempt: int) -> Job:
    """Return a job whose attempt holds workers. Raises StaleAttempt where it isn't that one."""
    job = get(connection, job_id)
    if job.state not in HOLDING or job.attempt != attempt:
        raise StaleAttempt(job_id, attempt, f"{job.state}, attempt {job.attempt}")
    return job


def tell(
    connection: Connection,
    job_id: str,
    attempt: int,
    at: float,
    state: State,
    cause: str,
    detail: str | None,
) -> None:
    """Add an event."""
    values = {"job_id": job_id, "attempt": attempt, "at": at, "state": str(state)}
    connection.execute(insert(EVENTS).values(**values, cause=cause, detail=detail))


def note(
    connection: Connection, job: Job, at: float, cause: str, detail: str | None = None
) -> None:
    """Add an event that leaves a job in its state."""
    tell(connection, job.id, job.attempt, max(at, job.updated_at), job.state, cause, detail)


def change(connection: Connection, job: Job, at: float, **values: Any) -> Job:
    """Write a job's row where nobody else has since it was read."""
    unchanged = and_(
        JOBS.c.id == job.id, JOBS.c.state == str(job.state), JOBS.c.attempt == job.attempt
    )
    plain = {key: str(value) if _is_name(value) else value for key, value in values.items()}
    done = connection.execute(
        update(JOBS).where(unchanged).values(**plain, updated_at=max(at, job.updated_at))
    )
    assert done.rowcount == 1, f"{job.id} was written by somebody else"
    return get(connection, job.id)


def _is_name(value: Any) -> bool:
    return isinstance(value, State | StopCause | FailureReason)


def move(
    connection: Connection,
    job: Job,
    to: State,
    at: float,
    cause: str,
    detail: str | None = None,
    **values: Any,
) -> Job:
    """Take a job to another state, with the event that tells of it."""
    assert to in NEXT[job.state], f"{job.id}: no way from {job.state} to {to}"
    at = max(at, job.updated_at)
    attempt = values.get("attempt", job.attempt)
    tell(connection, job.id, attempt, at, to, cause, detail)
    return change(connection, job, at, state=to, cause=cause, **values)


def start_attempt(
    connection: Connection,
    job: Job,
    num_workers: int,
    placement: Mapping[str, int],
    at: float,
    cause: str,
) -> Job:
    """Give a job its workers for a new attempt."""
    at = max(at, job.updated_at)
    connection.execute(
        insert(ATTEMPTS).values(
            job_id=job.id,
            attempt=job.attempt + 1,
            tenant=job.tenant,
            num_workers=num_workers,
            queued_at=job.queued_at if job.state == State.QUEUED else at,
            admitted_at=at,
            rows=0,
            tokens=0,
        )
    )
    held: dict[str, Any] = {"num_workers": num_workers, "placement": dict(placement)}
    held["admitted_at"] = at
    if job.progress is not None:  # the next attempt goes on from there, and counts anew
        held["progress"] = asdict(replace(job.progress, rows=0, tokens=0, starts=0))
    return move(
        connection,
        job,
        State.STARTING,
        at,
        cause,
        f"{num_workers} worker(s)",
        attempt=job.attempt + 1,
        not_before=None,
        **{**NOTHING_HELD, **held},
    )


def end_attempt(
    connection: Connection, job: Job, outcome: str, at: float, rows: int = 0, tokens: int = 0
) -> None:
    """Note what an attempt came to."""
    this = and_(ATTEMPTS.c.job_id == job.id, ATTEMPTS.c.attempt == job.attempt)
    connection.execute(
        update(ATTEMPTS)
        .where(this)
        .values(ended_at=max(at, job.updated_at), outcome=outcome, rows=rows, tokens=tokens)
    )


def count_attempts(connection: Connection, job_id: str, outcome: str) -> int:
    """Count a job's attempts that came to `outcome`, since it failed for good if it has."""
    failed = and_(EVENTS.c.job_id == job_id, EVENTS.c.state == str(State.FAILED))
    last = select(func.coalesce(func.max(EVENTS.c.attempt), 0)).where(failed).scalar_subquery()
    alike = and_(
        ATTEMPTS.c.job_id == job_id, ATTEMPTS.c.outcome == outcome, ATTEMPTS.c.attempt > last
    )
    found: int = connection.execute(select(func.count()).where(alike)).scalar_one()
    return found


def end(
    connection: Connection,
    job: Job,
    to: State,
    at: float,
    cause: str,
    detail: str | None = None,
    **values: Any,
) -> Job:
    """End a job; it holds nothing any more."""
    kept = {"submission_id": job.submission_id, "heartbeat_at": job.heartbeat_at}
    ended = {**NOTHING_HELD, **kept, "finished_at": max(at, job.updated_at), "held": False}
    return move(connection, job, to, at, cause, detail, **{**ended, **values})


def fail_for_good(
    connection: Connection,
    job: Job,
    reason: FailureReason,
    message: str,
    at: float,
    **values: Any,
) -> Job:
    """End a job as failed."""
    values = {**values, "error": message, "failure": reason}
    return end(connection, job, State.FAILED, at, reason, message, **values)
