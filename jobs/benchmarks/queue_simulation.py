"""A queue's life at the speed of its events: the real policy and store, workers that only pretend.

Every transition is written to the store, and what the policy sees is made from the store's jobs as
the service makes it. A job that starts needs `STARTUP_S` before it trains; one that is asked to
stop saves and leaves after `STOP_S`; a worker that dies takes its job back to the last checkpoint.
Invariant: every job ends exactly once, and the workers that are held never pass what the nodes
have (checked).
"""

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.queue_trace import HOUR, Trace, TraceJob
from s2ft_ray.scheduler.models import (
    FailureReason,
    Job,
    Progress,
    State,
    StopCause,
    Submission,
)
from s2ft_ray.scheduler.observation import build_view
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import JobView, Plan, PolicySettings, Snapshot, Usage

STARTUP_S, STOP_S, CHECKPOINT_S = 45.0, 15.0, 600.0
# What happens within this time is decided on together, as the service's tick does.
TICK_S = 15.0
# Work is told in so many steps: the store keeps a job's progress in whole ones.
_STEPS = 10**6
Decide = Callable[[Snapshot, float], Plan]


@dataclass
class SimulatedJob:
    """What is true of a job and no store knows: the work that is left, and what it waited."""

    spec: TraceJob
    left_s: float
    """Worker-seconds of training that are left."""
    waited_s: float = 0.0

    def done_s(self, job: Job, now: float) -> float:
        """Return the worker-seconds of training in the attempt that holds workers."""
        assert job.admitted_at is not None
        return max(0.0, now - job.admitted_at - STARTUP_S) * job.num_workers


@dataclass
class Record:
    """What a simulation leaves behind."""

    jobs: dict[str, SimulatedJob]
    times: list[float] = field(default_factory=list)
    """Of the ticks."""
    held: list[list[int]] = field(default_factory=list)
    """[tick, tenant]: workers held from that tick to the next."""
    wanted: list[list[int]] = field(default_factory=list)
    """[tick, tenant]: workers of its jobs that wait for workers or for their turn."""
    num_preemptions: int = 0
    num_resizes: int = 0
    num_failures: int = 0
    lost_to_stops_s: float = 0.0
    """Worker-seconds of stopping and starting again, for preemptions and resizes."""
    lost_to_failures_s: float = 0.0


class Simulation:
    """One run of a trace under one policy, in an empty store."""

    def __init__(
        self,
        trace: Trace,
        decide: Decide,
        store: Store,
        failures_per_worker_hour: float = 1 / 2000,
        settings: PolicySettings | None = None,
        seed: int = 1,
    ) -> None:
        self._trace, self._decide, self._store = trace, decide, store
        self._settings = settings or PolicySettings()
        self._failure_rate = failures_per_worker_hour / HOUR
        self._rng = np.random.default_rng(seed)
        self._usages: Mapping[str, Usage] = {}
        self._live: dict[str, Job] = {}
        self._queued_views: dict[str, JobView] = {}
        self._events: list[tuple[float, int, str, str, int]] = []
        self._numbers = itertools.count()
        self._tenants = {tenant.name: i for i, tenant in enumerate(trace.tenants)}
        self.record = Record({job.id: SimulatedJob(job, job.work_s) for job in trace.jobs})

    def run(self) -> Record:
        """Run until every job has ended."""
        for spec in self._trace.jobs:
            self._at(spec.submitted_at, "arrive", spec.id, 0)
        while self._events:
            now, happened = self._events[0][0] + TICK_S, False
            while self._events and self._events[0][0] <= now:
                at, _, kind, job_id, attempt = heapq.heappop(self._events)
                happened |= self._handle(at, kind, job_id, attempt)
            if happened:
                self._tick(now)
        for job_id in self.record.jobs:
            assert self._store.job(job_id).state == State.SUCCEEDED
        return self.record

    def _at(self, time: float, kind: str, job_id: str, attempt: int) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), kind, job_id, attempt))

    # What happens

    def _handle(self, now: float, kind: str, job_id: str, attempt: int) -> bool:
        """Let it happen, unless it was to happen to an attempt that is over; say whether it did."""
        true = self.record.jobs[job_id]
        if kind == "arrive":
            self._keep(self._store.submit(_submission(true.spec), now, job_id))
            return True
        job = self._live.get(job_id)
        if job is None or job.attempt != attempt:
            return False
        if kind == "retry" or job.state == State.QUEUED:
            return kind == "retry"
        if kind == "step":
            self._begin_steps(now, job, true)
        elif kind == "end":
            true.left_s = 0.0
            self._keep(self._store.succeed(job_id, attempt, (f"{job.tenant}.{job.name}", "1"), now))
        elif kind == "fail":
            self._fail(now, job, true)
        elif kind == "stopped":
            self.record.lost_to_stops_s += (STOP_S + STARTUP_S) * job.num_workers
            true.left_s -= true.done_s(job, now - STOP_S)
            self._keep(self._store.stopped(job_id, attempt, now))
            self._start(now, job_id)
        return True

    def _begin_steps(self, now: float, job: Job, true: SimulatedJob) -> None:
        done = 1 - true.left_s / true.spec.work_s
        time_left_s = true.left_s / job.num_workers
        progress = Progress(round(done * _STEPS), _STEPS, time_left_s=time_left_s)
        self._keep(self._store.beat(job.id, job.attempt, now, progress))

    def _fail(self, now: float, job: Job, true: SimulatedJob) -> None:
        assert job.admitted_at is not None
        done = true.done_s(job, now)
        kept = done - done % (CHECKPOINT_S * job.num_workers)
        self.record.num_failures += 1
        self.record.lost_to_failures_s += (now - job.admitted_at) * job.num_workers - kept
        true.left_s -= kept
        cause = FailureReason.WORKER_LOST
        again = self._keep(self._store.fail(job.id, job.attempt, cause, "a worker died", now))
        assert again.not_before is not None
        self._at(again.not_before, "retry", job.id, job.attempt)

    def _start(self, now: float, job_id: str) -> None:
        """Let an attempt that has been admitted, if there is one, run to its end or its failure."""
        job = self._live[job_id]
        if job.state != State.STARTING:
            return
        left_s = self.record.jobs[job_id].left_s / job.num_workers
        self._at(now + STARTUP_S, "step", job_id, job.attempt)
        self._at(now + STARTUP_S + left_s, "end", job_id, job.attempt)
        if self._failure_rate:
            fails_at = now + self._rng.exponential(1 / (self._failure_rate * job.num_workers))
            self._at(fails_at, "fail", job_id, job.attempt)

    def _keep(self, job: Job) -> Job:
        self._queued_views.pop(job.id, None)
        if job.finished_at is None:
            self._live[job.id] = job
        else:
            del self._live[job.id]
        return job

    # What is decided

    def _tick(self, now: float) -> None:
        plan = self._decide(self.snapshot(now), now)
        self._usages = plan.usages
        for admission in plan.admissions:
            job = self._live[admission.job_id]
            self.record.jobs[job.id].waited_s += now - job.queued_at
            workers, placement = admission.num_workers, admission.placement
            self._keep(self._store.admit(job.id, workers, placement, now))
            self._start(now, job.id)
        for preemption in plan.preemptions:
            self.record.num_preemptions += 1
            self._stop(now, preemption.job_id, StopCause(preemption.cause))
        for resize in plan.resizes:
            self.record.num_resizes += 1
            grows = resize.num_workers > self._live[resize.job_id].num_workers
            self._stop(
                now,
                resize.job_id,
                StopCause.RESIZE,
                next_workers=resize.num_workers,
                placement=resize.placement if grows else None,
            )
        self._write_down(now, plan)

    def _stop(
        self,
        now: float,
        job_id: str,
        cause: StopCause,
        next_workers: int = 0,
        placement: Mapping[str, int] | None = None,
    ) -> None:
        attempt, deadline = self._live[job_id].attempt, now + 2 * STOP_S
        self._keep(
            self._store.ask_stop(
                job_id,
                attempt,
                cause,
                deadline,
                now,
                next_workers=next_workers,
                placement=placement,
            )
        )
        self._at(now + STOP_S, "stopped", job_id, attempt)

    def snapshot(self, now: float) -> Snapshot:
        """Return what the policy sees."""
        tenants = [
            replace(it, usage=self._usages.get(it.name, Usage())) for it in self._trace.tenants
        ]
        jobs = [self._view(job, now) for job in self._live.values()]
        return Snapshot(jobs, tenants, self._trace.nodes, settings=self._settings)

    def _view(self, job: Job, now: float) -> JobView:
        known = self._queued_views.get(job.id)
        if known is not None:
            return known
        if job.started_at is not None and job.admitted_at is not None:
            trained_s = max(0.0, now - job.admitted_at - STARTUP_S)
            job = replace(job, saved_at=now - trained_s % CHECKPOINT_S)
        view = build_view(job, now, self._expected_s)
        if job.state == State.QUEUED:
            self._queued_views[job.id] = view
        return view

    def _expected_s(self, job: Job) -> float | None:
        spec = self.record.jobs[job.id].spec
        if spec.estimate_factor is None:
            return None
        return STARTUP_S + spec.estimate_factor * spec.work_s / spec.sizes[0]

    def _write_down(self, now: float, plan: Plan) -> None:
        held = [0] * len(self._tenants)
        wanted = [0] * len(self._tenants)
        for job in self._live.values():
            held[self._tenants[job.tenant]] += job.num_workers
        for job_id, wait in plan.waits.items():
            if wait.cause in ("workers", "order"):
                wanted[self._tenants[self._live[job_id].tenant]] += wait.needs
        assert sum(held) <= self._trace.num_workers
        self.record.times.append(now)
        self.record.held.append(held)
        self.record.wanted.append(wanted)


def _submission(spec: TraceJob) -> Submission:
    return Submission(
        tenant=spec.tenant,
        name=spec.id,
        config={},
        idempotency_key=spec.id,
        priority=spec.priority,
        worker=spec.worker,
        sizes=spec.sizes,
        base="s2ft://tiny",
    )
