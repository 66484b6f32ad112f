"""``jobs/benchmark.py checkpoints``: the same run with checkpoints and without.

What a checkpoint costs is all of it: the copy that holds the loop up, and what writing, reading
back and committing take from the steps beside which they run.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import describe_machine, load_warning
from benchmarks.plain_loop import BATCH, build_run, steady_seconds, train_plain
from s2ft_ray.config import CheckpointConfig, RunConfig
from s2ft_ray.finetune.main import create_run
from s2ft_ray.training.plan import plan_run

TARGET = 0.02
"""Of the step time, at the default distance of checkpoints."""


@dataclass
class Result:
    """Each round's mean seconds from step to step, and those that saving held the loop up."""

    name: str
    every_steps: int
    step: list[float] = field(default_factory=list)
    held_up: list[float] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> None:
    """Measure both in turns and print what a checkpoint costs."""
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    machine |= {"threads": arguments.threads, "workers": arguments.workers}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    without = Result("none", arguments.steps)
    with_them = Result(f"every {arguments.every} steps", arguments.every)
    with tempfile.TemporaryDirectory(prefix="s2ft-", ignore_cleanup_errors=True) as folder:
        config = build_run(
            Path(folder),
            arguments,
            optim={"global_batch_size": BATCH * arguments.workers},
            parallel={"num_workers": arguments.workers},
        )
        for _ in range(arguments.rounds):
            for result in (without, with_them):
                _measure(result, config, arguments)
    print(f"\nbest of {arguments.rounds} rounds of {arguments.steps} steps")
    print("| checkpoints | mean step ms | held up by one ms |\n|---|--:|--:|")
    for result in (without, with_them):
        cells = [f"{min(result.step) * 1000:.1f}", f"{min(result.held_up) * 1000:.1f}"]
        print(f"| {result.name} | {' | '.join(cells)} |")
    default = CheckpointConfig().every_steps
    cost = (min(with_them.step) - min(without.step)) * arguments.every
    share = cost / default / min(without.step)
    verdict = "within" if share <= TARGET else "MISSES"
    print(
        f"a checkpoint costs {cost * 1000:.0f} ms: {share:.2%} of the step time at one in {default}"
        f" steps, the default ({verdict} at most {TARGET:.0%})"
    )
    if arguments.json:
        document = {
            "machine": machine,
            "warning": warning,
            "share": share,
            "results": [vars(without), vars(with_them)],
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _measure(result: Result, config: RunConfig, arguments: argparse.Namespace) -> None:
    changed = {"every_steps": result.every_steps}
    checkpoint = config.checkpoint.model_copy(update=changed)
    created = create_run(plan_run(config.model_copy(update={"checkpoint": checkpoint})))
    train_plain(created, arguments.threads, arguments.workers)
    seconds = steady_seconds(created.metrics)
    lines = [json.loads(line) for line in created.metrics.read_text().splitlines()]
    held_up = [line["checkpoint_seconds"] for line in lines if line["kind"] == "train"]
    saved = [each for each in held_up if each] or [0.0]
    result.step.append(sum(seconds) / len(seconds))
    result.held_up.append(sum(saved) / len(saved))
