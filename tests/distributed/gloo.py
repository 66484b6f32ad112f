"""Pools of gloo processes that live for the session: a test sends them functions to run.

All processes come from one fork server that has torch, transformers and the rest imported, which
takes seconds; a process then starts in a fraction of one, and a call takes milliseconds.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

CALL_TIMEOUT_S = 240
PRELOAD = ["s2ft_ray.training.worker"]


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Return what processes are made with; the server starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class GlooPool:
    """`world_size` processes of one process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = fork_server()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank; return what each returned.

        The first rank's exception is raised here, with its traceback as a note.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(CALL_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} did not answer {function.__name__}")
            replies.append(pipe.recv())
        for rank, (value, trace) in enumerate(replies):
            if trace is not None:
                value.add_note(f"on rank {rank}:\n{trace}")
                raise value
        return [value for value, _ in replies]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
                process.join()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            pipe.send((function(*args), None))
        except BaseException as error:  # noqa: BLE001 - the test process raises it
            pipe.send((error, traceback.format_exc()))
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads sometimes abort a process that exits at once
    os._exit(0)  # the interpreter's own end takes seconds with torch in it
