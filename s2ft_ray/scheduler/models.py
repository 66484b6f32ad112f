"""A job: its states, why an attempt ended, and when it is tried again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from s2ft_ray.scheduler.views import WorkerShape


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PREEMPTING = "preempting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


HOLDING = frozenset({State.STARTING, State.RUNNING, State.PREEMPTING})
LIVE = HOLDING | {State.QUEUED}

NEXT: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STARTING, State.FAILED, State.CANCELLED}),
    State.STARTING: frozenset(
        {State.RUNNING, State.PREEMPTING, State.QUEUED, State.SUCCEEDED, State.FAILED}
    ),
    State.RUNNING: frozenset({State.PREEMPTING, State.QUEUED, State.SUCCEEDED, State.FAILED}),
    State.PREEMPTING: frozenset(
        {State.STARTING, State.QUEUED, State.SUCCEEDED, State.FAILED, State.CANCELLED}
    ),
    State.FAILED: frozenset({State.QUEUED}),
    State.SUCCEEDED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""The transitions that there are; a failed job is queued again by people alone."""


class StopCause(StrEnum):
    """Why a job that holds workers was asked to stop."""

    PRIORITY = "priority"
    QUOTA = "quota"
    RESIZE = "resize"
    PAUSE = "pause"
    CANCEL = "cancel"
    DRAIN = "drain"
    DEADLINE = "deadline"


class FailureReason(StrEnum):
    """Why an attempt failed."""

    BAD_INPUT = "bad_input"
    """The configuration, the data or an adapter: the same again."""
    DIVERGED = "diverged"
    """The loss became NaN or infinite: the same again."""
    OUT_OF_MEMORY = "out_of_memory"
    STORAGE = "storage"
    """A checkpoint could not be written or read."""
    WORKER_LOST = "worker_lost"
    NODE_LOST = "node_lost"
    DRIVER_LOST = "driver_lost"
    REGISTRY = "registry"
    """MLflow could not be used; what is trained is not trained again."""
    QUEUE_DEADLINE = "queue_deadline"
    RUN_DEADLINE = "run_deadline"
    ERROR = "error"
    """Anything else."""


# How often an attempt that failed so is followed by another, and the first pause before it.
_RETRIES: Mapping[FailureReason, tuple[int, float]] = {
    FailureReason.OUT_OF_MEMORY: (1, 30.0),
    FailureReason.STORAGE: (5, 30.0),
    FailureReason.WORKER_LOST: (5, 5.0),
    FailureReason.NODE_LOST: (10, 5.0),
    FailureReason.DRIVER_LOST: (10, 2.0),
    FailureReason.REGISTRY: (20, 15.0),
    FailureReason.ERROR: (1, 10.0),
}
LONGEST_PAUSE_S = 600.0
"""No attempt waits longer for the next one."""


def retry_delay_s(reason: FailureReason, num_alike: int) -> float | None:
    """Return the pause before the next attempt, None where there is to be none.

    `num_alike` counts the attempts that failed for this reason so far, this one included. The
    pause doubles with each, to ten minutes.
    """
    most, pause_s = _RETRIES.get(reason, (0, 0.0))
    if num_alike > most:
        return None
    return min(pause_s * 2.0 ** (num_alike - 1), LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Submission:
    """What a job asks for. Times are seconds."""

    tenant: str
    name: str
    config: Mapping[str, Any]
    """The resolved run document."""
    idempotency_key: str
    """Of the tenant's active jobs, one has it."""
    priority: int
    worker: WorkerShape
    sizes: tuple[int, ...]
    """Numbers of workers that it runs with, ascending."""
    base: str
    num_rows: int = 0
    """Training rows that it will go through, 0: unknown."""
    queue_timeout_s: float | None = None
    run_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a driver tells with its heartbeat."""

    step: int
    total_steps: int
    loss: float | None = None
    time_left_s: float | None = None
    rows: int = 0
    """Gone through by this attempt."""
    tokens: int = 0
    starts: int = 0
    """How often this attempt's workers were started: more than once where some have died."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the store has it. Times are seconds since the epoch."""

    id: str
    tenant: str
    name: str
    idempotency_key: str
    priority: int
    worker: WorkerShape
    sizes: tuple[int, ...]
    base: str
    num_rows: int
    state: State
    cause: str | None
    """Why it is in this state, in a few words."""
    error: str | None
    failure: FailureReason | None
    attempt: int
    """0 before the first admission; the fencing token."""
    submission_id: str | None
    """The Ray job that drives this attempt."""
    num_workers: int
    next_workers: int
    placement: Mapping[str, int] = field(hash=False)
    held: bool
    """Paused: queued, and not to be admitted."""
    stop_cause: StopCause | None
    stop_deadline: float | None
    not_before: float | None
    num_preemptions: int
    num_failures: int
    created_at: float
    queued_at: float
    admitted_at: float | None
    started_at: float | None
    """First step of the first attempt."""
    finished_at: float | None
    updated_at: float
    heartbeat_at: float | None
    progress: Progress | None
    saved_at: float | None
    """When its newest checkpoint was saved."""
    model_name: str | None
    model_version: str | None
    queue_timeout_s: float | None
    run_timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Event:
    """One transition, or something else that happened to a job."""

    job_id: str
    attempt: int
    at: float
    state: State
    """The state after it."""
    cause: str
    detail: str | None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a tenant, or one of its jobs, was given over a time."""

    tenant: str
    job_id: str | None
    num_jobs: int
    worker_seconds: Mapping[str, float] = field(hash=False)
    """By resource: amount x seconds; under "workers" the workers' own."""
    tokens: int
    queue_wait_s: float
    """Summed over the jobs' attempts."""
