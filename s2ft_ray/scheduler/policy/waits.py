"""Why each job waits, kept as columns: a tick says it for all, people ask for a few."""

from collections.abc import Iterable, Iterator, Mapping

from s2ft_ray.scheduler.views import JobView, Wait, WaitCause

Columns = tuple[list[str], list[WaitCause], list[int]]
"""By place in the queue: job ids, causes, numbers of workers that would fit."""


class Waits(Mapping[str, Wait]):
    """The waiting jobs in the queue's order, by job id; a ``Wait`` is made when asked for."""

    def __init__(self) -> None:
        self._jobs: list[JobView] = []
        self._causes: list[WaitCause] = []
        self._free: list[int] = []
        self._places: dict[str, int] | None = None

    def add(self, job: JobView, cause: WaitCause, free: int = 0) -> None:
        """Put a job at the end; `free` of its workers would fit now."""
        self._jobs.append(job)
        self._causes.append(cause)
        self._free.append(free)

    def columns(self) -> Columns:
        """Return what another process needs to know, see ``of``."""
        return [job.id for job in self._jobs], self._causes, self._free

    @classmethod
    def of(cls, columns: Columns, jobs: Iterable[JobView]) -> "Waits":
        """Build them again from their columns and the jobs of the same snapshot."""
        by_id, waits = {job.id: job for job in jobs}, cls()
        ids, waits._causes, waits._free = columns
        waits._jobs = [by_id[job_id] for job_id in ids]
        return waits

    def __getitem__(self, job_id: str) -> Wait:
        if self._places is None:
            self._places = {job.id: place for place, job in enumerate(self._jobs)}
        place = self._places[job_id]
        job = self._jobs[place]
        ahead = self._jobs[place - 1].id if place else None
        cause, free = self._causes[place], self._free[place]
        return Wait(job.id, place + 1, ahead, cause, job.sizes[0], job.worker, free)

    def __iter__(self) -> Iterator[str]:
        return (job.id for job in self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)
