"""The scheduler: what drivers and people ask of it, and its tick: observe, decide, apply.

It keeps the live jobs in memory beside the store, which it alone writes: every change is in the
store first. Invariant: a crash at any line loses nothing and does nothing twice, because what a
tick does is written before it is done, and doing it again (launching under the same submission
id, stopping what has stopped) changes nothing. Heartbeats alone are written now and then only.

An attempt goes: admitted in the store; claimed by the driver that waits for it, or by the
scheduler for a driver that it launches; driven, with heartbeats; reported. A driver that falls
silent is asked for at the launcher: where it ended, its job is tried again.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from s2ft_ray.accounts import Accounts
from s2ft_ray.config import s2ft_home
from s2ft_ray.errors import StaleAttempt
from s2ft_ray.scheduler import accounting, lease, policy
from s2ft_ray.scheduler.answers import event_answer, job_answer, usage_answer
from s2ft_ray.scheduler.cluster import Cluster
from s2ft_ray.scheduler.intake import build_submission, check_priority, default_key, read_config
from s2ft_ray.scheduler.launcher import Launcher, submission_id_of
from s2ft_ray.scheduler.liveness import Liveness
from s2ft_ray.scheduler.models import HOLDING, LIVE, FailureReason, Job, Progress, State, StopCause
from s2ft_ray.scheduler.observation import Durations, build_view
from s2ft_ray.scheduler.policy.placement import kept_placement
from s2ft_ray.scheduler.policy_process import Policy
from s2ft_ray.scheduler.settings import QueueSettings
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import JobView, NodeView, Plan, Snapshot, TenantView, Usage, Wait

logger = logging.getLogger(__name__)
_STOP_CAUSES = {"priority": StopCause.PRIORITY, "quota": StopCause.QUOTA}


class Scheduler:
    """The queue of one cluster. Safe to call from many threads."""

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        cluster: Cluster,
        launcher: Launcher,
        clock: Callable[[], float] = time.time,
        settings: QueueSettings | None = None,
        steady: Callable[[], float] = time.monotonic,
        policy: Policy = policy,
    ) -> None:
        self._store, self._accounts = store, accounts
        self._cluster, self._launcher = cluster, launcher
        settings = settings or QueueSettings()
        self._clock, self._settings = clock, settings.service
        self._policy, self._policy_settings = policy, settings.policy
        self._lock = threading.RLock()
        self.wake = threading.Event()
        """Set when there is something to decide before the next tick is due."""
        self._liveness = Liveness(steady, self._settings)
        self._jobs: dict[str, Job] | None = None
        self._views: dict[str, tuple[Job, JobView]] = {}
        self._nodes: Sequence[NodeView] | None = None
        self._waits: Mapping[str, Wait] = {}
        self._starts: Mapping[str, float] = {}
        self._launched: set[tuple[str, int]] = set()
        self._usages: Mapping[str, Usage] = store.usages()
        self._durations = Durations(())
        self._due: dict[str, float] = {}
        """When things that are done now and then are due again."""

    # Drivers

    def submit(
        self,
        document: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        driver_id: str | None = None,
        num_rows: int | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Queue a run; the answer also says whether it is new and whether its driver may wait.

        Raises ConfigError for what is no run, or what its tenant may not ask for.
        """
        config, now = read_config(document), self._clock()
        tenant = self._accounts.welcome(config.tenant)
        if self._nodes is None:  # before the first tick
            self._nodes = self._observe()
        with self._lock:
            key = idempotency_key or default_key(config)
            mine = [job for job in self._live().values() if job.tenant == tenant.name]
            known = next((job for job in mine if job.idempotency_key == key), None)
            if known is None:
                submission = build_submission(
                    config,
                    tenant,
                    sum(job.state == State.QUEUED for job in mine),
                    self._nodes,
                    idempotency_key=key,
                    num_rows=num_rows,
                    queue_timeout_s=queue_timeout_s,
                    run_timeout_s=run_timeout_s,
                )
                new_id = f"job-{secrets.token_hex(5)}"
                job = self._keep(self._store.submit(submission, now, new_id))
            else:
                job = known
            may_wait = driver_id is not None and self._liveness.may_wait(job.id)
            if driver_id is not None and may_wait:
                self._liveness.wait(job.id, driver_id)
        self.wake.set()
        return {**self._answer(job), "is_new": known is None, "may_wait": may_wait}

    def poll(self, job_id: str, driver_id: str) -> dict[str, Any]:
        """Tell a driver that waits how its job stands."""
        with self._lock:
            job = self._job(job_id)
            if job.state in (State.QUEUED, State.STARTING):
                self._liveness.wait(job_id, driver_id)
            return self._answer(job)

    def claim(self, job_id: str, driver_id: str) -> dict[str, Any] | None:
        """Let a driver have the admitted attempt; None where another one has it."""
        with self._lock:
            job = self._job(job_id)
            if job.state != State.STARTING or job.submission_id not in (None, driver_id):
                return None
            job = self._keep(self._store.claim(job_id, job.attempt, driver_id, self._clock()))
            self._liveness.stop_waiting(job_id)
            self._liveness.hear(job_id, job.attempt)
        config = self._store.config(job_id)
        storage = config["checkpoint"]["storage_path"] or str(s2ft_home() / "runs")
        return {
            "attempt": job.attempt,
            "num_workers": job.num_workers,
            "run_folder": f"{storage}/{job.tenant}/{job.name}/{job.id}",
            "resume": job.attempt > 1,
            "config": config,
        }

    def heartbeat(
        self,
        job_id: str,
        attempt: int,
        progress: Mapping[str, Any] | None = None,
        saved_at: float | None = None,
        placement: Mapping[str, int] | None = None,
    ) -> str:
        """Note a sign of life; the answer is "go on", or "stop" for a stop at the next step.

        `placement` says where Ray put the workers, by node id: the ledger follows it. Raises
        StaleAttempt where the job has gone on without this driver.
        """
        told = Progress(**progress) if progress else None
        with self._lock:
            job, now = self._current(job_id, attempt), self._clock()
            self._liveness.hear(job_id, attempt)
            before = job.progress.starts if job.progress else 0
            is_event = told is not None and (
                job.state == State.STARTING or told.starts > max(before, 1)
            )
            if job.next_workers > job.num_workers:  # its ledger is that of its next size
                placement = None
            has_moved = placement is not None and dict(placement) != dict(job.placement)
            if is_event or has_moved or self._is_due(f"beat {job_id}", self._settings.save_s):
                job = self._store.beat(job_id, attempt, now, told, saved_at, placement)
            job = replace(
                job,
                heartbeat_at=now,
                progress=told or job.progress,
                saved_at=saved_at or job.saved_at,
            )
            self._live()[job_id] = job
            return "stop" if job.state == State.PREEMPTING else "go on"

    def report(self, job_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        """Take an attempt's end: succeeded, preempted, or failed. Repeating it changes nothing.

        Raises StaleAttempt where the job has gone on without this driver.
        """
        rows, tokens = int(outcome.get("rows", 0)), int(outcome.get("tokens", 0))
        with self._lock:
            now, kind = self._clock(), outcome["outcome"]
            job = self._job(job_id)
            if job.state == State.SUCCEEDED and job.attempt == attempt and kind == "succeeded":
                return
            job = self._current(job_id, attempt)
            if kind == "succeeded":
                name, version = outcome["model"]
                model = (str(name), str(version))
                self._keep(self._store.succeed(job_id, attempt, model, now, rows, tokens))
            elif kind == "preempted" and job.state == State.PREEMPTING:
                self._keep(self._store.stopped(job_id, attempt, now, rows, tokens))
            else:
                reason = FailureReason(outcome.get("reason", FailureReason.DRIVER_LOST))
                message = str(outcome.get("message", "its driver was told to end from outside"))
                self._keep(self._store.fail(job_id, attempt, reason, message, now, rows, tokens))
        self.wake.set()

    # People

    def job(self, job_id: str) -> dict[str, Any]:
        """Tell the whole story of a job. Raises JobError where there is none of that id."""
        with self._lock:
            answer = self._answer(self._job(job_id))
        events = [event_answer(event) for event in self._store.events(job_id)]
        return {**answer, "config": self._store.config(job_id), "events": events}

    def jobs(
        self,
        tenant: str | None = None,
        states: Iterable[str] = (),
        limit: int = 100,
        after: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return a page of jobs, newest first."""
        page = self._store.jobs(tenant, [State(state) for state in states], limit, after)
        live = self._jobs or {}  # read without the lock: a tick may hold it for long
        return [self._answer(live.get(job.id, job)) for job in page]

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job; one that has ended stays as it is."""
        return self._ask(lambda now: self._store.cancel(job_id, now + self._settings.grace_s, now))

    def pause(self, job_id: str) -> dict[str, Any]:
        """Hold a job back until it is resumed."""
        return self._ask(lambda now: self._store.pause(job_id, now + self._settings.grace_s, now))

    def resume(self, job_id: str) -> dict[str, Any]:
        """Let a paused job go on."""
        return self._ask(lambda now: self._store.resume(job_id, now))

    def set_priority(self, job_id: str, priority: int) -> dict[str, Any]:
        """Change a live job's priority. Raises ConfigError above its tenant's cap."""
        check_priority(priority, self._accounts.tenant(self._store.job(job_id).tenant))
        answer = self._ask(lambda now: self._store.set_priority(job_id, priority, now))
        self._due.pop("estimate", None)  # the order has changed
        return answer

    def drain(self, on: bool, stop_running: bool = False) -> None:
        """Admit nothing more, or again; what runs may be asked to stop and wait."""
        lease.set_draining(self._store.engine, on)
        with self._lock:
            for job in list(self._live().values()):
                goes_on = job.state in (State.STARTING, State.RUNNING) or job.next_workers
                if on and stop_running and goes_on:
                    self._stop(job, StopCause.DRAIN)
        self.wake.set()

    def usage(
        self, tenant: str | None = None, since: float = 0.0, by_job: bool = False
    ) -> list[dict[str, Any]]:
        """Return what tenants were given."""
        rows = accounting.usage(self._store.engine, self._clock(), since, tenant, by_job)
        return [usage_answer(row) for row in rows]

    # The tick

    def tick(self) -> None:
        """Observe, decide, apply. Whatever it raises, the next tick goes on from the store."""
        self._nodes = self._observe()
        now = self._clock()
        self._end_overdue(now)
        snapshot = self._snapshot(now)
        plan = self._policy.decide(snapshot, now)  # others ask and report meanwhile
        with self._lock:
            self._waits, self._usages = plan.waits, plan.usages
            self._apply(plan, snapshot, now)
        if self._is_due("usages", self._settings.save_s):
            self._store.save_usages(plan.usages)
        self._look_after_drivers()
        if plan.waits and self._is_due("estimate", self._settings.estimate_s):
            self._starts = self._policy.expected_starts(snapshot, now)

    def _observe(self) -> Sequence[NodeView]:
        return self._cluster.nodes(_held(self._holding()))

    def _snapshot(self, now: float) -> Snapshot:
        if self._is_due("measure", self._settings.measure_s):
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
        return Snapshot(views, tenants, self._nodes or (), draining, self._policy_settings)

    def _build_views(self, now: float) -> list[JobView]:
        """Return the live jobs' views; those of queued jobs stay the same until a job changes."""
        before, self._views = self._views, {}
        views = []
        for job in self._all_live():
            if _is_paused(job):
                continue
            known = before.get(job.id)
            if known is None or known[0] is not job or job.state != State.QUEUED:
                known = job, build_view(job, now, self._durations)
            self._views[job.id] = known
            views.append(known[1])
        return views

    def _apply(self, plan: Plan, snapshot: Snapshot, now: float) -> None:
        """Do what a plan says of the jobs that are still as it was decided for."""
        if lease.is_draining(self._store.engine) != snapshot.draining:
            return
        decided = {view.id: view for view in snapshot.jobs}
        for it in plan.admissions:
            if self._is_as_decided(it.job_id, decided):
                job = self._store.admit(it.job_id, it.num_workers, it.placement, now)
                self._liveness.hear(job.id, job.attempt)
                self._keep(job)
        for preemption in plan.preemptions:
            if self._is_as_decided(preemption.job_id, decided):
                job = self._live()[preemption.job_id]
                detail = f"for {preemption.for_job_id}"
                self._stop(job, _STOP_CAUSES[preemption.cause], detail=detail)
        for resize in plan.resizes:
            if not self._is_as_decided(resize.job_id, decided):
                continue
            job = self._live()[resize.job_id]
            grows = resize.num_workers > job.num_workers
            self._stop(
                job,
                StopCause.RESIZE,
                detail=f"{resize.cause}: {job.num_workers} -> {resize.num_workers} workers",
                next_workers=resize.num_workers,
                placement=resize.placement if grows else None,
            )

    def _is_as_decided(self, job_id: str, decided: Mapping[str, JobView]) -> bool:
        """Say whether a job may still be dealt with so: it began to run at most meanwhile."""
        job, view = self._live().get(job_id), decided[job_id]
        if job is None or job.attempt != view.attempt or _is_paused(job):
            return False
        begun = view.state == "starting" and job.state == State.RUNNING
        return begun or str(job.state) == view.state

    def _end_overdue(self, now: float) -> None:
        """End those that waited too long, and ask those to stop that ran too long."""
        limited = [
            job
            for job in self._all_live()
            if job.queue_timeout_s is not None or job.run_timeout_s is not None
        ]
        running = [
            job.id
            for job in limited
            if job.run_timeout_s is not None and job.state == State.RUNNING
        ]
        ran_s = accounting.trained_s(self._store.engine, running, now) if running else {}
        for seen in limited:
            with self._lock:
                if (job := self._live().get(seen.id)) is not None:
                    self._end_if_overdue(job, ran_s.get(job.id, 0.0), now)

    def _end_if_overdue(self, job: Job, ran_s: float, now: float) -> None:
        waits = job.state == State.QUEUED and job.attempt == 0 and not job.held
        waited_s = now - job.queued_at
        if waits and job.queue_timeout_s is not None and waited_s > job.queue_timeout_s:
            message = f"waited {waited_s:.0f} s, its limit is {job.queue_timeout_s:.0f} s"
            reason = FailureReason.QUEUE_DEADLINE
            self._keep(self._store.reject(job.id, reason, message, now))
        runs = job.state in HOLDING
        if runs and job.run_timeout_s is not None and ran_s > job.run_timeout_s:
            self._stop(job, StopCause.DEADLINE)

    # Drivers, seen from the tick

    def _look_after_drivers(self) -> None:
        for job in self._holding():
            try:
                self._look_after(job)
            except (SQLAlchemyError, StaleAttempt):
                raise
            except Exception:  # Ray or its dashboard is away: the next tick asks again
                logger.exception("%s: its driver can't be looked after now", job.id)

    def _look_after(self, job: Job) -> None:
        now, settings = self._clock(), self._settings
        own_id = submission_id_of(job.id, job.attempt)
        if job.submission_id is None:
            job = self._find_driver(job, own_id, now)
            if job.submission_id is None:
                return
        begins = job.state == State.STARTING and job.submission_id == own_id
        if begins and (job.id, job.attempt) not in self._launched:
            self._launcher.launch(job)
            self._launched.add((job.id, job.attempt))
            return
        assert job.submission_id is not None
        overdue = self._liveness.is_overdue(job, now)
        silent_s = self._liveness.silent_s(job)
        if silent_s < settings.quiet_s and not overdue:
            return
        state = self._launcher.state(job.submission_id)
        is_lost = state == "unknown" and (overdue or silent_s > settings.lost_s)
        if state == "ended" or is_lost:
            self._give_up(job)  # one that lives all the same ends itself at its next heartbeat
        elif state == "alive" and (overdue or silent_s > settings.hung_s):
            self._launcher.stop(job.submission_id)

    def _find_driver(self, job: Job, own_id: str, now: float) -> Job:
        """Leave an admission to the driver that waits, else claim it for one to be launched."""
        with self._lock:
            job = self._live().get(job.id, job)
            if job.state == State.PREEMPTING:  # stopped before anybody drove it
                return self._keep(self._store.stopped(job.id, job.attempt, now))
            waited_s = self._liveness.silent_s(job)
            if self._liveness.is_waited_for(job.id) and waited_s < self._settings.claim_s:
                return job
            if job.state != State.STARTING or job.submission_id is not None:
                return job
            return self._keep(self._store.claim(job.id, job.attempt, own_id, now))

    def _give_up(self, seen: Job) -> None:
        """End an attempt whose driver ended without a report."""
        with self._lock:
            job, now = self._live().get(seen.id), self._clock()
            if job is None or job.attempt != seen.attempt or job.state not in HOLDING:
                return
            told = job.progress
            done = (told.rows, told.tokens) if told else (0, 0)
            if job.state == State.PREEMPTING:
                self._keep(self._store.stopped(job.id, job.attempt, now, *done))
            else:
                reason, message = FailureReason.DRIVER_LOST, "its driver ended without a report"
                self._keep(self._store.fail(job.id, job.attempt, reason, message, now, *done))
        self.wake.set()

    # The live jobs in memory

    def _live(self) -> dict[str, Job]:
        if self._jobs is None:
            self._jobs = {job.id: job for job in self._store.live_jobs()}
        return self._jobs

    def _all_live(self) -> list[Job]:
        with self._lock:
            return list(self._live().values())

    def _holding(self) -> list[Job]:
        return [job for job in self._all_live() if job.state in HOLDING]

    def forget(self) -> None:
        """Read the live jobs from the store again: nobody knows whether a write came through."""
        with self._lock:
            self._jobs = None

    def _keep(self, job: Job) -> Job:
        live = self._live()
        if job.state not in LIVE:
            live.pop(job.id, None)
            self._liveness.forget(job.id)
            self._launched = {it for it in self._launched if it[0] != job.id}
            self._due.pop(f"beat {job.id}", None)
            return job
        known = live.get(job.id)
        if known and known.attempt == job.attempt and known.heartbeat_at and job.heartbeat_at:
            job = replace(job, heartbeat_at=known.heartbeat_at, progress=known.progress)
        live[job.id] = job
        return job

    def _job(self, job_id: str) -> Job:
        return self._live().get(job_id) or self._store.job(job_id)

    def _current(self, job_id: str, attempt: int) -> Job:
        job = self._job(job_id)
        if job.state not in HOLDING or job.attempt != attempt:
            raise StaleAttempt(job_id, attempt, f"{job.state}, attempt {job.attempt}")
        return job

    def _stop(
        self,
        job: Job,
        cause: StopCause,
        *,
        detail: str | None = None,
        next_workers: int = 0,
        placement: Mapping[str, int] | None = None,
    ) -> None:
        now = self._clock()
        deadline = now + self._settings.grace_s
        self._keep(
            self._store.ask_stop(
                job.id,
                job.attempt,
                cause,
                deadline,
                now,
                detail=detail,
                next_workers=next_workers,
                placement=placement,
            )
        )

    def _ask(self, change: Callable[[float], Job]) -> dict[str, Any]:
        with self._lock:
            answer = self._answer(self._keep(change(self._clock())))
        self.wake.set()
        return answer

    def _answer(self, job: Job) -> dict[str, Any]:
        wait = None if _is_paused(job) else self._waits.get(job.id)
        return job_answer(job, wait, self._starts.get(job.id))

    def _is_due(self, what: str, every_s: float) -> bool:
        now = self._clock()
        if now < self._due.get(what, 0.0) <= now + every_s:
            return False
        self._due[what] = now + every_s
        return True


def _is_paused(job: Job) -> bool:
    return job.held and job.state == State.QUEUED


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
