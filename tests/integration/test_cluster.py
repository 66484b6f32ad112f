"""A run over several raylets: its workers spread, a drained node is left, a killed one survived."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from raylets import Raylets

from s2ft_ray.method import Adapter
from s2ft_ray.training.run_folder import RunFolder, find_run_folder

REPO = Path(__file__).parents[2]
STEPS = 300
SAVED_EVERY = 20


def write_config(folder: Path) -> Path:
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Number {n} is", "completion": " odd" if n % 2 else " even"})
            + "\n"
            for n in range(80)
        )
    )
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": "spread",
        "data": {"train": str(rows)},
        "method": {"budgets": {"o": 0.25, "down": 0.1}},
        "optim": {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4},
        "parallel": {"num_workers": 2, "sharding": "replicate"},
        "evaluation": {"every_steps": STEPS, "num_samples": 0},
        "checkpoint": {"every_steps": SAVED_EVERY, "storage_path": f"file://{folder}/runs"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextmanager
def started(raylets: Raylets, folder: Path) -> Iterator[subprocess.Popen]:
    """The job as it runs; what fails before its end ends it."""
    command = [sys.executable, "jobs/finetune.py", "--config", str(write_config(folder))]
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=REPO, env=raylets.env, stdout=log, stderr=log)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def wait_for(job: subprocess.Popen, seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not seen():
        assert job.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the run's metrics of one kind, as far as they are written."""
    found = list((folder / "runs").glob("*/*/*/metrics.jsonl"))
    text = found[0].read_text().splitlines(keepends=True) if found else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    return [line for line in lines if line["kind"] == kind]


def has_started(folder: Path, times: int) -> bool:
    """Whether a step was made after the workers' start number `times`."""
    starts, steps = lines_of(folder, "start"), lines_of(folder, "train")
    return len(starts) == times and bool(steps) and steps[-1]["time"] > starts[-1]["time"]


def finished(job: subprocess.Popen, folder: Path) -> RunFolder:
    log = folder / "log"
    assert job.wait(300) == 0, log.read_text()
    (config,) = (folder / "runs").glob("*/*/*/config.yaml")
    return find_run_folder(str(config.parent))


@pytest.mark.long
def test_a_run_leaves_a_drained_node_and_outlives_a_killed_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ExitStack() as stack:
        raylets = stack.enter_context(Raylets(tmp_path))
        nodes = {raylets.add() for _ in range(3)}
        job = stack.enter_context(started(raylets, folder))
        wait_for(job, lambda: has_started(folder, 1), "the first step")
        first = raylets.workers()
        assert sorted(first.values()) == [1, 1]
        assert lines_of(folder, "workers")[-1]["nodes"] == first

        drained, stays = first
        raylets.drain(drained, 600)  # long: who waits for the node's end would wait too long
        wait_for(job, lambda: has_started(folder, 2), "the step after the drain")
        second = raylets.workers()
        assert second == dict.fromkeys(nodes - {drained}, 1)
        assert lines_of(folder, "workers")[-1]["nodes"] == second

        raylets.kill(stays)
        another = raylets.add()
        wait_for(job, lambda: has_started(folder, 3), "the step after the death")
        assert raylets.workers() == dict.fromkeys(nodes - {drained, stays} | {another}, 1)
        run = finished(job, folder)
        calm = tmp_path / "calm"
        undisturbed = finished(stack.enter_context(started(raylets, calm)), calm)

    starts = [line["step"] for line in lines_of(folder, "start")]
    (stop,) = lines_of(folder, "stop")
    assert starts[1] == stop["step"]  # not a step is lost where there was a warning
    assert starts[2] == stop["step"] or (starts[2] > stop["step"] and starts[2] % SAVED_EVERY == 0)
    assert Adapter.load(run.adapter).fingerprint == Adapter.load(undisturbed.adapter).fingerprint
