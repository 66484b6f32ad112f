"""What one training step costs: its time, the bytes its graph keeps, the peak of its memory.

Invariant: a step is forward, loss, backward, clipping, and the optimizer's step with all that
hangs on it (S2FT's write-back is in its post-step hook).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.allocations import Allocations

MAX_GRAD_NORM = 1.0
Clock = Callable[[], float]
# The process's own seconds are those of all its threads: for one thread, beside other work.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class TrainingStep:
    """A model, its optimizer (None: nothing is trained) and what the model is called with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    batch: dict[str, Any]
    """``input_ids`` and ``labels``, both [B, T], and what else the forward pass takes."""

    def run(self) -> None:
        """Do one step."""
        self._loss().backward()
        if self.optimizer is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def time(self, clock: Clock, run: Callable[[], None] | None = None) -> float:
        """Return the seconds that one step takes by `clock`, the device's work included.

        `run` does it in the place of the method of that name.
        """
        self._wait()
        started = clock()
        (run or self.run)()
        self._wait()
        return clock() - started

    def capture(self) -> Callable[[], None]:
        """Return what replays the step as one CUDA graph: no time goes into launching kernels.

        The optimizer must be capturable.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # as capturing wants its warming up
            self._run_twice()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph.replay

    def kept_bytes(self) -> int:
        """Return the bytes of the storages that the graph keeps between forward and backward.

        Parameters and buffers are there anyway and don't count; a saved view counts with the
        whole storage that it pins. Not for a model with activation checkpointing, which keeps
        its layers' inputs where no hook sees them.
        """
        own = {_address(tensor) for tensor in self._state()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _address(tensor) not in own:
                kept[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._loss()
        total = sum(kept.values())
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return total

    def peak_bytes(self) -> int:
        """Return the peak of the bytes in tensors over two steps, the model's own included.

        The optimizer must be new: its state is counted as it is made. On the CPU the peak is
        added up from the allocator's events, so it does not depend on the rest of the process.
        """
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._run_twice()
            return torch.cuda.max_memory_allocated()
        with Allocations() as allocations:
            self._run_twice()
        return allocations.peak + sum(
            {_address(t): t.untyped_storage().nbytes() for t in self._state()}.values()
        )

    @property
    def _on_cuda(self) -> bool:
        return bool(self.batch["input_ids"].device.type == "cuda")

    def _run_twice(self) -> None:
        self.run()
        self.run()

    def _loss(self) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def _state(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
