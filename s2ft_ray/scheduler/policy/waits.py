"""Why each job waits, kept as columns: a tick says it for all, people ask for a few."""

from collections.abc import Iterator, Mapping

from s2ft_ray.scheduler.views import JobView, Wait, WaitCause


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
