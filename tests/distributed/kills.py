"""A run whose workers die by SIGKILL at chosen moments, in processes of their own.

A checkpoint is written beside the steps, so that a death in a step also meets one half written.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo import fork_server

from s2ft_ray.training import checkpoint, worker
from s2ft_ray.training.metrics import MetricsLog

WORLD_SIZE = 2
MOMENTS: dict[str, tuple[Any, str]] = {
    "while a step is done": (worker, "train_step"),
    "while the state is copied": (checkpoint, "_tensors_of"),
    "while a checkpoint's folder is made": (checkpoint, "_make_empty"),
    "while tensors are written": (checkpoint.state_dict_saver, "save"),
    "while tensors are read back": (checkpoint.state_dict_loader, "load"),
    "while a checkpoint is committed": (checkpoint.Checkpointer, "_commit"),
    "while a file's digest is taken": (checkpoint, "_digest"),
    "while an old checkpoint is removed": (shutil, "rmtree"),
    "while metrics are written": (MetricsLog, "write"),
    "while the adapter is extracted": (worker, "extract_adapter"),
    "while the adapter is saved": (worker.Adapter, "save"),
}


ON_EVERY_RANK = {
    "while a step is done",
    "while the state is copied",
    "while tensors are written",
    "while tensors are read back",
    "while the adapter is extracted",
}


@dataclass(frozen=True)
class Kill:
    """One death: of `rank`, at the call number `call` of what `moment` names."""

    moment: str
    call: int
    is_after: bool
    """Once the call has returned, or before it is made."""
    rank: int

    @classmethod
    def draw(cls, generator: random.Random) -> "Kill":
        moment = generator.choice(sorted(MOMENTS))
        call = 1 if "adapter" in moment else generator.randint(1, 3)
        rank = generator.randrange(WORLD_SIZE) if moment in ON_EVERY_RANK else 0
        return cls(moment, call, generator.random() < 0.5, rank)


def start(path: Path, kill: Kill | None) -> list[int | None]:
    """Train the run until it ends or a worker dies; return the exit codes."""
    context = fork_server()
    meeting = path / f"meeting-{time.monotonic_ns()}"
    processes = [
        context.Process(target=_work, args=(path, rank, meeting, kill), daemon=True)
        for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in processes):
        dead = any(process.exitcode for process in processes)
        if dead or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def _work(path: Path, rank: int, meeting: Path, kill: Kill | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=meeting.as_uri(),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=100),
    )
    if kill is not None and kill.rank == rank:
        owner, name = MOMENTS[kill.moment]
        setattr(owner, name, deadly(getattr(owner, name), kill.call, kill.is_after))
    worker.run_worker(path, torch.device("cpu"), num_threads=1)
    dist.barrier()
    os._exit(0)


def deadly(function: Callable[..., Any], call: int, is_after: bool) -> Callable[..., Any]:
    """Let this process die at the call number `call` of `function`, before it or after."""
    calls = [0]

    def die_at(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return die_at
