"""A queue's life at the speed of its events: the real policy, workers that only pretend.

A job that starts needs `STARTUP_S` before it trains; one that is asked to stop saves and leaves
after `STOP_S`; a worker that dies takes its job back to the last checkpoint. Invariant: every
job ends exactly once, and the workers that are held never pass what the nodes have (checked).
"""

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from benchmarks.queue_trace import HOUR, Trace, TraceJob
from s2ft_ray.scheduler.views import (
    JobView,
    Plan,
    PolicySettings,
    Resize,
    Snapshot,
    TenantView,
    Usage,
)

STARTUP_S, STOP_S, CHECKPOINT_S, BACKOFF_S = 45.0, 15.0, 600.0, 60.0
# What happens within this time is decided on together, as the service's tick does.
TICK_S = 15.0
Decide = Callable[[Snapshot, float], Plan]


@dataclass
class LiveJob:
    """A job in the simulation."""

    spec: TraceJob
    left_s: float
    """Worker-seconds of training that are left."""
    state: Literal["queued", "running", "preempting", "succeeded"] = "queued"
    num_workers: int = 0
    next_workers: int = 0
    placement: Mapping[str, int] = field(default_factory=dict)
    next_placement: Mapping[str, int] = field(default_factory=dict)
    started_at: float = 0.0
    attempt: int = 0
    num_preemptions: int = 0
    not_before: float | None = None
    queued_at: float = 0.0
    waited_s: float = 0.0
    first_start: float | None = None
    finished_at: float | None = None

    def done_s(self, now: float) -> float:
        """Return the worker-seconds of training in this attempt."""
        return max(0.0, now - self.started_at - STARTUP_S) * self.num_workers

    def view(self, now: float) -> JobView:
        """Return what the policy may know of it."""
        spec = self.spec
        left = None
        if self.state == "queued":
            if spec.estimate_factor is not None:
                left = STARTUP_S + spec.estimate_factor * self.left_s / spec.sizes[0]
        elif now - self.started_at > STARTUP_S or spec.estimate_factor is not None:
            # Its steps have been measured by then.
            left = max(self.left_s - self.done_s(now), 0.0) / self.num_workers
            left += max(0.0, STARTUP_S - (now - self.started_at))
        return JobView(
            id=spec.id,
            tenant=spec.tenant,
            state=self.state,
            worker=spec.worker,
            sizes=spec.sizes,
            submitted_at=spec.submitted_at,
            priority=spec.priority,
            time_left_s=left,
            not_before=self.not_before,
            num_preemptions=self.num_preemptions,
            num_workers=self.num_workers,
            next_workers=self.next_workers,
            started_at=self.started_at if self.num_workers else None,
            placement=self.placement,
            progress_lost_s=STARTUP_S + STOP_S,
        )


@dataclass
class Record:
    """What a simulation leaves behind."""

    jobs: dict[str, LiveJob]
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
    """One run of a trace under one policy."""

    def __init__(
        self,
        trace: Trace,
        decide: Decide,
        failures_per_worker_hour: float = 1 / 2000,
        settings: PolicySettings | None = None,
        seed: int = 1,
    ) -> None:
        self._trace, self._decide = trace, decide
        self._settings = settings or PolicySettings()
        self._failure_rate = failures_per_worker_hour / HOUR
        self._rng = np.random.default_rng(seed)
        self._usages: Mapping[str, Usage] = {}
        self._active: dict[str, LiveJob] = {}
        self._queued_views: dict[str, JobView] = {}
        self._events: list[tuple[float, int, str, LiveJob, int]] = []
        self._numbers = itertools.count()
        self._tenants = {tenant.name: i for i, tenant in enumerate(trace.tenants)}
        self.record = Record({job.id: LiveJob(job, job.work_s) for job in trace.jobs})

    def run(self) -> Record:
        """Run until every job has ended."""
        for job in self.record.jobs.values():
            self._at(job.spec.submitted_at, "arrive", job)
        while self._events:
            now, happened = self._events[0][0] + TICK_S, False
            while self._events and self._events[0][0] <= now:
                at, _, kind, job, attempt = heapq.heappop(self._events)
                if attempt == job.attempt:  # else it was to happen to an attempt that is over
                    self._handle(at, kind, job)
                    happened = True
            if happened:
                self._tick(now)
        assert all(job.finished_at is not None for job in self.record.jobs.values())
        return self.record

    def snapshot(self, now: float) -> Snapshot:
        """Return what the policy sees."""
        jobs = []
        for job in self._active.values():
            if job.state == "queued":
                view = self._queued_views.get(job.spec.id)
                if view is None:
                    view = self._queued_views[job.spec.id] = job.view(now)
                jobs.append(view)
            else:
                jobs.append(job.view(now))
        tenants = [
            TenantView(
                it.name,
                it.weight,
                it.quota,
                it.max_workers,
                it.priority_cap,
                self._usages.get(it.name, Usage()),
            )
            for it in self._trace.tenants
        ]
        return Snapshot(jobs, tenants, self._trace.nodes, settings=self._settings)

    def _at(self, time: float, kind: str, job: LiveJob) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), kind, job, job.attempt))

    def _handle(self, now: float, kind: str, job: LiveJob) -> None:
        if kind == "arrive":
            self._active[job.spec.id] = job
            job.queued_at = now
        elif kind == "end":
            job.state, job.finished_at, job.num_workers, job.left_s = "succeeded", now, 0, 0.0
            job.attempt += 1
            del self._active[job.spec.id]
        elif kind == "fail":
            done = job.done_s(now)
            kept = done - done % (CHECKPOINT_S * job.num_workers)
            self.record.num_failures += 1
            self.record.lost_to_failures_s += (now - job.started_at) * job.num_workers - kept
            job.left_s -= kept
            self._requeue(now, job, now + BACKOFF_S)
            self._at(now + BACKOFF_S, "retry", job)
        elif kind == "stopped":
            self.record.lost_to_stops_s += (STOP_S + STARTUP_S) * job.num_workers
            job.left_s -= job.done_s(now - STOP_S)
            if job.next_workers:
                self._start(now, job, job.next_workers, job.next_placement)
            else:
                job.num_preemptions += 1
                self._requeue(now, job, None)

    def _requeue(self, now: float, job: LiveJob, not_before: float | None) -> None:
        job.state, job.num_workers, job.next_workers, job.placement = "queued", 0, 0, {}
        job.attempt += 1
        job.not_before, job.queued_at = not_before, now
        self._queued_views.pop(job.spec.id, None)

    def _start(
        self, now: float, job: LiveJob, num_workers: int, placement: Mapping[str, int]
    ) -> None:
        job.state, job.num_workers, job.next_workers = "running", num_workers, 0
        job.placement, job.started_at, job.not_before = placement, now, None
        job.attempt += 1
        self._at(now + STARTUP_S + job.left_s / num_workers, "end", job)
        if self._failure_rate:
            fails_at = now + self._rng.exponential(1 / (self._failure_rate * num_workers))
            self._at(fails_at, "fail", job)

    def _tick(self, now: float) -> None:
        plan = self._decide(self.snapshot(now), now)
        self._usages = plan.usages
        for admission in plan.admissions:
            job = self.record.jobs[admission.job_id]
            assert job.state == "queued"
            job.waited_s += now - job.queued_at
            job.first_start = now if job.first_start is None else job.first_start
            self._queued_views.pop(job.spec.id, None)
            self._start(now, job, admission.num_workers, admission.placement)
        for preemption in plan.preemptions:
            self._stop(now, self.record.jobs[preemption.job_id], None)
        for resize in plan.resizes:
            self._stop(now, self.record.jobs[resize.job_id], resize)
        self._write_down(now, plan)

    def _stop(self, now: float, job: LiveJob, resize: Resize | None) -> None:
        assert job.state == "running"
        if resize is None:
            self.record.num_preemptions += 1
        else:
            self.record.num_resizes += 1
            job.next_workers, job.next_placement = resize.num_workers, resize.placement
            if resize.num_workers > job.num_workers:  # held from now on
                job.placement = resize.placement
        job.state = "preempting"
        left = job.left_s - job.done_s(now)
        if left > STOP_S * job.num_workers:  # else it has ended before it could stop
            job.attempt += 1
            self._at(now + STOP_S, "stopped", job)

    def _write_down(self, now: float, plan: Plan) -> None:
        held = [0] * len(self._tenants)
        wanted = [0] * len(self._tenants)
        for job in self._active.values():
            held[self._tenants[job.spec.tenant]] += job.num_workers
        for job_id, wait in plan.waits.items():
            if wait.cause in ("workers", "order"):
                wanted[self._tenants[self.record.jobs[job_id].spec.tenant]] += wait.needs
        assert sum(held) <= self._trace.num_workers
        self.record.times.append(now)
        self.record.held.append(held)
        self.record.wanted.append(wanted)
