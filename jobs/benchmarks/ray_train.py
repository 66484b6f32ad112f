"""``jobs/benchmark.py ray``: one Ray Train worker against the same loop without Ray.

Both run ``training.worker.run_worker`` on the same base, data, threads and steps; what differs is
who starts the process and what runs beside it. Invariant: no Ray runs beside the plain loop, and
a step's time is that between two lines of the metrics file, so nothing between steps is left out.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe_machine, load_warning
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig, RunConfig, parse_config
from s2ft_ray.errors import JobError
from s2ft_ray.finetune.main import create_run
from s2ft_ray.training.launch import train_with_ray
from s2ft_ray.training.plan import plan_run
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.worker import run_worker

SEQ_LEN, BATCH = 256, 4
HEAD_DIM = 64
TARGET = 0.95
WARMUP_SHARE = 0.2
"""Of a run's steps: first touches of memory, caches, a start's last imports."""


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
    plain, in_ray = results = [Result("plain loop", _train_plain), Result("Ray Train", _train_ray)]
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


def build_run(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """Write a base of random weights and rows of equal length; return the run that uses them."""
    tokenizer = load_tokenizer(ModelConfig())
    heads = arguments.width // HEAD_DIM
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 8 // 3,
            num_hidden_layers=arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            max_position_embeddings=SEQ_LEN,
        )
    )
    print(
        f"Llama of {arguments.layers} layers, {arguments.width} wide,"
        f" {base.num_parameters():,} parameters, random weights"
    )
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(64):
            # A digit is at least a token: every row is cut to the same length.
            text = " ".join(rng.choices("0123456789", k=SEQ_LEN + 1))
            file.write(json.dumps({"text": text}) + "\n")
    steps = arguments.steps
    return parse_config(
        {
            "tenant": "benchmark",
            "name": "ray",
            "model": {"name_or_path": str(folder / "base")},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "max_seq_len": SEQ_LEN,
                "train_on": "all",
            },
            "optim": {
                "max_steps": steps,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "lr": 1e-4,
            },
            "parallel": {"resources_per_worker": {"CPU": arguments.threads}},
            "evaluation": {"every_steps": steps, "num_samples": 0},
            "checkpoint": {"storage_path": str(folder / "runs"), "every_steps": steps},
        }
    )


def steady_seconds(metrics: Path) -> list[float]:
    """Return the seconds from step to step of a run, after its first steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "train"]
    first = max(1, int(len(times) * WARMUP_SHARE))
    return [
        after - before for before, after in zip(times[first:], times[first + 1 :], strict=False)
    ]


def _train_plain(created: RunFolder, _config: RunConfig, threads: int) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_plain_process, args=(created.path, threads)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise JobError(f"the plain loop ended with exit code {process.exitcode}")


def _plain_process(path: Path, threads: int) -> None:
    store = dist.FileStore(str(path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    run_worker(path, torch.device("cpu"), threads)
    dist.destroy_process_group()


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
