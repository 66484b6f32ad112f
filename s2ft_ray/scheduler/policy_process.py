"""The policy in a process of its own, so that the scheduler answers people while it decides.

``python -m s2ft_ray.scheduler.policy_process`` is that process: one question in, one answer out,
until its parent is gone, whose pipe it reads. It keeps the views of jobs that it was told, so a
question brings only those that are new or have changed.
"""

import logging
import os
import pickle
import select
import subprocess
import sys
import traceback
from dataclasses import replace
from typing import IO, Any, Protocol

from s2ft_ray.errors import JobError
from s2ft_ray.scheduler import policy
from s2ft_ray.scheduler.policy.waits import Waits
from s2ft_ray.scheduler.views import JobView, Plan, Snapshot

logger = logging.getLogger(__name__)
_PATIENCE_S = 60.0
"""For an answer that takes a second at 10,000 jobs."""


class Policy(Protocol):
    """What the scheduler asks: the module ``policy``, or a process that computes the same."""

    def decide(self, snapshot: Snapshot, now: float) -> Plan:
        """Return what to do at `now`."""

    def expected_starts(self, snapshot: Snapshot, now: float) -> dict[str, float]:
        """Return when queued jobs are expected to start, by job id."""


class PolicyProcess:
    """``decide`` and ``expected_starts``, computed elsewhere. For one thread.

    The process starts when it is needed, and again after it has died. A question of which it dies
    twice (no memory for it, say) is answered in this process. Raises JobError where the policy
    itself fails.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._told: dict[str, JobView] = {}

    def decide(self, snapshot: Snapshot, now: float) -> Plan:
        """Return what to do at `now`, as ``policy.decide`` does."""
        plan: Plan
        plan, columns = self._ask("decide", snapshot, now)
        return replace(plan, waits=Waits.of(columns, snapshot.jobs))

    def expected_starts(self, snapshot: Snapshot, now: float) -> dict[str, float]:
        """Return when queued jobs are expected to start, as ``policy.expected_starts`` does."""
        starts: dict[str, float] = self._ask("expected_starts", snapshot, now)
        return starts

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._told = None, {}

    def _ask(self, what: str, snapshot: Snapshot, now: float) -> Any:
        fault: Exception | None = None
        for _ in range(2):
            try:
                error, answer = self._exchange(what, snapshot, now)
            except (OSError, EOFError, pickle.PickleError) as died:
                fault = died
                continue
            if error is not None:
                raise JobError(f"the policy failed: {error}")
            return answer
        logger.error("the process of the policy has died twice: %r; this one decides", fault)
        return _answer(what, snapshot, now)

    def _exchange(self, what: str, snapshot: Snapshot, now: float) -> tuple[str | None, Any]:
        """Ask, and return what failed or None, and the answer."""
        try:
            process = self._process = self._process or _start()
            assert process.stdin is not None
            assert process.stdout is not None
            before, self._told = self._told, {job.id: job for job in snapshot.jobs}
            news = [job for job_id, job in self._told.items() if before.get(job_id) is not job]
            question = (what, list(self._told), news, replace(snapshot, jobs=()), now)
            _send(process.stdin, question)
            if not select.select([process.stdout], [], [], _PATIENCE_S)[0]:
                raise TimeoutError(f"no answer for {_PATIENCE_S:.0f} s")
            told: tuple[str | None, Any] = pickle.load(process.stdout)
        except BaseException:
            self.close()  # the pipes may hold half of something
            raise
        return told


def main() -> None:
    """Answer until there are no more questions: what went wrong or None, and the answer."""
    views: dict[str, JobView] = {}
    told: tuple[str | None, Any]
    while True:
        try:
            what, ids, news, rest, now = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        views.update((job.id, job) for job in news)
        views = {job_id: views[job_id] for job_id in ids}
        try:
            told = None, _answer(what, replace(rest, jobs=list(views.values())), now)
        except Exception:  # noqa: BLE001 - the parent tells it
            told = traceback.format_exc(), None
        _send(sys.stdout.buffer, told)


def _answer(what: str, snapshot: Snapshot, now: float) -> Any:
    if what == "expected_starts":
        return policy.expected_starts(snapshot, now)
    plan = policy.decide(snapshot, now)
    assert isinstance(plan.waits, Waits)
    return replace(plan, waits={}), plan.waits.columns()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _send(pipe: IO[bytes], told: object) -> None:
    pipe.write(pickle.dumps(told, protocol=pickle.HIGHEST_PROTOCOL))
    pipe.flush()


if __name__ == "__main__":
    main()
