"""What the service answers in on a real SQLite file while it ticks, at growing numbers of jobs."""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from s2ft_ray.accounts import Accounts
from s2ft_ray.scheduler.actor import keep_ticking
from s2ft_ray.scheduler.cluster import Amounts
from s2ft_ray.scheduler.launcher import DriverState
from s2ft_ray.scheduler.models import Job
from s2ft_ray.scheduler.policy_process import PolicyProcess
from s2ft_ray.scheduler.service import Scheduler
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import NodeView

TENANTS = 200
CALLS = 200
"""Of each kind; of a queue of fewer jobs, as many as it has."""
_PAUSE_S = 0.05
"""Between calls: twenty a second, each of which may set off a tick."""


class _Nodes:
    """A cluster for as many workers as are to run."""

    def __init__(self, num_workers: int) -> None:
        self._views = [NodeView(f"node{n}", {"CPU": 8.0}) for n in range(num_workers // 8 + 1)]

    def nodes(self, held: Amounts) -> list[NodeView]:  # noqa: ARG002
        return self._views


class _NoDrivers:
    """Nothing is launched: the drivers are this process's calls."""

    def launch(self, job: Job) -> None:
        pass

    def state(self, submission_id: str) -> DriverState:  # noqa: ARG002
        return "alive"

    def stop(self, submission_id: str) -> None:
        pass


def measure_service(num_queued: int) -> dict[str, float]:
    """Return times in ms with so many jobs queued and a tenth as many running."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'queue.db'}"
        store, accounts = Store(url), Accounts(url)
        policy, nodes = PolicyProcess(), _Nodes(num_queued // 4)
        scheduler = Scheduler(store, accounts, nodes, _NoDrivers(), policy=policy)
        for number in range(num_queued + num_queued // 10):
            scheduler.submit(_document(number))
        scheduler.tick()
        running = [job["id"] for job in scheduler.jobs(states=["starting"], limit=CALLS)]
        ticks = _times(scheduler.tick, calls=5)
        numbers, ids = iter(range(10**6, 10**7)), iter(running * CALLS)
        calls = min(CALLS, num_queued)
        with _ticking(scheduler):
            submits = _times(
                lambda: scheduler.submit(_document(next(numbers))), calls, pause_s=_PAUSE_S
            )
            pages = _times(lambda: scheduler.jobs(limit=100), calls, pause_s=_PAUSE_S)
            beats = _times(lambda: scheduler.heartbeat(next(ids), 1), calls, pause_s=_PAUSE_S)
        policy.close()
        store.close()
        accounts.close()
    return {
        "queued": num_queued,
        "submit_p50_ms": float(np.percentile(submits, 50)),
        "submit_p99_ms": float(np.percentile(submits, 99)),
        "page_p50_ms": float(np.percentile(pages, 50)),
        "page_p99_ms": float(np.percentile(pages, 99)),
        "heartbeat_p99_ms": float(np.percentile(beats, 99)),
        "tick_ms": min(ticks),
    }


@contextmanager
def _ticking(scheduler: Scheduler) -> Iterator[None]:
    """Give a context in which the scheduler ticks in a thread, as its actor lets it."""
    ended, before = threading.Event(), sys.getswitchinterval()
    thread = threading.Thread(target=keep_ticking, args=(scheduler, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        scheduler.wake.set()
        thread.join()
        sys.setswitchinterval(before)


def _times(call: Callable[[], Any], calls: int, pause_s: float = 0.0) -> list[float]:
    times = []
    for _ in range(calls):
        time.sleep(pause_s)
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _document(number: int) -> dict[str, Any]:
    return {
        "tenant": f"tenant{number % TENANTS}",
        "name": f"bot{number}",
        "data": {"train": "rows.jsonl"},
        "optim": {"max_steps": 100 + number % 400},
        "parallel": {"num_workers": 1 + number % 4},
    }
