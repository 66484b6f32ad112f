"""A driver whose job is queued: it waits for its turn, or follows what others drive.

Invariant: nothing here imports torch, so that a driver that waits costs what a connection to Ray
costs. A driver that is told to end while it waits takes its job out of the queue; one that is
killed leaves it there, and the scheduler starts it without it.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from s2ft_ray.config import RunConfig
from s2ft_ray.finetune.attempt import Claim
from s2ft_ray.scheduler.client import QueueClient
from s2ft_ray.scheduler.models import FailureReason

POLL_S = 1.0
_CHECK_AFTER_S = 3.0
"""A job that waits for longer has its inputs checked meanwhile; others check them at once."""
_TELL_EVERY_S = 60.0
_PROGRESS_EVERY_S = 10.0
_TO_MEND = {FailureReason.BAD_INPUT, FailureReason.STORAGE}
"""Failures for which a command ends with 2 (see ``errors``)."""
_INTERRUPTED = 130


def driver_id() -> str:
    """Return who this driver is: the submission id of its Ray job, else a fresh name."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    known: str | None = metadata.get("job_submission_id")
    return known or f"driver-{secrets.token_hex(6)}"


def wait(queue: QueueClient, job: dict[str, Any], driver: str, config: RunConfig) -> Claim | int:
    """Wait for the job's turn and claim it; or return the exit code where it isn't for us.

    Ctrl-C and SIGTERM take the job out of the queue.
    """
    new = "queued" if job["is_new"] else "queued before, not again"
    print(f"job         {job['id']}, {new}", flush=True)
    if not job["may_wait"] and job["state"] == "queued":
        print(f"too many drivers wait: the job starts by itself; s2ft job {job['id']} tells of it")
        return 0
    teller, check = _Teller(), None
    started = time.monotonic()
    with _interruptible(), tempfile.TemporaryDirectory() as folder:
        try:
            while True:
                if job["state"] == "starting" and job["submission_id"] in (None, driver):
                    answer = queue.claim(job["id"], driver)
                    if answer is not None:
                        return Claim.of(job["id"], answer)
                elif job["state"] != "queued":
                    break
                teller.tell(job)
                if check is None and time.monotonic() - started > _CHECK_AFTER_S:
                    check = _start_check(config, Path(folder))
                if check is not None and check.poll() == 2:
                    return _refuse(queue, job, check)
                time.sleep(POLL_S)
                job = queue.poll(job["id"], driver)
        except KeyboardInterrupt:
            print(f"told to end: job {job['id']} leaves the queue", flush=True)
            queue.cancel(job["id"])
            return _INTERRUPTED
        finally:
            if check is not None and check.poll() is None:
                check.kill()
    return follow(queue, job["id"])


def follow(queue: QueueClient, job_id: str) -> int:
    """Tell what becomes of a job that others drive; return the exit code for its end."""
    teller = _Teller()
    while True:
        job = queue.job(job_id)
        teller.tell(job)
        if job["finished_at"] is not None:
            return _exit_code(job)
        time.sleep(2 * POLL_S)


def _exit_code(job: dict[str, Any]) -> int:
    if job["state"] == "succeeded":
        return 0
    return 2 if job["state"] == "failed" and job["reason"] in _TO_MEND else 1


def become_follower(job_id: str) -> NoReturn:
    """Follow the job in this process, without what it has loaded: torch, the data, the base."""
    import ray

    sys.stdout.flush()
    ray.shutdown()
    os.execv(sys.executable, [sys.executable, "-m", "s2ft_ray.finetune", "--follow", job_id])


class _Teller:
    """Prints how a job stands when that has changed, and now and then.

    A place further back is told now and then only: tenants at the same level take turns there.
    """

    def __init__(self) -> None:
        self._told: Any = None
        self._place = 0
        self._at = 0.0

    def tell(self, job: dict[str, Any]) -> None:
        """Print a line where there is something to tell."""
        state = (job["state"], job["reason"])
        place = job["position"] or 0
        since_s = time.monotonic() - self._at
        waits = job["state"] == "queued"
        moved_up = 0 < place < self._place or self._place == 0 < place
        if (
            state == self._told
            and not moved_up
            and since_s < (_TELL_EVERY_S if waits else _PROGRESS_EVERY_S)
        ):
            return
        if state == self._told and not waits and job["progress"] is None:
            return
        print(f"{job['state']:<11} {describe(job)}".rstrip(), flush=True)
        self._told, self._place, self._at = state, place, time.monotonic()


def describe(job: dict[str, Any]) -> str:
    """Say in one line why a job is where it is, or how far it is."""
    if job["state"] == "queued":
        return _describe_wait(job)
    progress = job["progress"]
    if job["state"] in ("running", "preempting") and progress:
        loss = "" if progress["loss"] is None else f"  loss {progress['loss']:.4f}"
        left = "" if progress["time_left_s"] is None else f"  {_span(progress['time_left_s'])} left"
        return f"step {progress['step']}/{progress['total_steps']}{loss}{left}"
    if job["state"] == "succeeded":
        return f"registered {job['model']['name']} version {job['model']['version']}"
    return str(job["error"] or job["reason"] or "")


def _describe_wait(job: dict[str, Any]) -> str:
    parts = []
    if job["position"] is not None:
        behind = f", behind {job['blocker']}" if job["blocker"] else ""
        parts.append(f"place {job['position']}{behind}")
    if job["reason"]:
        parts.append(job["reason"])
    if job["estimated_start"]:
        start = datetime.fromisoformat(job["estimated_start"])
        in_s = (start - datetime.now(UTC)).total_seconds()
        parts.append(f"starts in about {_span(in_s)}" if in_s > 1 else "starts any moment")
    return "; ".join(parts)


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _start_check(config: RunConfig, folder: Path) -> "subprocess.Popen[str]":
    """Check base and data in a process of its own, while the job waits: bad input is told early."""
    path = folder / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "s2ft_ray.finetune", "--config", str(path), "--dry-run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _refuse(queue: QueueClient, job: dict[str, Any], check: "subprocess.Popen[str]") -> int:
    assert check.stderr is not None
    lines = [line for line in check.stderr.read().splitlines() if line.startswith("error: ")]
    print("\n".join(lines), file=sys.stderr, flush=True)
    queue.cancel(job["id"])
    return 2


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM, which `ray job stop` sends, the same as Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
