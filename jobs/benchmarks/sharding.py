"""The layouts of the weights side by side: losses, bytes on the wire, memory and speed.

Gloo processes on this machine train a Llama of random weights on the same rows in each layout.
Losses, bytes held and bytes received are exact; the times are those of this machine's cores and
loopback, and say how the layouts scale only while each process has a core of its own.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.allocations import Allocations
from benchmarks.machine import describe_machine, load_warning
from s2ft_ray.config import RunConfig, parse_config
from s2ft_ray.data import MicroBatch, Step
from s2ft_ray.method import convert
from s2ft_ray.training.loop import train_step
from s2ft_ray.training.memory import estimate_memory, measure_base
from s2ft_ray.training.optimizer import build_optimizer
from s2ft_ray.training.parallel import Layout, Workers, shard_model
from s2ft_ray.training.traffic import TrafficCounter

SEQ_LEN, VOCAB, HEAD_DIM = 128, 512, 32
MIB = 2**20
LOSS_TARGET = 1e-5
SPEED_TARGET = 0.85
MIN_STEPS = 4


@dataclass
class Measured:
    """What one worker saw in one layout."""

    losses: list[float]
    seconds: float
    """Of the median step."""
    base: int
    """Bytes of frozen weights that it holds."""
    state: int
    """Bytes of slices, gradients and optimizer state that it holds."""
    peak: int
    """The most bytes in tensors at one time of a step, those it holds included."""
    estimate: int
    """What ``s2ft check`` says of the peak."""
    received: dict[str, int]
    """Bytes in one step, by kind of collective."""


def run(arguments: argparse.Namespace) -> None:
    """Measure every layout and print the table."""
    if arguments.steps < MIN_STEPS:
        raise SystemExit(f"--steps {arguments.steps}: {MIN_STEPS} or more; two are only counted")
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    count = arguments.workers
    layouts = [Layout.of("replicate", count, 1), Layout.of("full", count, count)]
    if count > 2 and count % 2 == 0:
        layouts.append(Layout.of("hybrid", count, count // 2))
    alone, *measured = _run_rounds([Layout.of("replicate", 1, 1)], layouts, arguments)
    _print_table(alone, list(zip(layouts, measured, strict=True)), arguments)
    if arguments.json:
        document = {
            "machine": machine,
            "warning": warning,
            "alone": vars(alone),
            **{one.sharding: vars(seen) for one, seen in zip(layouts, measured, strict=True)},
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _run_rounds(
    alone: list[Layout], layouts: list[Layout], arguments: argparse.Namespace
) -> list[Measured]:
    """Measure one worker, then all, again and again: a machine's speed drifts. The best times."""
    best = _spawn(alone, arguments) + _spawn(layouts, arguments)
    for _ in range(arguments.rounds - 1):
        again = _spawn(alone, arguments) + _spawn(layouts, arguments)
        for seen, newer in zip(best, again, strict=True):
            seen.seconds = min(seen.seconds, newer.seconds)
    return best


def _print_table(
    alone: Measured, rows: list[tuple[Layout, Measured]], arguments: argparse.Namespace
) -> None:
    tokens = arguments.rows * SEQ_LEN
    print(
        f"\nsteps of {tokens} tokens, {rows[0][0].num_workers} workers of {arguments.threads}"
        " thread(s); bytes are one worker's, wire bytes those of one step; tokens/s by the median"
        f" of {arguments.steps} steps, the best of {arguments.rounds} rounds"
    )
    print(
        "| layout | largest loss difference to one worker | base MiB | slices and optimizer MiB"
        " | peak MiB | estimated | gathered MiB | reduced MiB | tokens/s | of the ideal |\n|---"
        + "|--:" * 9
        + "|"
    )
    print(_row("one worker", alone, alone, 1, tokens))
    for layout, seen in rows:
        groups = f", groups of {layout.group}" if layout.sharding == "hybrid" else ""
        print(_row(layout.sharding + groups, seen, alone, layout.num_workers, tokens))
    worst = max(_difference(seen, alone) for _, seen in rows)
    verdict = "within" if worst <= LOSS_TARGET else "MISSES"
    print(f"largest difference of a loss: {worst:.1e} ({verdict} {LOSS_TARGET:.0e})")
    if rows[0][0].num_workers * arguments.threads > (os.cpu_count() or 1):
        print("the workers share cores: the times say nothing about scaling; see --workers 2")
        return
    best = max(alone.seconds / (seen.seconds * one.num_workers) for one, seen in rows)
    verdict = "within" if best >= SPEED_TARGET else "misses"
    print(f"best share of the ideal tokens/s: {best:.2f} ({verdict} at least {SPEED_TARGET})")


def _row(name: str, seen: Measured, alone: Measured, num_workers: int, tokens: int) -> str:
    reduced = seen.received.get("reduce_scatter", 0) + seen.received.get("all_reduce", 0)
    cells = [
        f"{_difference(seen, alone):.1e}",
        f"{seen.base / MIB:.2f}",
        f"{seen.state / MIB:.3f}",
        f"{seen.peak / MIB:.1f}",
        f"{seen.estimate / MIB:.1f}",
        f"{seen.received.get('gather', 0) / MIB:.3f}",
        f"{reduced / MIB:.3f}",
        f"{tokens / seen.seconds:,.0f}",
        f"{alone.seconds / (seen.seconds * num_workers):.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _difference(seen: Measured, alone: Measured) -> float:
    return max(abs(a - b) for a, b in zip(seen.losses, alone.losses, strict=True))


def _spawn(layouts: list[Layout], arguments: argparse.Namespace) -> list[Measured]:
    """Train in each layout, in processes of their own; return what rank 0 saw."""
    context = multiprocessing.get_context("spawn")
    results: Queue[list[Measured]] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_work, args=(rank, port, layouts, arguments, results))
        for rank in range(layouts[0].num_workers)
    ]
    for process in processes:
        process.start()
    measured = results.get(timeout=600)
    for process in processes:
        process.join()
    return measured


def _work(
    rank: int,
    port: int,
    layouts: list[Layout],
    arguments: argparse.Namespace,
    results: "Queue[list[Measured]]",
) -> None:
    torch.set_num_threads(arguments.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=layouts[0].num_workers,
    )
    workers = Workers.join(torch.device("cpu"))
    measured = [train_in(layout, workers, arguments) for layout in layouts]
    if rank == 0:
        results.put(measured)
        results.close()
        results.join_thread()
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in order


def train_in(layout: Layout, workers: Workers, arguments: argparse.Namespace) -> Measured:
    """Train in `layout`; return what this worker saw."""
    torch.manual_seed(0)
    heads = arguments.width // HEAD_DIM
    sizes = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=SEQ_LEN,
    )
    model, run = LlamaForCausalLM(sizes), _describe_run(layout, arguments)
    trained = convert(model, run.method).num_trainable
    shard_model(model, workers, layout)
    slices = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(slices, run.optim)
    losses, seconds, received, peak = [], [], {}, 0
    for number in range(arguments.steps):
        # Both slow it down: such a step isn't timed.
        counter = TrafficCounter() if number == 1 else None
        allocations = Allocations() if number == 2 else None
        before = _bytes_held(model, optimizer)
        with counter or allocations or nullcontext():
            result = train_step(
                model,
                optimizer,
                _build_step(number, arguments.rows, workers),
                number=number,
                num_steps=arguments.steps,
                config=run.optim,
                workers=workers,
            )
        losses.append(result.loss)
        if counter:
            received = dict(counter.received)
        elif allocations:
            peak = before + allocations.peak
        else:
            seconds.append(result.seconds)
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    return Measured(
        losses=losses,
        seconds=statistics.median(seconds),
        base=sum(_held(p) for p in model.parameters() if not p.requires_grad),
        state=2 * sum(map(_held, slices)) + sum(map(_held, state)),
        peak=peak,
        estimate=estimate_memory(
            run, sizes, measure_base(run, sizes), trained, SEQ_LEN, layout
        ).total,
        received=received,
    )


def _describe_run(layout: Layout, arguments: argparse.Namespace) -> RunConfig:
    return parse_config(
        {
            "tenant": "benchmark",
            "name": "sharding",
            "data": {"train": "none.jsonl"},
            "model": {"dtype": "float32"},
            "method": {"budgets": {"o": 0.1, "down": 0.03}},
            "optim": {
                "lr": 1e-3,
                "schedule": "constant",
                "max_steps": arguments.steps,
                "global_batch_size": arguments.rows,
                "micro_batch_size": -(-arguments.rows // layout.num_workers),
            },
        }
    )


def _bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Add up the tensors that outlive a step: weights, slices, their base values, moments."""
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return sum(map(_held, [*state, *model.parameters(), *model.buffers()]))


def _build_step(number: int, rows: int, workers: Workers) -> Step:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB, (rows, SEQ_LEN), generator=generator)
    mine = ids.chunk(workers.world_size)[workers.rank]
    labels = mine.clone()
    labels[:, 0] = -100
    positions = torch.arange(SEQ_LEN).expand(mine.shape)
    batch = MicroBatch(mine, labels, positions, num_targets=0, num_tokens=mine.numel())
    targets = rows * (SEQ_LEN - 1)
    return Step([batch], num_targets=targets, normalizer=float(targets), lines=[], files=[])


def _held(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
