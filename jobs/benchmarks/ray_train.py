"""``jobs/benchmark.py ray``: one Ray Train worker against the same loop without Ray.

What differs is who starts the process and what runs beside it: no Ray runs beside the plain loop.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch

from benchmarks.machine import describe_machine, load_warning
from benchmarks.plain_loop import BATCH, SEQ_LEN, build_run, steady_seconds, train_plain
from s2ft_ray.config import RunConfig
from s2ft_ray.finetune.main import create_run
from s2ft_ray.training.launch import train_with_ray
from s2ft_ray.training.plan import plan_run
from s2ft_ray.training.run_folder import RunFolder

TARGET = 0.95


@dataclass
class Result:
    """Seconds of each steady step, a list for each round."""

    name: str
    train: Callable[[RunFolder, RunConfig, int], None]
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the best round."""
        return min(statistics.median(seconds) for seconds in self.rounds)

    @property
    def best(self) -> float:
        return min(min(seconds) for seconds in self.rounds)


def run(arguments: argparse.Namespace) -> None:
    """Measure both in turns and print their tokens/s."""
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    machine["threads"] = arguments.threads
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    plain, in_ray = results = [
        Result("plain loop", lambda created, _, threads: train_plain(created, threads)),
        Result("Ray Train", _train_ray),
    ]
    with tempfile.TemporaryDirectory(prefix="s2ft-", ignore_cleanup_errors=True) as folder:
        config = build_run(Path(folder), arguments)
        for _ in range(arguments.rounds):
            for result in results:
                created = create_run(plan_run(config))
                result.train(created, config, arguments.threads)
                result.rounds.append(steady_seconds(created.metrics))
    tokens = SEQ_LEN * BATCH
    print(f"\nbest of {arguments.rounds} rounds of {arguments.steps} steps of {tokens} tokens")
    print("| | median step ms | tokens/s | best step ms |\n|---|--:|--:|--:|")
    for result in results:
        cells = [f"{result.median * 1000:.1f}", f"{tokens / result.median:,.0f}"]
        print(f"| {result.name} | {' | '.join(cells)} | {result.best * 1000:.1f} |")
    ratio = plain.median / in_ray.median
    verdict = "within" if ratio >= TARGET else "MISSES"
    print(f"Ray Train / plain loop, tokens/s: {ratio:.3f} ({verdict} at least {TARGET})")
    print(f"by the best single step: {plain.best / in_ray.best:.3f}")
    if arguments.json:
        document = {
            "machine": machine,
            "warning": warning,
            "ratio": ratio,
            "ratio_of_best_steps": plain.best / in_ray.best,
            "seconds": {result.name: result.rounds for result in results},
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _train_ray(created: RunFolder, config: RunConfig, threads: int) -> None:
    ray.init(
        address="local",
        num_cpus=threads,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(created.path.parents[3] / "ray"),
    )
    try:
        train_with_ray(created, config.parallel)
    finally:
        ray.shutdown()
