"""The tables of the queue."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    text,
)

from s2ft_ray.database import metadata

JOBS = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("idempotency_key", String(255), nullable=False),
    Column("config", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("worker", JSON, nullable=False),
    Column("sizes", JSON, nullable=False),
    Column("base", Text, nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("cause", Text),
    Column("error", Text),
    Column("failure", String(32)),
    Column("attempt", Integer, nullable=False),
    Column("submission_id", String(255)),
    Column("num_workers", Integer, nullable=False),
    Column("next_workers", Integer, nullable=False),
    Column("placement", JSON, nullable=False),
    Column("held", Boolean, nullable=False),
    Column("stop_cause", String(16)),
    Column("stop_deadline", Float),
    Column("not_before", Float),
    Column("num_preemptions", Integer, nullable=False),
    Column("num_failures", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("admitted_at", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("updated_at", Float, nullable=False),
    Column("heartbeat_at", Float),
    Column("progress", JSON),
    Column("saved_at", Float),
    Column("model_name", String(255)),
    Column("model_version", String(32)),
    Column("queue_timeout_s", Float),
    Column("run_timeout_s", Float),
    # of a tenant's active jobs, one has a key
    Index(
        "uq_jobs_active_key",
        "tenant",
        "idempotency_key",
        unique=True,
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
    Index("ix_jobs_state", "state"),
    Index("ix_jobs_tenant_created_at", "tenant", "created_at"),
    Index("ix_jobs_created_at", "created_at"),
)

ATTEMPTS = Table(
    "attempts",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("num_workers", Integer, nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("admitted_at", Float, nullable=False),
    Column("stepped_at", Float),
    Column("ended_at", Float),
    Column("outcome", String(32)),
    Column("rows", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Index("ix_attempts_tenant_admitted_at", "tenant", "admitted_at"),
    Index("ix_attempts_ended_at", "ended_at"),
)

EVENTS = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("cause", Text, nullable=False),
    Column("detail", Text),
    Index("ix_events_job_id", "job_id"),
)

USAGES = Table(
    "usages",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("amounts", JSON, nullable=False),
    Column("entries", JSON, nullable=False),
    Column("at", Float, nullable=False),
)

# One row: the scheduler that may write, its cluster, and whether the cluster is being drained.
LEASE = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("holder", String(255)),
    Column("expires_at", Float, nullable=False),
    Column("cluster", String(255)),
    Column("draining", Boolean, nullable=False),
)
