"""A run of random weights and its loop in plain processes: what Ray and saving are held against.

Both sides of such a comparison run ``training.worker.run_worker`` on the same base, data, threads
and steps. Invariant: a step's time is that between two lines of the metrics file, so nothing
between steps is left out.
"""

import argparse
import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig, RunConfig, parse_config
from s2ft_ray.errors import JobError
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.worker import run_worker

SEQ_LEN, BATCH = 256, 4
HEAD_DIM = 64
WARMUP_SHARE = 0.2
"""Of a run's steps: first touches of memory, caches, a start's last imports."""


def build_run(folder: Path, arguments: argparse.Namespace, **sections: dict[str, Any]) -> RunConfig:
    """Write a base of random weights and rows of equal length; return the run that uses them.

    `sections` are laid over those of a run that looks and saves at its end alone.
    """
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
    document: dict[str, Any] = {
        "tenant": "benchmark",
        "name": "steps",
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
    for name, values in sections.items():
        document[name] = {**document[name], **values}
    return parse_config(document)


def steady_seconds(metrics: Path) -> list[float]:
    """Return the seconds from step to step of a run, after its first steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "train"]
    first = max(1, int(len(times) * WARMUP_SHARE))
    return [
        after - before for before, after in zip(times[first:], times[first + 1 :], strict=False)
    ]


def train_plain(created: RunFolder, threads: int, num_workers: int = 1) -> None:
    """Train the run in processes of this machine, with nothing beside them."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(created.path, threads, rank, num_workers))
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if codes := [process.exitcode for process in processes if process.exitcode != 0]:
        raise JobError(f"the plain loop ended with exit code {codes[0]}")


def _work(path: Path, threads: int, rank: int, num_workers: int) -> None:
    store = dist.FileStore(str(path / "store"), num_workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)
    run_worker(path, torch.device("cpu"), threads)
    dist.destroy_process_group()
