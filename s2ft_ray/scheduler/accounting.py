"""What tenants were given: worker-seconds by resource, tokens, and how long they waited."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import Engine, and_, func, or_, select

from s2ft_ray.database import reading
from s2ft_ray.scheduler.models import FailureReason, UsageRow
from s2ft_ray.scheduler.policy.estimates import Measurement
from s2ft_ray.scheduler.tables import ATTEMPTS, JOBS
from s2ft_ray.scheduler.views import WorkerShape

_MEASURED = 500


def usage(
    engine: Engine,
    now: float,
    since: float = 0.0,
    tenant: str | None = None,
    by_job: bool = False,
) -> list[UsageRow]:
    """Return what was used from `since` to `now`, by tenant, or by job; most workers first."""
    ended = or_(ATTEMPTS.c.ended_at.is_(None), ATTEMPTS.c.ended_at > since)
    wanted = and_(ended, ATTEMPTS.c.admitted_at < now)
    if tenant is not None:
        wanted = and_(wanted, ATTEMPTS.c.tenant == tenant)
    query = select(ATTEMPTS, JOBS.c.worker).join(JOBS, JOBS.c.id == ATTEMPTS.c.job_id).where(wanted)
    seconds: dict[tuple[str, str | None], dict[str, float]] = {}
    jobs: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    tokens: dict[tuple[str, str | None], int] = defaultdict(int)
    waits: dict[tuple[str, str | None], float] = defaultdict(float)
    with reading(engine) as connection:
        for row in connection.execute(query):
            key = (row.tenant, row.job_id if by_job else None)
            end = now if row.ended_at is None else min(row.ended_at, now)
            held_s = row.num_workers * max(0.0, end - max(row.admitted_at, since))
            amounts = seconds.setdefault(key, defaultdict(float))
            amounts["workers"] += held_s
            for name, amount in row.worker["resources"]:
                amounts[name] += amount * held_s
            jobs[key].add(row.job_id)
            tokens[key] += row.tokens
            waits[key] += row.admitted_at - row.queued_at
    found = [
        UsageRow(name, job_id, len(jobs[name, job_id]), amounts, tokens[name, job_id], waits[key])
        for key, amounts in seconds.items()
        for name, job_id in (key,)
    ]
    return sorted(found, key=lambda row: -row.worker_seconds["workers"])


def trained_s(engine: Engine, job_ids: Sequence[str], now: float) -> dict[str, float]:
    """Return how long jobs have trained, by id: from the first step of each attempt to its end."""
    span = func.coalesce(ATTEMPTS.c.ended_at, now) - ATTEMPTS.c.stepped_at
    query = (
        select(ATTEMPTS.c.job_id, func.sum(span))
        .where(ATTEMPTS.c.job_id.in_(job_ids), ATTEMPTS.c.stepped_at.is_not(None))
        .group_by(ATTEMPTS.c.job_id)
    )
    with reading(engine) as connection:
        return {job_id: float(seconds) for job_id, seconds in connection.execute(query)}


def measurements(engine: Engine) -> list[Measurement]:
    """Return what the newest attempts showed of how long jobs take, in order of time."""
    query = (
        select(ATTEMPTS, JOBS.c.worker, JOBS.c.base)
        .join(JOBS, JOBS.c.id == ATTEMPTS.c.job_id)
        .where(
            ATTEMPTS.c.ended_at.is_not(None),
            ATTEMPTS.c.rows > 0,
            ATTEMPTS.c.outcome.not_in([str(reason) for reason in FailureReason]),
        )
        .order_by(ATTEMPTS.c.ended_at.desc())
        .limit(_MEASURED)
    )
    with reading(engine) as connection:
        rows = connection.execute(query).all()
    return [
        Measurement(
            tenant=row.tenant,
            base=row.base,
            worker=_shape(row.worker),
            rows=row.rows,
            worker_seconds=row.num_workers * (row.ended_at - row.stepped_at),
            startup_s=row.stepped_at - row.admitted_at,
        )
        for row in reversed(rows)
        if row.stepped_at is not None
    ]


def _shape(worker: Mapping[str, list[list[str]]]) -> WorkerShape:
    return WorkerShape(
        tuple((name, float(amount)) for name, amount in worker["resources"]),
        tuple((key, value) for key, value in worker["labels"]),
    )
