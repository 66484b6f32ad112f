"""One round of ``tests/queue_soak.py``: the scheduler, a driver and a worker are killed."""

import subprocess
import sys
from pathlib import Path

import pytest
from nodes import Node

SOAK = Path(__file__).parents[1] / "queue_soak.py"


@pytest.mark.long
def test_jobs_survive_the_scheduler_a_driver_and_a_worker(node: Node) -> None:
    faults = ["--jobs", "2", "--faults", "scheduler", "driver", "worker"]
    done = subprocess.run(
        [sys.executable, str(SOAK), "--rounds", "1", "--home", str(node.home), *faults],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rounds, all right" in done.stdout
