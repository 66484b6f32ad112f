"""Rows of the tables as values."""

from typing import Any

from sqlalchemy import Row

from s2ft_ray.scheduler.models import Event, FailureReason, Job, Progress, State, StopCause
from s2ft_ray.scheduler.tables import JOBS
from s2ft_ray.scheduler.views import WorkerShape

# The run document is large and rarely asked for.
JOB_COLUMNS = [column for column in JOBS.c if column.name != "config"]


def to_job(row: Row[Any]) -> Job:
    """Build a job from the columns in JOB_COLUMNS."""
    values = dict(row._mapping)
    worker, progress = values["worker"], values["progress"]
    values["worker"] = WorkerShape(
        tuple((name, amount) for name, amount in worker["resources"]),
        tuple((key, value) for key, value in worker["labels"]),
    )
    values["sizes"] = tuple(values["sizes"])
    values["state"] = State(values["state"])
    values["failure"] = FailureReason(values["failure"]) if values["failure"] else None
    values["stop_cause"] = StopCause(values["stop_cause"]) if values["stop_cause"] else None
    values["progress"] = Progress(**progress) if progress else None
    return Job(**values)


def to_event(row: Row[Any]) -> Event:
    """Build an event from a row of the events."""
    return Event(row.job_id, row.attempt, row.at, State(row.state), row.cause, row.detail)
