"""The deployment page's way from one machine to two, which share a folder and a network."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machines
import pytest
import yaml
from machines import Machines

from s2ft_ray.method import Adapter

REPO = Path(__file__).parents[2]
STEPS, SAVED_EVERY = 200, 20
HEAD = "ray start --head --port=6379 --num-cpus=1 --dashboard-host=0.0.0.0"
SCHEDULER = "RAY_ADDRESS=127.0.0.1:6379 exec python -m s2ft_ray.scheduler"
WORKER = "ray start --address=10.77.0.1:6379 --num-cpus=1"
SUBMIT = (
    f"cd {REPO} && export RAY_API_SERVER_ADDRESS=http://10.77.0.1:8265 &&"
    " ray job submit --working-dir . -- python jobs/finetune.py --config"
)


def write_config(folder: Path, name: str) -> Path:
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": name,
        "data": {
            "train": str(REPO / "jobs/configs/data/tickets_train.jsonl"),
            "max_seq_len": 128,
        },
        "method": {"budgets": {"o": 0.25, "down": 0.2}},
        "optim": {"max_steps": STEPS, "global_batch_size": 16, "micro_batch_size": 8},
        "parallel": {"num_workers": 2, "resources_per_worker": {"CPU": 1}},
        "evaluation": {"every_steps": STEPS, "num_samples": 0},
        "checkpoint": {"every_steps": SAVED_EVERY},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def lines_of(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """Return the run's metrics of one kind, as far as they are written."""
    found = list((folder / "home/runs/acme" / name).glob("*/metrics.jsonl"))
    text = found[0].read_text().splitlines(keepends=True) if found else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    return [line for line in lines if line["kind"] == kind]


def adapter_of(folder: Path, name: str) -> Adapter:
    (path,) = (folder / "home/runs/acme" / name).glob("*/adapter")
    return Adapter.load(path)


def wait_for(seen: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not seen():
        assert time.monotonic() < deadline, f"{what}\n{log.read_text()}"
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.skipif(not machines.can_be_made(), reason="network namespaces can't be made here")
def test_two_machines_train_together_and_one_that_loses_power_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    with Machines(tmp_path) as cluster:
        for number, command in enumerate([HEAD, WORKER]):
            started = cluster.run(number, command)
            assert started.returncode == 0, started.stderr
        cluster.start(0, SCHEDULER, "scheduler.log")
        job = cluster.start(1, f"{SUBMIT} {write_config(tmp_path, 'cut')}", log.name)
        wait_for(lambda: len(lines_of(tmp_path, "cut", "train")) > SAVED_EVERY, "a step", log)
        assert "ip=10.77.0.2" in log.read_text()

        cluster.cut_power(1)
        job.wait(60)
        assert cluster.run(1, WORKER).returncode == 0
        calm = f"{SUBMIT} {write_config(tmp_path, 'calm')}"
        undisturbed = cluster.run(0, calm)
        assert undisturbed.returncode == 0, undisturbed.stdout
        wait_for(lambda: bool(lines_of(tmp_path, "cut", "end")), "the end of the cut run", log)
        adapters = tmp_path / "home/runs/acme/cut"
        wait_for(lambda: bool(list(adapters.glob("*/adapter/*.json"))), "its adapter", log)
        asked = cluster.run(1, "s2ft jobs --json", RAY_ADDRESS="auto")
        assert asked.returncode == 0, asked.stderr

    starts = [line["step"] for line in lines_of(tmp_path, "cut", "start")]
    assert starts[0] == 0
    assert starts[-1] >= SAVED_EVERY
    assert starts[-1] % SAVED_EVERY == 0
    fingerprints = {adapter_of(tmp_path, name).fingerprint for name in ("cut", "calm")}
    assert len(fingerprints) == 1
    assert {job["name"]: job["state"] for job in json.loads(asked.stdout)} == dict.fromkeys(
        ["cut", "calm"], "succeeded"
    )
