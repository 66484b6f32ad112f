"""How long a call takes: on the CPU by itself, on CUDA as one of a series.

A GPU computes after the call has returned, and launching a kernel can take longer than the kernel.
So on CUDA a series of calls, each on memory of its own, is captured into a CUDA graph, and events
time its replay: the device's time, free of Python for everybody alike. The series is long enough
that what a call reads has left the L2 cache since its last turn, as it has in a model whose other
layers come between. `queued_s` is the wall time of the same calls launched by Python.
"""

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""The process's own time is for machines that others use too: with one thread it is what the
wall's would be if they didn't."""
SHORTEST_SERIES = 20
_CACHES = 3  # so many times the L2 cache is what a series reads, at least


class Series:
    """Calls that are alike, timed together."""

    def __init__(
        self, calls: Sequence[Call], device: torch.device, clock: Clock, captured: bool = True
    ) -> None:
        """Run the calls once and capture them, where that is wanted and the device is a GPU.

        `clock` is for what Python launches.
        """
        self._calls = calls
        self._device = device
        self._clock = clock
        self._graph: torch.cuda.CUDAGraph | None = None
        self.fault: str | None = None
        """Why they weren't captured, so that `seconds` is `queued_s`."""
        if captured and device.type == "cuda":
            try:
                self._graph = _capture(calls)
            except RuntimeError as error:
                self.fault = str(error).splitlines()[0]

    def seconds(self) -> float:
        """Return what one call takes."""
        if self._graph is None:
            return self.queued_s()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph.replay()  # while it runs the timed one is launched
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / len(self._calls)

    def queued_s(self) -> float:
        """Return what one call takes that Python makes, on CUDA with the others right behind it."""
        self._wait()
        started = self._clock()
        for call in self._calls:
            call()
        self._wait()
        return (self._clock() - started) / len(self._calls)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def series_length(device: torch.device, read_bytes: int) -> int:
    """Return how many calls that each read `read_bytes` make a series."""
    if device.type == "cpu":
        return 1
    return max(SHORTEST_SERIES, num_copies(device, read_bytes))


def num_copies(device: torch.device, read_bytes: int) -> int:
    """Return how many copies of `read_bytes` no L2 cache holds."""
    if device.type == "cpu":
        return 1
    cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return -(-_CACHES * cache_bytes // read_bytes)


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # what is made at a first call can't be captured
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph
