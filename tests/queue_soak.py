"""Short jobs on a real node while things are killed: nothing is lost, nothing is run twice.

    python tests/queue_soak.py --rounds 200 --seed 0         on a node of its own
    python tests/queue_soak.py --home H --faults driver      on the node that is up in H

A round submits jobs of one and the same run under fresh names and does each fault once at a random
moment. Each job must end exactly once, succeeded, as version 1 of its name, with the adapter of a
run that nothing happened to, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent / "integration"))
from nodes import Node

FAULTS = ("scheduler", "driver", "worker", "database", "mlflow", "head")
LATEST_S = 25.0
"""A fault comes so long after the submissions at most, or when there is somebody to kill."""
ROUND_S = 420.0


class Soak:
    """A node, the run that is submitted over and over, and the adapter that it gives."""

    def __init__(self, node: Node, folder: Path, rng: random.Random) -> None:
        from s2ft_ray.scheduler.client import QueueClient

        self.node, self.rng = node, rng
        rows = folder / "rows.jsonl"
        pairs = [(f"Number {i} is", " odd" if i % 2 else " even") for i in range(64)]
        lines = [json.dumps({"prompt": prompt, "completion": end}) for prompt, end in pairs]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.document = {
            "tenant": "soak",
            "data": {"train": str(rows)},
            "optim": {"max_steps": 30, "global_batch_size": 8, "micro_batch_size": 4},
            "evaluation": {"every_steps": 30, "num_samples": 0},
            "checkpoint": {"every_steps": 10},
        }
        client = QueueClient.find()
        assert client is not None, "no scheduler on this node"
        self.queue = client
        self.expected: str | None = None

    def round(self, number: int, num_jobs: int, faults: list[str]) -> list[str]:
        """Submit, disturb, wait; return what is wrong."""
        names = [f"r{number}-{i}-{self.rng.getrandbits(32):08x}" for i in range(num_jobs)]
        ids = [self.queue.submit({**self.document, "name": name})["id"] for name in names]
        started = time.monotonic()
        timers = []
        for fault in faults:
            timers.append(threading.Timer(self.rng.uniform(1.0, LATEST_S), self._do, (fault, ids)))
            timers[-1].start()
        while time.monotonic() - started < ROUND_S:
            jobs = [self.queue.job(job_id) for job_id in ids]
            if all(job["finished_at"] for job in jobs):
                break
            time.sleep(1.0)
        for timer in timers:
            timer.join()
        wrong = [fault for job in jobs for fault in self._check(job)]
        attempts = ", ".join(str(job["attempt"]) for job in jobs)
        took_s = time.monotonic() - started
        print(
            f"round {number}: {took_s:.0f} s, attempts {attempts}, {wrong or 'right'}", flush=True
        )
        return wrong

    def _check(self, job: dict[str, Any]) -> list[str]:
        from s2ft_ray.method import Adapter

        told = f"{job['id']} {job['name']}"
        if job["state"] != "succeeded":
            causes = [event["cause"] for event in job["events"]]
            return [f"{told}: {job['state']}, {job['error'] or job['reason']}: {causes}"]
        wrong = []
        ends = [it for it in job["events"] if it["state"] in ("succeeded", "failed", "cancelled")]
        if len(ends) != 1:
            wrong.append(f"{told}: ended {len(ends)} times")
        if job["model"]["version"] != "1":
            wrong.append(f"{told}: registered as version {job['model']['version']}")
        folder = self.node.home / "runs" / job["tenant"] / job["name"] / job["id"]
        fingerprint = Adapter.load(folder / "adapter").fingerprint
        self.expected = self.expected or fingerprint
        if fingerprint != self.expected:
            wrong.append(f"{told}: adapter {fingerprint[:12]}, not {self.expected[:12]}")
        return wrong

    def _do(self, fault: str, ids: list[str]) -> None:
        faults: dict[str, Callable[[list[str]], str]] = {
            "scheduler": self._kill_scheduler,
            "driver": self._kill_driver,
            "worker": self._kill_worker,
            "database": self._lock_database,
            "mlflow": self._freeze_mlflow,
            "head": self._restart_head,
        }
        print(f"  {time.strftime('%X')} {fault}: {faults[fault](ids)}", flush=True)

    def _kill_scheduler(self, _: list[str]) -> str:
        pid = int((self.node.home / "scheduler.alive").read_text())
        os.kill(pid, signal.SIGKILL)
        return f"killed {pid}"

    def _kill_driver(self, ids: list[str]) -> str:
        # Not its shell, which is Ray's: without that the driver lives on.
        return self._kill_one(
            lambda line: (
                "python -m s2ft_ray.finetune" in line
                and not line.startswith(("/bin/sh", "sh ", "bash", "/bin/bash"))
                and any(job_id in line for job_id in ids)
            )
        )

    def _kill_worker(self, _: list[str]) -> str:
        return self._kill_one(lambda line: "RayTrainWorker" in line)

    def _kill_one(self, wanted: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + ROUND_S / 4
        while time.monotonic() < deadline:
            if found := [it for it in self._family() if wanted(" ".join(_cmdline(it)))]:
                victim = self.rng.choice(found)
                victim.kill()
                return f"killed {victim.pid}"
            time.sleep(0.5)
        return "none was there"

    def _family(self) -> list[psutil.Process]:
        pids = [it["pid"] for it in self.node.status()["services"] if it["name"] == "ray"]
        return [it for pid in pids if pid for it in psutil.Process(pid).children(recursive=True)]

    def _lock_database(self, _: list[str]) -> str:
        seconds = self.rng.uniform(5.0, 35.0)
        connection = sqlite3.connect(self.node.home / "scheduler.db", timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        connection.rollback()
        connection.close()
        return f"locked for {seconds:.0f} s"

    def _freeze_mlflow(self, _: list[str]) -> str:
        (pid,) = (it["pid"] for it in self.node.status()["services"] if it["name"] == "mlflow")
        members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in members:
            process.suspend()
        time.sleep(15)
        for process in members:
            process.resume()
        return "stopped for 15 s"

    def _restart_head(self, _: list[str]) -> str:
        (pid,) = (it["pid"] for it in self.node.status()["services"] if it["name"] == "ray")
        os.kill(pid, signal.SIGKILL)
        done = self.node.s2ft("up")
        return f"killed {pid}; s2ft up: {done.returncode} {done.stderr[-300:]}"


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def main() -> int:
    """Soak; the exit code is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=3, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS[:-1]))
    parser.add_argument("--home", type=Path, help="of a node that is up; default: one of its own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        node = Node(args.home or Path(folder) / "home")
        try:
            if args.home is None:
                started = node.s2ft("up", "--num-cpus", "4")
                assert started.returncode == 0, started.stderr
            return _soak(node, Path(folder), args)
        finally:
            if args.home is None:
                node.s2ft("down")


def _soak(node: Node, folder: Path, args: argparse.Namespace) -> int:
    os.environ.update(node.env)  # Ray reads it when it is imported
    import ray

    ray.init(namespace="s2ft", logging_level="WARNING", log_to_driver=False)
    soak = Soak(node, folder, random.Random(args.seed))
    wrong = []
    if args.rounds > 1:  # else the jobs of the one round are held against each other
        wrong += soak.round(0, 1, [])  # what an undisturbed run gives
    for number in range(1, args.rounds + 1):
        wrong += soak.round(number, args.jobs, args.faults)
    ray.shutdown()
    print("\n".join(wrong) if wrong else f"{args.rounds} rounds, all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
