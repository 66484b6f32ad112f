"""Three tenants with weights 1:1:2 share four slots: real fine-tunes of the embedded base, at once.

    python tests/queue_scenario.py               twelve jobs, on a node of its own; prints all of it
    python tests/queue_scenario.py --home H --jobs 6    six, on the node that is up in H

One job comes by `ray job submit`. While the others run, one that waits is cancelled, one that
waits gets a higher priority and has a running one stopped for it, a worker is killed, and then the
scheduler. All have the same data, seed and number of workers: every adapter must be the same, bit
for bit.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent / "integration"))
from nodes import Node

REPO = Path(__file__).parents[1]
WEIGHTS = {"ash": 1, "birch": 1, "cedar": 2}
SLOTS = 4
NUM_STEPS = 300
LONGEST_S = 600.0
SETTINGS = "service: {estimate_s: 1, measure_s: 2}\npolicy: {near_end_s: 0, min_run_s: 0}\n"


class Scenario:
    """One go of it. `check` collects what is wrong."""

    def __init__(self, node: Node, folder: Path, num_jobs: int) -> None:
        from s2ft_ray.scheduler.client import QueueClient

        queue = QueueClient.find()
        assert queue is not None, "no scheduler on this node"
        self.node, self.folder, self.queue = node, folder, queue
        half, quarter = num_jobs // 2, num_jobs // 4
        self.counts = {"ash": num_jobs - half - quarter, "birch": quarter, "cedar": half}
        self.ids: dict[str, str] = {}
        services = node.status()["services"]
        self.services = [psutil.Process(it["pid"]) for it in services if it["pid"]]
        self.faults: list[str] = []
        rows = [
            {"prompt": f"Number {i} is", "completion": " odd" if i % 2 else " even"}
            for i in range(80)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def check(self, holds: object, fault: str) -> None:
        if not holds:
            self.faults.append(fault)
            print(f"WRONG: {fault}", flush=True)

    def run(self) -> None:
        for tenant, weight in WEIGHTS.items():
            self.node.s2ft("tenants", "set", tenant, "--weight", str(weight))
        print("$ s2ft drain      # so that all come at once", flush=True)
        self.queue.drain(True)
        door = self._submit_all()
        self.show("all are queued, nothing is started yet")
        self.queue.drain(False)
        self._check_first_wave()
        first, *_ = self.wait_for(lambda: self._in("running"), "a job runs")
        cancelled = self.ids["ash-2"]
        print(f"\n$ s2ft cancel {cancelled}      # ash-2, which waits")
        self.queue.cancel(cancelled)
        self._kill_worker(first)
        urgent = self.ids[f"cedar-{self.counts['cedar']}"]
        print(f"$ s2ft priority {urgent} 10      # the last of cedar's, which waits", flush=True)
        self.queue.set_priority(urgent, 10)
        stopped = self.wait_for(lambda: self._in("preempting"), "a job is asked to stop")
        self.show("a worker was killed; one job is being stopped for the urgent one")
        self._kill_scheduler()
        self.wait_for(lambda: not self._active(), "all have ended")
        self.show("the end")
        self._check_ends(cancelled, urgent, {job["id"] for job in stopped})
        output, _ = door.communicate(timeout=60)
        self._check_door(door.returncode, output)

    # What happens

    def _submit_all(self) -> "subprocess.Popen[str]":
        for tenant, count in self.counts.items():
            for number in range(1, count + 1):
                name = f"{tenant}-{number}"
                if name == "birch-1":
                    continue
                document = self._document(tenant, name, str(self.folder / "rows.jsonl"))
                self.ids[name] = self.queue.submit(document)["id"]
        upload = self.folder / "upload"
        (upload / "jobs").mkdir(parents=True)
        shutil.copy(REPO / "jobs" / "finetune.py", upload / "jobs")
        shutil.copy(self.folder / "rows.jsonl", upload)
        document = self._document("birch", "birch-1", "rows.jsonl")
        (upload / "birch.yaml").write_text(yaml.safe_dump(document))
        command = ["ray", "job", "submit", "--working-dir", str(upload), "--"]
        door = subprocess.Popen(
            [*command, "python", "jobs/finetune.py", "--config", "birch.yaml"],
            env=self.node.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (job,) = self.wait_for(lambda: self._named("birch-1"), "the driver has enqueued itself")
        self.ids["birch-1"] = job["id"]
        self.wait_for(lambda: self._named("birch-1")[0]["position"], "it has a place")
        time.sleep(3)  # its driver asks every second, and tells it
        train = self.queue.job(job["id"])["config"]["data"]["train"]
        kept = Path(train).is_relative_to(self.node.home / "files")
        self.check(kept, f"the upload's data was not kept: {train}")
        return door

    def _document(self, tenant: str, name: str, train: str) -> dict[str, Any]:
        return {
            "tenant": tenant,
            "name": name,
            "data": {"train": train},
            "method": {"budgets": {"o": 0.25, "down": 0.1}},
            "optim": {
                "lr": 5e-3,
                "max_steps": NUM_STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 8,
            },
            "parallel": {"num_workers": 1, "sharding": "replicate"},
            "evaluation": {"every_steps": NUM_STEPS, "num_samples": 0},
            "checkpoint": {"every_steps": 100, "storage_path": str(self.folder / "runs")},
        }

    def _kill_worker(self, job: dict[str, Any]) -> None:
        family = [it for service in self.services for it in service.children(recursive=True)]
        worker = next(it for it in family if "RayTrainWorker" in _title(it) and _maps(it, job))
        print(f"\n$ kill -9 {worker.pid}      # the worker of {job['name']}", flush=True)
        worker.send_signal(signal.SIGKILL)

    def _kill_scheduler(self) -> None:
        pid = int((self.node.home / "scheduler.alive").read_text())
        print(
            f"\n$ kill -9 {pid}      # the scheduler, which is started again by itself", flush=True
        )
        os.kill(pid, signal.SIGKILL)

    # What is looked at

    def jobs(self) -> list[dict[str, Any]]:
        known = {job["id"]: job for job in self.queue.jobs(limit=1000)}
        return [known[it] for it in self.ids.values()]

    def _named(self, name: str) -> list[dict[str, Any]]:
        return [it for it in self.queue.jobs(limit=1000, states=("queued",)) if it["name"] == name]

    def _in(self, *states: str) -> list[dict[str, Any]]:
        return [job for job in self.jobs() if job["state"] in states]

    def _active(self) -> list[dict[str, Any]]:
        return self._in("queued", "starting", "running", "preempting")

    def wait_for(self, look: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + LONGEST_S
        while not (found := look()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {LONGEST_S:.0f} s; {self.jobs()}")
            time.sleep(0.2)
        return found

    def show(self, what: str) -> None:
        self._run("jobs", note=f"      # {what}")

    def _run(self, *command: str, note: str = "") -> None:
        """Run an `s2ft` command as an operator does, and show what it prints."""
        done = self.node.s2ft(*command)
        self.check(done.returncode == 0, f"s2ft {' '.join(command)}: {done.stderr}")
        print(f"\n$ s2ft {' '.join(command)}{note}\n{done.stdout}", end="", flush=True)

    # What must hold

    def _check_first_wave(self) -> None:
        first = self.wait_for(lambda: self._in("starting", "running"), "jobs are started")
        shares = Counter(job["tenant"] for job in first)
        self.check(shares == WEIGHTS, f"the first four slots went to {dict(shares)}")
        self.show("the first four slots: 1, 1 and 2, as the weights say")

    def _check_ends(self, cancelled: str, urgent: str, stopped: set[str]) -> None:
        prints, starts = set(), 0
        for job in self.jobs():
            expected = "cancelled" if job["id"] == cancelled else "succeeded"
            self.check(job["state"] == expected, f"{job['name']} is {job['state']}: {job['error']}")
            if job["state"] == "succeeded":
                version = {"name": f"{job['tenant']}.{job['name']}", "version": "1"}
                self.check(
                    job["model"] == version, f"{job['name']} is registered as {job['model']}"
                )
                run = self.folder / "runs" / job["tenant"] / job["name"] / job["id"]
                prints.add(_fingerprint(run / "adapter"))
                starts += (run / "metrics.jsonl").read_text().count('"kind": "start"')
        self.check(len(prints) == 1, f"the adapters differ: {prints}")
        runs = len(self.ids) - 1
        self.check(len(stopped) == 1, f"{len(stopped)} jobs were stopped for one")
        # each run once, the stopped one once more, and the one whose worker was killed
        self.check(starts == runs + 2, f"{runs} runs were started {starts} times")
        print(f"\n{runs} adapters, all with the fingerprint {prints.pop()}")
        (victim,) = stopped
        self._check_story(victim, urgent)
        self._run("usage")

    def _check_story(self, victim: str, urgent: str) -> None:
        story = self.queue.job(victim)
        states = [event["state"] for event in story["events"]]
        self.check(
            [state for state in states if state != "running"]
            == ["queued", "starting", "preempting", "queued", "starting", "succeeded"],
            f"{victim} went {states}",
        )
        asked = next(it for it in story["events"] if it["state"] == "preempting")
        self.check(asked["cause"] == "asked to stop: priority", f"the cause is {asked['cause']}")
        self.check(urgent in (asked["detail"] or ""), f"the detail is {asked['detail']}")
        self._run("job", victim)

    def _check_door(self, code: int, output: str) -> None:
        lines = output.splitlines()
        shown = ("job ", "queued", "registered", "step ")
        kept = [line for line in lines if line.startswith(shown)]
        print("\n$ ray job submit --working-dir . -- python jobs/finetune.py --config birch.yaml")
        print("\n".join(kept), flush=True)
        self.check(code == 0, f"ray job submit ended with {code}: {output}")
        self.check("registered birch.birch-1 version 1" in output, "the driver told no version")
        self.check("nothing is started" in output, "the driver told no reason while it waited")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def _maps(process: psutil.Process, job: dict[str, Any]) -> bool:
    """Say whether a process has a job's data mapped into its memory."""
    return any(job["id"] in it.path for it in process.memory_maps())


def _fingerprint(folder: Path) -> str:
    from s2ft_ray.method import Adapter

    return Adapter.load(folder).fingerprint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="of a node that is up; default: a new one")
    parser.add_argument("--jobs", type=int, default=12, choices=(6, 12))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s2ft-", ignore_cleanup_errors=True) as folder:
        node = Node(args.home or Path(folder) / "home")
        if args.home is None:
            node.home.mkdir()
            (node.home / "scheduler.yaml").write_text(SETTINGS)
            started = node.s2ft("up", "--num-cpus", str(SLOTS))
            assert started.returncode == 0, started.stderr
        try:
            return _play(node, Path(folder), args.jobs)
        finally:
            if args.home is None:
                node.s2ft("down")


def _play(node: Node, folder: Path, num_jobs: int) -> int:
    os.environ.update(node.env)  # before Ray is imported, which reads it then
    from s2ft_ray.cli.queue_commands import connect

    connect()
    scenario = Scenario(node, folder, num_jobs)
    started = time.monotonic()
    scenario.run()
    print(f"\n{len(scenario.ids)} jobs in {time.monotonic() - started:.0f} s")
    print("all right" if not scenario.faults else "\n".join(["WRONG", *scenario.faults]))
    return 1 if scenario.faults else 0


if __name__ == "__main__":
    sys.exit(main())
