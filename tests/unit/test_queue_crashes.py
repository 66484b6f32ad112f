"""The scheduler's process dies at every write and every launch, before and after it: jobs don't."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from queue_parts import Queue, document

from s2ft_ray.errors import StaleAttempt

WRITES = ("submit", "admit", "claim", "beat", "ask_stop", "stopped", "succeed", "fail", "cancel")
# S2FT_LONG=1 looks at every point; there are about 25.
EVERY = 1 if os.environ.get("S2FT_LONG") else 6


class Crash(BaseException):
    """The end of the process: nothing in it catches this."""


class Crasher:
    """Lets calls through until the one at which the process is to die."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    def arm(self, queue: Queue) -> None:
        for name in WRITES:
            setattr(queue.store, name, self._wrap(getattr(queue.store, name)))
        if not hasattr(queue.launcher, "is_armed"):
            queue.launcher.launch = self._wrap(queue.launcher.launch)  # type: ignore[method-assign]
            queue.launcher.is_armed = True  # type: ignore[attr-defined]

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def crashing(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                raise Crash
            result = call(*args, **kwargs)
            if self.calls == self.at:
                raise Crash
            return result

        return crashing


class Drivers:
    """Drivers that outlive the scheduler: they claim, train three steps, tell the end."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.attempts: dict[str, int] = {}
        self.steps: dict[str, int] = {}

    def act(self) -> None:
        for driver, state in list(self.queue.launcher.drivers.items()):
            if state == "alive":
                try:
                    if self._act(driver):
                        self.queue.launcher.drivers[driver] = "ended"
                except StaleAttempt:
                    self.queue.launcher.drivers[driver] = "ended"

    def _act(self, driver: str) -> bool:
        job_id, scheduler = driver.rsplit("-", 1)[0], self.queue.scheduler
        if driver not in self.attempts:
            claim = scheduler.claim(job_id, driver)
            if claim is not None:
                self.attempts[driver] = claim["attempt"]
            return claim is None
        attempt, step = self.attempts[driver], self.steps.get(driver, 0) + 1
        if self.queue.beat(job_id, attempt, step) == "stop":
            scheduler.report(job_id, attempt, {"outcome": "preempted"})
            return True
        self.steps[driver] = step
        if step >= 3:
            outcome = {"outcome": "succeeded", "model": ["acme.bot", "1"]}
            scheduler.report(job_id, attempt, outcome)
        return step >= 3


def live(folder: Path, at: int, after: bool) -> tuple[Queue, int]:
    """Run three jobs to their ends, one of which stops the others; return the calls there were."""
    queue, crasher = Queue(folder), Crasher(at, after)
    crasher.arm(queue)
    drivers = Drivers(queue)
    pending = [("low", 0, 2), ("wide", 0, 3), ("high", 5, 4)]
    ids: list[str] = []

    def step(tick: int) -> None:
        if tick >= 2 * len(ids) and len(ids) < len(pending):
            name, priority, workers = pending[len(ids)]
            run = {**document(name, workers=workers), "priority": priority}
            ids.append(queue.scheduler.submit(run)["id"])
        queue.tick(2.0)
        drivers.act()

    for tick in range(80):
        try:
            step(tick)
        except Crash:
            queue.restart()
            crasher.arm(queue)
        held = sum(job.num_workers for job in queue.store.live_jobs())
        assert held <= 4, "over the cluster"
        if len(ids) == 3 and not queue.store.live_jobs():
            break
    for job_id in ids:
        assert queue.causes(job_id).count("registered") == 1
        assert queue.state(job_id) == "succeeded"
    launched = queue.launcher.launches
    assert len(launched) == len(set(launched))
    assert len({queue.store.job(job_id).name for job_id in ids}) == 3
    return queue, crasher.calls


def test_a_crash_at_any_point_loses_nothing_and_does_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    _, num_calls = live(tmp_path_factory.mktemp("whole"), at=0, after=False)
    assert num_calls > 20
    for at in range(1, num_calls + 1, EVERY):
        for after in (False, True):
            live(tmp_path_factory.mktemp("crash"), at, after)
