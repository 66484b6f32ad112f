"""The way to Ray Jobs: starting, watching and ending the drivers of attempts. Ray glue.

Invariant: a submission id names one driver for ever, so launching twice is launching once (Ray
refuses a second job of the same id).
"""

import logging
from typing import Any, Literal, Protocol

from s2ft_ray.scheduler.models import Job

logger = logging.getLogger(__name__)
DriverState = Literal["alive", "ended", "unknown"]

# How long Ray waits between asking a driver to end and killing it.
_STOP_WAIT_S = 30
_HTTP_TIMEOUT_S = 30.0


class Launcher(Protocol):
    """Starts and ends drivers."""

    def launch(self, job: Job) -> None:
        """Start the driver of the job's attempt under its submission id; repeating it is fine."""

    def state(self, submission_id: str) -> DriverState:
        """Return what became of a driver; unknown: Ray never had a job of that id."""

    def stop(self, submission_id: str) -> None:
        """End a driver; one that ended already stays as it is."""


def submission_id_of(job_id: str, attempt: int) -> str:
    """Return the submission id of an attempt that the scheduler launches itself."""
    return f"{job_id}-{attempt}"


class RayJobs:
    """Drivers as jobs of one Ray cluster."""

    def __init__(self, address: str) -> None:
        """Take the address of the dashboard, http://host:port."""
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """By itself it waits for ever, and the tick with it, for a dashboard that hangs."""

            def _do_request(self, *args: Any, **options: Any) -> Any:
                return super()._do_request(*args, timeout=_HTTP_TIMEOUT_S, **options)

        self._client = Client(address)

    def launch(self, job: Job) -> None:
        assert job.submission_id is not None
        if self.state(job.submission_id) != "unknown":
            return
        self._client.submit_job(
            # The installed package's module: no upload, so nothing of a submitter's code.
            entrypoint=f"python -m s2ft_ray.finetune --job {job.id} --attempt {job.attempt}",
            submission_id=job.submission_id,
            runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}},
            metadata={"s2ft_job": job.id, "tenant": job.tenant, "name": job.name},
        )

    def state(self, submission_id: str) -> DriverState:
        from ray.job_submission import JobStatus

        try:
            status = self._client.get_job_status(submission_id)
        except RuntimeError as error:
            if "does not exist" in str(error) or "404" in str(error):
                return "unknown"
            raise
        return "alive" if status in (JobStatus.PENDING, JobStatus.RUNNING) else "ended"

    def stop(self, submission_id: str) -> None:
        if self.state(submission_id) == "alive":
            self._client.stop_job(submission_id)
