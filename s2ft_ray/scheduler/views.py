"""What a decision is made from, and what comes out of it: plain frozen values.

The service fills a ``Snapshot`` from the store and the cluster, ``policy.decide`` turns it into a
``Plan``, the service applies the plan. Invariant: nothing here knows a database, a clock or Ray.
Times are seconds since the epoch, durations seconds, amounts of resources Ray's units (memory in
bytes).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

State = Literal["queued", "starting", "running", "preempting"]
PreemptCause = Literal["priority", "quota"]
WaitCause = Literal["workers", "order", "limit", "backoff", "drain", "too large"]


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What one worker needs from one node; hashable, so that equal jobs share what is computed."""

    resources: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, str], ...] = ()
    """Labels that the node must carry."""

    @classmethod
    def of(
        cls, resources: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> "WorkerShape":
        """Build a shape from mappings; amounts of 0 need nothing and are left out."""
        needed = sorted((name, amount) for name, amount in resources.items() if amount > 0)
        return cls(tuple(needed), tuple(sorted((labels or {}).items())))

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.resources]
        return ", ".join(parts + [f"{key}={value}" for key, value in self.labels])


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, and what of it the queue may give to jobs."""

    id: str
    total: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    present: bool = True
    """False: the autoscaler may add it; it is used when no present node has room."""
    capacity: Mapping[str, float] | None = None
    """All of it, with what others hold now; None: they hold nothing."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant was given, decayed, as fair share compares it."""

    amounts: Mapping[str, float] = field(default_factory=dict)
    """Resource-seconds by resource, decayed to `at`."""
    entry: Mapping[str, float] = field(default_factory=dict)
    """The entry penalty for each unit of weight: resource-seconds by resource, decayed to `at`."""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class TenantView:
    """A tenant's claims."""

    name: str
    weight: float = 1.0
    quota: int = 0
    """Workers that are guaranteed: lent while idle, reclaimed when asked for."""
    max_workers: int | None = None
    """Workers that it may never pass."""
    priority_cap: int | None = None
    """A higher priority counts as this one."""
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class JobView:
    """A job that waits for workers or holds some. Every other job is left out of a snapshot."""

    id: str
    tenant: str
    state: State
    worker: WorkerShape
    sizes: tuple[int, ...]
    """Numbers of workers that its batch can be split over, ascending; several: it is elastic."""
    submitted_at: float
    priority: int = 0
    time_left_s: float | None = None
    """Expected work left: with the fewest workers while queued, else with num_workers."""
    not_before: float | None = None
    """A retry's backoff: isn't started earlier."""
    num_preemptions: int = 0
    """Also says that it waits at the front of its class."""
    attempt: int = 0
    """Of a job that changes meanwhile, the one that was decided about."""
    num_workers: int = 0
    """The ledger's entry: workers that it holds; 0 while queued."""
    next_workers: int = 0
    """While preempting: workers that it is relaunched with without queueing again; 0: requeued."""
    started_at: float | None = None
    """Of the attempt that holds the workers."""
    placement: Mapping[str, int] = field(default_factory=dict)
    """Workers by node id, as admitted or as seen since."""
    progress_lost_s: float = 0.0
    """Work of each worker that a stop now would cost."""

    @property
    def min_workers(self) -> int:
        """The fewest workers that it runs with."""
        return self.sizes[0]

    @property
    def held_workers(self) -> int:
        """Workers that the ledger holds for it: while it is resized, those of the larger size."""
        return max(self.num_workers, self.next_workers)


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """The numbers that an operator may turn."""

    half_life_s: float = 43200.0
    """After this time a past use weighs half."""
    unknown_duration_s: float = 3600.0
    """Charged for a job whose length nobody knows."""
    near_end_s: float = 300.0
    """A job with less left is neither preempted nor resized."""
    min_run_s: float = 300.0
    """A job is left alone for so long after a start, unless a higher priority wants its place."""
    grow_after_s: float = 900.0
    """An elastic job grows at the earliest so long after its last start."""
    grow_min_left_s: float = 1800.0
    """An elastic job with less left doesn't grow: stop and start would cost what is won."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The world at one moment."""

    jobs: Sequence[JobView]
    tenants: Sequence[TenantView]
    nodes: Sequence[NodeView]
    draining: bool = False
    """Nothing is admitted; what runs goes on."""
    settings: PolicySettings = PolicySettings()


@dataclass(frozen=True, slots=True)
class Admit:
    """Start a queued job: enter num_workers into the ledger and launch it."""

    job_id: str
    num_workers: int
    placement: Mapping[str, int]
    """Workers by node id, where they fit now."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Stop a job at its next step boundary, then queue it again."""

    job_id: str
    for_job_id: str
    cause: PreemptCause


@dataclass(frozen=True, slots=True)
class Resize:
    """Stop an elastic job and relaunch it with num_workers, without queueing it again.

    Until it stopped, the ledger holds the larger of both sizes (``JobView.next_workers``) and
    the placement of that size: this one if it grows, the one that it has if it shrinks.
    """

    job_id: str
    num_workers: int
    placement: Mapping[str, int]
    cause: Literal["idle workers", "workers wanted"]


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job waits."""

    job_id: str
    position: int
    """1: next."""
    ahead: str | None
    """The job just before it; None for the first."""
    cause: WaitCause
    """What it lacks: room for its gang; a later place than a job that needs the same room;
    workers under its tenant's limit; the end of its backoff; the end of a drain; a cluster of
    that size."""
    needs: int
    """Workers of its gang."""
    worker: WorkerShape
    free: int
    """Such workers that would fit now."""

    @property
    def lacks(self) -> str:
        """What it lacks, as a clause for people."""
        gang = f"{self.needs} x ({self.worker})"
        match self.cause:
            case "workers":
                return f"needs {gang}, room for {self.free} now"
            case "order":
                return f"needs {gang}, room for {self.free} now is kept for jobs ahead of it"
            case "limit":
                return f"needs {gang}, its tenant is at its limit of workers"
            case "backoff":
                return "waits out the pause before its next attempt"
            case "drain":
                return "the cluster is being drained, nothing is started"
            case "too large":
                return f"needs {gang}, more than the cluster or its tenant's limit has at all"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do at this tick. Applied in this order; a part may be left for the next tick."""

    admissions: Sequence[Admit]
    preemptions: Sequence[Preempt]
    resizes: Sequence[Resize]
    waits: Mapping[str, Wait]
    """By job id, for every queued job that isn't admitted."""
    usages: Mapping[str, Usage]
    """By tenant: its usage now, to be stored and given back with the next snapshot."""
