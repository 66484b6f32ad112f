"""What the queue asks of Ray: drivers as Ray jobs, and the scheduler's actor; no Ray is started."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from queue_parts import Queue
from ray.job_submission import JobStatus, JobSubmissionClient

from s2ft_ray.errors import ConfigError, JobError
from s2ft_ray.scheduler import actor, launcher
from s2ft_ray.scheduler.launcher import RayJobs
from s2ft_ray.scheduler.lease import Lease
from s2ft_ray.scheduler.store import Store

DASHBOARD = "http://head:8265"
WORKER, HEAD_BEFORE, HEAD_NOW = (digit * 56 for digit in "123")  # Ray's ids are 28 bytes in hex


class FakeJobs:
    """Ray's Jobs API: it knows no job until it was submitted."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.submitted: list[dict[str, Any]] = []
        self.status = JobStatus.PENDING

    def submit_job(self, **request: Any) -> str:
        self.submitted.append(request)
        return str(request["submission_id"])

    def get_job_status(self, submission_id: str) -> JobStatus:
        if submission_id not in [it["submission_id"] for it in self.submitted]:
            raise RuntimeError(
                f"Request failed with status code 404: {submission_id} does not exist"
            )
        return self.status


@pytest.fixture(autouse=True)
def jobs_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", FakeJobs)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    monkeypatch.delenv("S2FT_DATABASE_URL", raising=False)
    return tmp_path


# Drivers as Ray jobs


def test_an_attempt_launched_twice_is_one_ray_job(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job_id = queue.submit()
    queue.tick()
    job, jobs = queue.store.job(job_id), RayJobs(DASHBOARD)
    jobs.launch(job)
    jobs.launch(job)
    jobs._client.status = JobStatus.FAILED  # one that ended isn't started again either
    jobs.launch(job)
    (request,) = jobs._client.submitted
    assert request["submission_id"] == f"{job_id}-1"
    assert request["entrypoint"].endswith(f"s2ft_ray.finetune --job {job_id} --attempt 1")


def test_a_driver_takes_nothing_from_the_workers_and_uploads_nothing(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job_id = queue.submit()
    queue.tick()
    jobs = RayJobs(DASHBOARD)
    jobs.launch(queue.store.job(job_id))
    (request,) = jobs._client.submitted
    for amount in ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_resources"):
        assert not request.get(amount)
    assert request["runtime_env"].keys().isdisjoint({"working_dir", "py_modules"})
    # Ray's own 3 s are too few for a step and a checkpoint
    assert request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"


def test_a_dashboard_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", JobSubmissionClient)
    monkeypatch.setattr(launcher, "_HTTP_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(requests.Timeout):
        RayJobs(f"http://127.0.0.1:{silent.getsockname()[1]}")


# The lease


def holder(store: Store, name: str, cluster: str = "c1", duration_s: float = 0.6) -> Any:
    scheduler = object.__new__(actor.SchedulerActor)
    scheduler._lease = Lease(store.engine, name, cluster, duration_s)
    return scheduler


@pytest.mark.usefixtures("home")
def test_a_long_tick_loses_no_lease_and_a_lost_lease_ends_the_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, ended = Store(), threading.Event()

    def end(_code: int) -> None:
        ended.set()
        threading.Event().wait()  # a process would be gone

    monkeypatch.setattr(actor.os, "_exit", end)
    first = holder(store, "first")
    first._wait_for_lease()
    threading.Thread(target=first._keep_lease, daemon=True).start()
    time.sleep(1.5)  # no tick ends meanwhile
    second = holder(store, "second")._lease
    with pytest.raises(JobError, match="first"):
        second.acquire(time.time())
    assert not ended.is_set()
    second.acquire(time.time(), watched_expiry=second.expiry())
    assert ended.wait(timeout=10)


@pytest.mark.usefixtures("home")
def test_another_clusters_lease_is_watched_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store()
    holder(store, "there", "c2")._lease.acquire(now=1.0)  # ended long ago, by our clock
    monkeypatch.setattr(actor, "_LEASE_PATIENCE_S", 0.5)
    here = holder(store, "here")
    with pytest.raises(JobError, match="there, of cluster c2"):
        here._lease.acquire(time.time())
    began = time.monotonic()
    here._wait_for_lease()
    assert time.monotonic() - began > 0.5


# The scheduler stays with its file


class FakeActorClass:
    def __init__(self, kind: type) -> None:
        self.kind = kind

    def options(self, **options: Any) -> "FakeActorClass":
        self.asked = options
        return self

    def remote(self, *arguments: Any) -> "FakeActorClass":
        self.arguments = arguments
        return self


def test_the_scheduler_is_bound_to_the_head_and_outlives_who_started_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"CPU": 2.0, "node:__internal_head__": 1.0}
    nodes = [
        {"NodeID": WORKER, "Alive": True, "Resources": {"CPU": 8.0}},
        {"NodeID": HEAD_BEFORE, "Alive": False, "Resources": head},
        {"NodeID": HEAD_NOW, "Alive": True, "Resources": head},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", FakeActorClass)
    started = actor.start_scheduler(DASHBOARD)
    assert (started.kind, started.arguments) == (actor.SchedulerActor, (DASHBOARD,))
    affinity = started.asked["scheduling_strategy"]
    assert (affinity.node_id, affinity.soft) == (HEAD_NOW, False)
    assert started.asked["num_cpus"] == 0
    assert started.asked["max_restarts"] == -1
    assert started.asked["lifetime"] == "detached"
    assert started.asked["get_if_exists"] is True
    assert started.asked["runtime_env"]["env_vars"]["S2FT_HOME"] == str(home)
    assert started.asked["runtime_env"].keys() == {"env_vars"}  # the installed package's code


@pytest.mark.usefixtures("home")
def test_a_file_with_another_clusters_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor.socket, "gethostname", lambda: "old-head")
    store = Store()
    Lease(store.engine, "a scheduler", actor._cluster_name()).acquire(now=1.0)  # ended long ago
    store.close()
    _, engine = actor._build_scheduler(DASHBOARD)  # started again where it was
    engine.dispose()
    monkeypatch.setattr(actor.socket, "gethostname", lambda: "new-head")
    with pytest.raises(ConfigError, match=r"old-head, .*new-head; SQLite is for one machine"):
        actor._build_scheduler(DASHBOARD)
