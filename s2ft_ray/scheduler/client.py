"""What drivers and the command line ask the scheduler: calls of its actor, over Ray.

Ray glue. Invariant: what the scheduler refuses comes out as the error that it raised, never as
one of Ray's; while the scheduler is being started again a call waits for it.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from s2ft_ray.errors import JobError, S2FTError
from s2ft_ray.scheduler.actor import ACTOR_NAME, NAMESPACE

_PATIENCE_S = 60.0
_REPORT_PATIENCE_S = 600.0
"""An attempt's end is told once, and hours of work hang on it."""
_PAUSE_S = 0.5

Answer = dict[str, Any]
"""A job as `s2ft jobs --json` shows it."""


class QueueClient:
    """The scheduler of the cluster that this process is connected to."""

    def __init__(self, actor: Any, patience_s: float = _PATIENCE_S) -> None:
        """`patience_s`: how long a call waits for a scheduler that is being started again."""
        self._actor = actor
        self._patience_s = patience_s

    @classmethod
    def find(cls, patience_s: float = _PATIENCE_S) -> Self | None:
        """Return the cluster's scheduler, None where it has none."""
        try:
            return cls(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE), patience_s)
        except ValueError:
            return None

    # What a driver asks

    def submit(
        self,
        document: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        driver_id: str | None = None,
        num_rows: int | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
    ) -> Answer:
        """Queue a resolved run; return its job, with `is_new` and `may_wait`.

        Of a tenant's active jobs with the same key there is one. `driver_id` is who waits for
        it; `num_rows` is about how many rows the run goes through, where that is known. Raises
        ConfigError for what can't be queued.
        """
        return self._ask_job(
            "submit",
            dict(document),
            idempotency_key=idempotency_key,
            driver_id=driver_id,
            num_rows=num_rows,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=run_timeout_s,
        )

    def poll(self, job_id: str, driver_id: str) -> Answer:
        """Say that a driver still waits; return its job."""
        return self._ask_job("poll", job_id, driver_id)

    def claim(self, job_id: str, driver_id: str) -> dict[str, Any] | None:
        """Take the admitted attempt: its number, num_workers, run_folder and config.

        Return None where another driver has it, or there is none.
        """
        claim: dict[str, Any] | None = self._ask("claim", job_id, driver_id)
        return claim

    def heartbeat(
        self,
        job_id: str,
        attempt: int,
        progress: Mapping[str, Any] | None = None,
        saved_at: float | None = None,
        placement: Mapping[str, int] | None = None,
    ) -> str:
        """Give a sign of life; return "go on" or "stop". Raises StaleAttempt.

        `saved_at` is when the newest checkpoint was saved; `placement` the workers by node id.
        """
        answer: str = self._ask("heartbeat", job_id, attempt, progress, saved_at, placement)
        return answer

    def report(self, job_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        """Tell how an attempt ended. Raises StaleAttempt."""
        patient = QueueClient(self._actor, max(self._patience_s, _REPORT_PATIENCE_S))
        patient._ask("report", job_id, attempt, dict(outcome))

    # What people ask

    def jobs(
        self,
        tenant: str | None = None,
        states: Iterable[str] = (),
        limit: int = 100,
        after: str | None = None,
    ) -> list[Answer]:
        """Return a page of jobs, newest first; `after` is the last id of the page before."""
        found: list[Answer] = self._ask("jobs", tenant, list(states), limit, after)
        return found

    def job(self, job_id: str) -> Answer:
        """Return a job with its `config` and `events`. Raises JobError where there is none."""
        return self._ask_job("job", job_id)

    def cancel(self, job_id: str) -> Answer:
        """End a job, in whatever state it is; an ended one stays as it ended."""
        return self._ask_job("cancel", job_id)

    def pause(self, job_id: str) -> Answer:
        """Hold a job back; one that runs stops at its next step."""
        return self._ask_job("pause", job_id)

    def resume(self, job_id: str) -> Answer:
        """Let a paused or failed job wait for its turn again."""
        return self._ask_job("resume", job_id)

    def set_priority(self, job_id: str, priority: int) -> Answer:
        """Change the priority of a job that has not ended."""
        return self._ask_job("set_priority", job_id, priority)

    def drain(self, on: bool, stop_running: bool = False) -> None:
        """Start nothing more, or go on; what runs may be asked to stop and wait."""
        self._ask("drain", on, stop_running)

    def usage(
        self, tenant: str | None = None, since: float = 0.0, by_job: bool = False
    ) -> list[dict[str, Any]]:
        """Return what was used since a time, by tenant or by job."""
        found: list[dict[str, Any]] = self._ask("usage", tenant, since, by_job)
        return found

    def _ask_job(self, method: str, *args: Any, **kwargs: Any) -> Answer:
        answer: Answer = self._ask(method, *args, **kwargs)
        return answer

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + self._patience_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                answer = self._actor.ask.remote(method, *args, **kwargs)
                return ray.get(answer, timeout=max(left_s, 1.0))
            except RayTaskError as error:
                if isinstance(error.cause, S2FTError):
                    raise error.cause from None
                fault = f"the scheduler failed in {method}: {error.cause}"  # its database is away
            except (ActorUnavailableError, ActorDiedError, GetTimeoutError) as error:
                fault = f"the scheduler doesn't answer ({type(error).__name__})"
            if left_s < _PAUSE_S:
                raise JobError(f"{fault}; its jobs are kept; see `s2ft status`")
            time.sleep(_PAUSE_S)
            started_anew = type(self).find()
            if started_anew is not None:
                self._actor = started_anew._actor
