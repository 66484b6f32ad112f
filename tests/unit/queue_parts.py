"""A scheduler on a real store, with a clock that is set and drivers that only pretend."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from s2ft_ray.accounts import Accounts
from s2ft_ray.scheduler import policy
from s2ft_ray.scheduler.cluster import Amounts
from s2ft_ray.scheduler.launcher import DriverState
from s2ft_ray.scheduler.models import Job
from s2ft_ray.scheduler.policy_process import Policy
from s2ft_ray.scheduler.service import Scheduler
from s2ft_ray.scheduler.settings import QueueSettings, ServiceSettings
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import NodeView


@functools.cache
def _empty_database() -> Path:
    """A database with its tables, made once: each test gets a copy."""
    path = Path(tempfile.mkdtemp(prefix="s2ft-queue-")) / "empty.db"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    Store(f"sqlite:///{path}").close()
    return path


class Clock:
    """The wall's, which can be put back, and a steady one beside it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self._put_s = 0.0

    def __call__(self) -> float:
        return self.now

    def put(self, seconds: float) -> None:
        """Put the wall's clock forward, or back."""
        self.now += seconds
        self._put_s += seconds

    def steady(self) -> float:
        return self.now - self._put_s


class FakeCluster:
    def __init__(self, slots: int) -> None:
        self.views = [NodeView("n0", {"CPU": float(slots)})]
        self.held: Amounts = {}

    def nodes(self, held: Amounts) -> list[NodeView]:
        self.held = held
        return self.views


class FakeLauncher:
    """Drivers by submission id: alive until a test ends them."""

    def __init__(self) -> None:
        self.drivers: dict[str, DriverState] = {}
        self.launches: list[str] = []
        self.stops: list[str] = []
        self.is_away = False

    def launch(self, job: Job) -> None:
        assert job.submission_id is not None
        self._answer()
        if job.submission_id not in self.drivers:
            self.launches.append(job.submission_id)
            self.drivers[job.submission_id] = "alive"

    def state(self, submission_id: str) -> DriverState:
        self._answer()
        return self.drivers.get(submission_id, "unknown")

    def stop(self, submission_id: str) -> None:
        self._answer()
        self.stops.append(submission_id)
        self.drivers[submission_id] = "ended"

    def _answer(self) -> None:
        if self.is_away:
            raise ConnectionError("no dashboard")


class Queue:
    """A scheduler and all around it; `restart` is what a crash of its process leaves."""

    def __init__(
        self, folder: Path, slots: int = 4, policy: Policy = policy, **settings: Any
    ) -> None:
        shutil.copy(_empty_database(), folder / "queue.db")
        self.url = f"sqlite:///{folder / 'queue.db'}"
        self.clock, self.cluster, self.launcher = Clock(), FakeCluster(slots), FakeLauncher()
        self.settings = QueueSettings(ServiceSettings(**settings))
        self.accounts, self.policy = Accounts(self.url), policy
        self.restart()

    def restart(self) -> None:
        self.store = Store(self.url)
        self.scheduler = Scheduler(
            self.store,
            self.accounts,
            self.cluster,
            self.launcher,
            self.clock,
            self.settings,
            self.clock.steady,
            self.policy,
        )

    def tick(self, after_s: float = 1.0) -> None:
        self.clock.now += after_s
        self.scheduler.tick()

    def submit(self, name: str = "bot", tenant: str = "acme", **options: Any) -> str:
        self.clock.now += 0.01  # age orders them
        answer = self.scheduler.submit(document(name, tenant, options.pop("workers", 1)), **options)
        return str(answer["id"])

    def state(self, job_id: str) -> str:
        return str(self.scheduler.job(job_id)["state"])

    def begin(self, job_id: str, step: int = 1) -> int:
        """Claim a launched job as its driver does, and tell its first step; its attempt."""
        job = self.store.job(job_id)
        claimed = self.scheduler.claim(job_id, job.submission_id or "driver")
        assert claimed is not None
        self.beat(job_id, claimed["attempt"], step)
        return int(claimed["attempt"])

    def beat(self, job_id: str, attempt: int, step: int = 1) -> str:
        progress = {"step": step, "total_steps": 100, "loss": 1.0, "time_left_s": 900.0}
        return self.scheduler.heartbeat(job_id, attempt, progress)

    def causes(self, job_id: str) -> list[str]:
        return [event["cause"] for event in self.scheduler.job(job_id)["events"]]


def document(name: str = "bot", tenant: str = "acme", workers: Any = 1) -> dict[str, Any]:
    return {
        "tenant": tenant,
        "name": name,
        "data": {"train": "rows.jsonl"},
        "optim": {"max_steps": 100, "global_batch_size": 16, "micro_batch_size": 4},
        "parallel": {"num_workers": workers},
    }
