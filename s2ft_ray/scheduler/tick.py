"""The tick: observe, decide, apply.

Invariant: a crash at any line loses nothing and does nothing twice, because what a tick does is
written before it is done. The policy decides without a lock, so a part of its plan is applied only
to jobs that are still as they were.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from s2ft_ray.accounts import Accounts
from s2ft_ray.scheduler import accounting, lease
from s2ft_ray.scheduler.cluster import Cluster
from s2ft_ray.scheduler.drivers import Drivers
from s2ft_ray.scheduler.live_jobs import LiveJobs, is_paused
from s2ft_ray.scheduler.models import HOLDING, FailureReason, Job, State, StopCause
from s2ft_ray.scheduler.observation import Durations, build_view
from s2ft_ray.scheduler.policy.placement import kept_placement
from s2ft_ray.scheduler.policy_process import Policy
from s2ft_ray.scheduler.settings import QueueSettings
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import JobView, NodeView, Plan, Snapshot, TenantView, Usage, Wait

_STOP_CAUSES = {"priority": StopCause.PRIORITY, "quota": StopCause.QUOTA}


class Tick:
    """Ticks again and again, in one thread; what the last one found is for all to read."""

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        cluster: Cluster,
        jobs: LiveJobs,
        drivers: Drivers,
        policy: Policy,
        clock: Callable[[], float],
        settings: QueueSettings,
    ) -> None:
        self._store, self._accounts, self._cluster = store, accounts, cluster
        self._jobs, self._drivers, self._policy = jobs, drivers, policy
        self._clock, self._settings = clock, settings
        self.waits: Mapping[str, Wait] = {}
        """Why each job waits."""
        self.starts: Mapping[str, float] = {}
        """When each is expected to start."""
        self._nodes: Sequence[NodeView] | None = None
        self._views: dict[str, tuple[Job, JobView]] = {}
        self._usages: Mapping[str, Usage] = store.usages()
        self._durations = Durations(())
        self._due: dict[str, float] = {}
        """When things that are done now and then are due again."""

    def run(self) -> None:
        """Tick once. Whatever it raises, the next one goes on from the store."""
        times = self._settings.service
        self._nodes = self._observe()
        now = self._clock()
        self._end_overdue(now)
        snapshot = self._snapshot(now)
        plan = self._policy.decide(snapshot, now)  # others ask and report meanwhile
        with self._jobs.lock:
            self.waits, self._usages = plan.waits, plan.usages
            self._apply(plan, snapshot)
        if self._is_due("usages", times.save_s):
            self._store.save_usages(plan.usages)
        self._drivers.look_after_all()
        if plan.waits and self._is_due("estimate", times.estimate_s):
            self.starts = self._policy.expected_starts(snapshot, now)

    def nodes(self) -> Sequence[NodeView]:
        """Return the nodes as the last tick saw them, before the first one as they are now."""
        if self._nodes is None:
            self._nodes = self._observe()
        return self._nodes

    def estimate_soon(self) -> None:
        """Let the next tick estimate anew: the order has changed."""
        self._due.pop("estimate", None)

    # Observe

    def _observe(self) -> Sequence[NodeView]:
        return self._cluster.nodes(_held(self._jobs.holding()))

    def _snapshot(self, now: float) -> Snapshot:
        if self._is_due("measure", self._settings.service.measure_s):
            self._durations = Durations(accounting.measurements(self._store.engine))
            self._views.clear()
        tenants = [
            TenantView(
                it.name,
                it.weight,
                it.quota,
                it.max_workers,
                it.priority_cap,
                self._usages.get(it.name, Usage()),
            )
            for it in self._accounts.tenants()
        ]
        draining = lease.is_draining(self._store.engine)
        views = self._build_views(now)
        return Snapshot(views, tenants, self.nodes(), draining, self._settings.policy)

    def _build_views(self, now: float) -> list[JobView]:
        """Return the live jobs' views; those of queued jobs stay the same until a job changes."""
        before, self._views = self._views, {}
        views = []
        for job in self._jobs.all():
            if is_paused(job):
                continue
            known = before.get(job.id)
            if known is None or known[0] is not job or job.state != State.QUEUED:
                known = job, build_view(job, now, self._durations)
            self._views[job.id] = known
            views.append(known[1])
        return views

    # Apply

    def _apply(self, plan: Plan, snapshot: Snapshot) -> None:
        """Do what a plan says of the jobs that are still as it was decided for."""
        if lease.is_draining(self._store.engine) != snapshot.draining:
            return
        decided = {view.id: view for view in snapshot.jobs}
        for it in plan.admissions:
            if self._as_decided(it.job_id, decided):
                self._jobs.admit(it.job_id, it.num_workers, it.placement)
        for preemption in plan.preemptions:
            if job := self._as_decided(preemption.job_id, decided):
                detail = f"for {preemption.for_job_id}"
                self._jobs.ask_stop(job, _STOP_CAUSES[preemption.cause], detail=detail)
        for resize in plan.resizes:
            if job := self._as_decided(resize.job_id, decided):
                grows = resize.num_workers > job.num_workers
                self._jobs.ask_stop(
                    job,
                    StopCause.RESIZE,
                    detail=f"{resize.cause}: {job.num_workers} -> {resize.num_workers} workers",
                    next_workers=resize.num_workers,
                    placement=resize.placement if grows else None,
                )

    def _as_decided(self, job_id: str, decided: Mapping[str, JobView]) -> Job | None:
        """Return a job that may still be dealt with so: it began to run at most meanwhile."""
        job, view = self._jobs.get(job_id), decided[job_id]
        if job is None or job.attempt != view.attempt or is_paused(job):
            return None
        begun = view.state == "starting" and job.state == State.RUNNING
        return job if begun or str(job.state) == view.state else None

    def _end_overdue(self, now: float) -> None:
        """End those that waited too long, and ask those to stop that ran too long."""
        limited = [
            job
            for job in self._jobs.all()
            if job.queue_timeout_s is not None or job.run_timeout_s is not None
        ]
        running = [
            job.id
            for job in limited
            if job.run_timeout_s is not None and job.state == State.RUNNING
        ]
        ran_s = accounting.trained_s(self._store.engine, running, now) if running else {}
        for seen in limited:
            with self._jobs.lock:
                if (job := self._jobs.get(seen.id)) is not None:
                    self._end_if_overdue(job, ran_s.get(job.id, 0.0), now)

    def _end_if_overdue(self, job: Job, ran_s: float, now: float) -> None:
        waits = job.state == State.QUEUED and job.attempt == 0 and not job.held
        waited_s = now - job.queued_at
        if waits and job.queue_timeout_s is not None and waited_s > job.queue_timeout_s:
            message = f"waited {waited_s:.0f} s, its limit is {job.queue_timeout_s:.0f} s"
            reason = FailureReason.QUEUE_DEADLINE
            self._jobs.keep(self._store.reject(job.id, reason, message, now))
        runs = job.state in HOLDING
        if runs and job.run_timeout_s is not None and ran_s > job.run_timeout_s:
            self._jobs.ask_stop(job, StopCause.DEADLINE)

    def _is_due(self, what: str, every_s: float) -> bool:
        now = self._clock()
        if now < self._due.get(what, 0.0) <= now + every_s:
            return False
        self._due[what] = now + every_s
        return True


def _held(jobs: Iterable[Job]) -> dict[str, dict[str, float]]:
    """Return what jobs hold, by node id and resource."""
    held: dict[str, dict[str, float]] = {}
    for job in jobs:
        workers = max(job.num_workers, job.next_workers)
        for node_id, count in kept_placement(job.placement, workers).items():
            amounts = held.setdefault(node_id, {})
            for name, amount in job.worker.resources:
                amounts[name] = amounts.get(name, 0.0) + amount * count
    return held
