"""Jobs that come by `ray job submit`, and their stories."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from nodes import Node

REPO = Path(__file__).parents[2]
PATIENCE_S = 300.0


def submit(
    node: Node, folder: Path, name: str, max_steps: int, *options: str, num_workers: Any = 2
) -> None:
    """Submit a run of the embedded base by `ray job submit`, with `options` of that."""
    rows = folder / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "One is", "completion": " odd"}) + "\n") * 64)
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": name,
        "data": {"train": str(rows)},
        "optim": {"max_steps": max_steps, "global_batch_size": 8, "micro_batch_size": 4},
        "parallel": {"num_workers": num_workers},
        "evaluation": {"every_steps": max_steps, "num_samples": 0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    command = ["ray", "job", "submit", "--no-wait", "--submission-id", name, *options]
    command += ["--working-dir", str(REPO), "--", "python", "jobs/finetune.py"]
    run(node, *command, "--config", str(folder / "run.yaml"))


def run(node: Node, *command: str) -> str:
    """Run a command as this node's client and return what it prints; it has to succeed."""
    done = subprocess.run(command, env=node.env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait(node: Node, name: str, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a job is as wanted; return its story."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for job in ask(node, "jobs"):
            if job["name"] == name:
                story: dict[str, Any] = ask(node, "job", job["id"])
                if is_there(story):
                    return story
        time.sleep(1.0)
    raise AssertionError(f"{name} is not as wanted within {PATIENCE_S:.0f} s")


def ask(node: Node, *command: str) -> Any:
    """Return what `s2ft` answers in JSON."""
    done = node.s2ft(*command, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
