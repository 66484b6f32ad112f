"""Six jobs of ``tests/queue_scenario.py``: three tenants, both doors, a stop, kills, a cancel."""

import subprocess
import sys
from pathlib import Path

import pytest
from nodes import Node

SCENARIO = Path(__file__).parents[1] / "queue_scenario.py"


@pytest.mark.long
def test_three_tenants_share_a_cluster_as_their_weights_say(node: Node) -> None:
    done = subprocess.run(
        [sys.executable, str(SCENARIO), "--jobs", "6", "--home", str(node.home)],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all right")
