"""The bytes in tensors on the CPU, added up from the allocator's events."""

from types import TracebackType
from typing import Self

from torch.profiler import ProfilerActivity, profile


class Allocations:
    """Counts while it is entered; what the rest of the process does plays no part.

    It slows the caller down: for what isn't timed.
    """

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.peak = 0
        """The most bytes at one time, above those at its start; known when it was left."""

    def __enter__(self) -> Self:
        self._profiler.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._profiler.__exit__(kind, error, traceback)
        assert self._profiler.profiler is not None
        events = self._profiler.profiler.kineto_results.events()
        changes = sorted((it.start_ns(), it.nbytes()) for it in events if it.name() == "[memory]")
        current = 0
        for _, change in changes:
            current += change
            self.peak = max(self.peak, current)
