"""``jobs/benchmark.py queue`` over four days: its tables are whole; nothing here judges a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_a_short_month_prints_every_policy_size_and_tenant(tmp_path: Path) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "month.png"
    options = ["--days", "4", "--tenants", "6", "--nodes", "2", "--queued", "40"]
    options += ["--json", str(out), "--figure", str(figure)]
    done = subprocess.run(
        [sys.executable, "jobs/benchmark.py", "queue", *options],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert list(document["month"]) == ["fair share", "FIFO", "strict priority"]
    fair, fifo, _ = document["month"].values()
    assert fair["jain_mean"] > fifo["jain_mean"]
    assert fair["waits_s"].keys() == fifo["waits_s"].keys()
    assert "| tenant05 |" in done.stdout
    (tick,), (service,) = document["ticks"], document["service"]
    assert tick["queued"] == service["queued"] == 40
    assert figure.stat().st_size > 10_000
