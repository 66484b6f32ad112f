"""The scheduler: what drivers and people ask of it; and its tick, which another thread makes.

An attempt goes: admitted in the store; claimed by the driver that waits for it, or by the
scheduler for a driver that it launches; driven, with heartbeats; reported. ``live_jobs`` holds what
is asked often, ``tick`` decides, ``drivers`` launches and gives up.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from s2ft_ray.accounts import Accounts
from s2ft_ray.config import s2ft_home
from s2ft_ray.scheduler import accounting, lease, policy
from s2ft_ray.scheduler.answers import event_answer, job_answer, usage_answer
from s2ft_ray.scheduler.cluster import Cluster
from s2ft_ray.scheduler.drivers import Drivers
from s2ft_ray.scheduler.intake import (
    build_submission,
    check_priority,
    check_resumable,
    default_key,
    read_config,
)
from s2ft_ray.scheduler.launcher import Launcher
from s2ft_ray.scheduler.live_jobs import LiveJobs, is_paused
from s2ft_ray.scheduler.liveness import Liveness
from s2ft_ray.scheduler.models import FailureReason, Job, Progress, State, StopCause
from s2ft_ray.scheduler.policy_process import Policy
from s2ft_ray.scheduler.settings import QueueSettings
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.tick import Tick


class Scheduler:
    """The queue of one cluster. Safe to call from many threads, `tick` from one."""

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
        settings = settings or QueueSettings()
        times = settings.service
        self._store, self._accounts, self._clock, self._settings = store, accounts, clock, times
        self.wake = threading.Event()
        """Set when there is something to decide before the next tick is due."""
        self._liveness = Liveness(steady, times)
        self._jobs = LiveJobs(store, self._liveness, clock, times)
        drivers = Drivers(store, launcher, self._jobs, self._liveness, clock, times, self.wake)
        self._tick = Tick(store, accounts, cluster, self._jobs, drivers, policy, clock, settings)

    def tick(self) -> None:
        """Observe, decide, apply. Whatever it raises, the next tick goes on from the store."""
        self._tick.run()

    def forget(self) -> None:
        """Read the live jobs from the store again: nobody knows whether a write came through."""
        self._jobs.forget()

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
        nodes = self._tick.nodes()
        with self._jobs.lock:
            key = idempotency_key or default_key(config)
            mine = [job for job in self._jobs.all() if job.tenant == tenant.name]
            known = next((job for job in mine if job.idempotency_key == key), None)
            if known is None:
                submission = build_submission(
                    config,
                    tenant,
                    sum(job.state == State.QUEUED for job in mine),
                    nodes,
                    idempotency_key=key,
                    num_rows=num_rows,
                    queue_timeout_s=queue_timeout_s,
                    run_timeout_s=run_timeout_s,
                )
                new_id = f"job-{secrets.token_hex(5)}"
                job = self._jobs.keep(self._store.submit(submission, now, new_id))
            else:
                job = known
            may_wait = driver_id is not None and self._liveness.may_wait(job.id)
            if driver_id is not None and may_wait:
                self._liveness.wait(job.id, driver_id)
        self.wake.set()
        return {**self._answer(job), "is_new": known is None, "may_wait": may_wait}

    def poll(self, job_id: str, driver_id: str) -> dict[str, Any]:
        """Tell a driver that waits how its job stands."""
        with self._jobs.lock:
            job = self._jobs.find(job_id)
            if job.state in (State.QUEUED, State.STARTING):
                self._liveness.wait(job_id, driver_id)
            return self._answer(job)

    def claim(self, job_id: str, driver_id: str) -> dict[str, Any] | None:
        """Let a driver have the admitted attempt; None where another one has it."""
        with self._jobs.lock:
            job = self._jobs.find(job_id)
            if job.state != State.STARTING or job.submission_id not in (None, driver_id):
                return None
            job = self._jobs.keep(self._store.claim(job_id, job.attempt, driver_id, self._clock()))
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
        with self._jobs.lock:
            job = self._jobs.current(job_id, attempt)
            job = self._jobs.beat(job, told, saved_at, placement)
            return "stop" if job.state == State.PREEMPTING else "go on"

    def report(self, job_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        """Take an attempt's end: succeeded, preempted, or failed. Repeating it changes nothing.

        Raises StaleAttempt where the job has gone on without this driver.
        """
        rows, tokens = int(outcome.get("rows", 0)), int(outcome.get("tokens", 0))
        with self._jobs.lock:
            now, kind = self._clock(), outcome["outcome"]
            job = self._jobs.find(job_id)
            if job.state == State.SUCCEEDED and job.attempt == attempt and kind == "succeeded":
                return
            job = self._jobs.current(job_id, attempt)
            if kind == "succeeded":
                name, version = outcome["model"]
                model = (str(name), str(version))
                self._jobs.keep(self._store.succeed(job_id, attempt, model, now, rows, tokens))
            elif kind == "preempted" and job.state == State.PREEMPTING:
                self._jobs.keep(self._store.stopped(job_id, attempt, now, rows, tokens))
            else:
                reason = FailureReason(outcome.get("reason", FailureReason.DRIVER_LOST))
                message = str(outcome.get("message", "its driver was told to end from outside"))
                self._jobs.keep(
                    self._store.fail(job_id, attempt, reason, message, now, rows, tokens)
                )
        self.wake.set()

    # People

    def job(self, job_id: str) -> dict[str, Any]:
        """Tell the whole story of a job. Raises JobError where there is none of that id."""
        with self._jobs.lock:
            answer = self._answer(self._jobs.find(job_id))
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
        live = self._jobs.last_known()  # a tick may hold the lock for long
        return [self._answer(live.get(job.id, job)) for job in page]

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job; one that has ended stays as it is."""
        return self._ask(lambda now: self._store.cancel(job_id, now + self._settings.grace_s, now))

    def pause(self, job_id: str) -> dict[str, Any]:
        """Hold a job back until it is resumed."""
        return self._ask(lambda now: self._store.pause(job_id, now + self._settings.grace_s, now))

    def resume(self, job_id: str) -> dict[str, Any]:
        """Let a paused or failed job go on.

        Raises ConfigError for a failed one that would fail again, or may not be asked for now.
        """
        with self._jobs.lock:
            job = self._jobs.find(job_id)
            if job.state == State.FAILED:
                live = [it for it in self._jobs.all() if it.tenant == job.tenant]
                config = read_config(self._store.config(job_id))
                check_resumable(job, config, self._accounts.tenant(job.tenant), live)
            return self._ask(lambda now: self._store.resume(job_id, now))

    def set_priority(self, job_id: str, priority: int) -> dict[str, Any]:
        """Change a live job's priority. Raises ConfigError above its tenant's cap."""
        check_priority(priority, self._accounts.tenant(self._store.job(job_id).tenant))
        answer = self._ask(lambda now: self._store.set_priority(job_id, priority, now))
        self._tick.estimate_soon()
        return answer

    def drain(self, on: bool, stop_running: bool = False) -> None:
        """Admit nothing more, or again; what runs may be asked to stop and wait."""
        lease.set_draining(self._store.engine, on)
        with self._jobs.lock:
            for job in self._jobs.all():
                goes_on = job.state in (State.STARTING, State.RUNNING) or job.next_workers
                if on and stop_running and goes_on:
                    self._jobs.ask_stop(job, StopCause.DRAIN)
        self.wake.set()

    def usage(
        self, tenant: str | None = None, since: float = 0.0, by_job: bool = False
    ) -> list[dict[str, Any]]:
        """Return what tenants were given."""
        rows = accounting.usage(self._store.engine, self._clock(), since, tenant, by_job)
        return [usage_answer(row) for row in rows]

    # Parts of these

    def _ask(self, change: Callable[[float], Job]) -> dict[str, Any]:
        with self._jobs.lock:
            answer = self._answer(self._jobs.keep(change(self._clock())))
        self.wake.set()
        return answer

    def _answer(self, job: Job) -> dict[str, Any]:
        wait = None if is_paused(job) else self._tick.waits.get(job.id)
        return job_answer(job, wait, self._tick.starts.get(job.id))
