"""A driver that has its workers: signs of life, the request to stop, the end.

Invariant: a driver that the queue has given up ends at once, and its workers with it, so that
nothing is written for an attempt that another one has followed.
"""

import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from s2ft_ray.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    JobError,
    NodeLost,
    OutOfMemory,
    Preempted,
    RegistryUnreachable,
    S2FTError,
    StaleAttempt,
    WorkersLost,
)
from s2ft_ray.scheduler.client import QueueClient
from s2ft_ray.scheduler.models import FailureReason
from s2ft_ray.training.metrics_reader import MetricsReader
from s2ft_ray.training.run_folder import RunFolder

HEARTBEAT_S = 2.0

_REASONS: tuple[tuple[type[S2FTError], FailureReason], ...] = (
    (ConfigError, FailureReason.BAD_INPUT),
    (DataError, FailureReason.BAD_INPUT),
    (AdapterError, FailureReason.BAD_INPUT),
    (CheckpointError, FailureReason.STORAGE),
    (Diverged, FailureReason.DIVERGED),
    (OutOfMemory, FailureReason.OUT_OF_MEMORY),
    (NodeLost, FailureReason.NODE_LOST),
    (WorkersLost, FailureReason.WORKER_LOST),
    (RegistryUnreachable, FailureReason.REGISTRY),
)


@dataclass(frozen=True)
class Claim:
    """What a driver got with its attempt."""

    job_id: str
    attempt: int
    num_workers: int
    run: RunFolder
    config: dict[str, Any]

    @classmethod
    def of(cls, job_id: str, answer: dict[str, Any]) -> Self:
        """Read the scheduler's answer."""
        run = RunFolder(Path(answer["run_folder"]))
        return cls(job_id, answer["attempt"], answer["num_workers"], run, answer["config"])


class Attempt:
    """Gives signs of life from a thread while it is entered, and tells the end.

    Whatever S2FTError leaves the block is reported with its cause before it goes on.
    """

    def __init__(
        self,
        queue: QueueClient,
        claim: Claim,
        interval_s: float = HEARTBEAT_S,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        """`end_process` ends this process and, with it, the workers, without any clean-up."""
        self._end_process = end_process
        self._queue, self.claim, self._interval_s = queue, claim, interval_s
        self.was_asked = False
        """Whether the queue has asked it to stop."""
        rows = claim.config["optim"]["global_batch_size"]
        self._metrics = _Metrics(claim.run.metrics, rows_per_step=rows)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None and not isinstance(error, StaleAttempt):
            self._report(_outcome_of(error))

    def check(self) -> None:
        """Raise StaleAttempt where the queue has given this attempt up."""
        self._queue.heartbeat(self.claim.job_id, self.claim.attempt)

    def succeed(self, name: str, version: str) -> None:
        """Tell that the adapter is registered."""
        self._report({"outcome": "succeeded", "model": [name, version]})

    def _report(self, outcome: dict[str, Any]) -> None:
        self._metrics.read()
        counts = {"rows": self._metrics.num_rows, "tokens": self._metrics.num_tokens}
        self._queue.report(self.claim.job_id, self.claim.attempt, {**outcome, **counts})

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._metrics.read()
            try:
                answer = self._queue.heartbeat(
                    self.claim.job_id,
                    self.claim.attempt,
                    self._metrics.progress,
                    _saved_at(self.claim.run),
                    self._metrics.placement,
                )
            except StaleAttempt as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                self._end_process(error.exit_code)
                return
            except JobError:  # the scheduler is away, which is no reason to stop
                continue
            if answer == "stop":
                self.was_asked = True
                with suppress(CheckpointError):  # a full disk; the queue asks again
                    if self.claim.run.path.is_dir():
                        self.claim.run.request_stop("the queue")


def _outcome_of(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Preempted):
        return {"outcome": "preempted", "step": error.step}
    reason = next((it for kind, it in _REASONS if isinstance(error, kind)), FailureReason.ERROR)
    if _is_of_a_full_disk(error):
        reason = FailureReason.STORAGE
    message = str(error) or type(error).__name__
    return {"outcome": "failed", "reason": reason.value, "message": message}


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _saved_at(run: RunFolder) -> float | None:
    times = []
    for folder in run.checkpoints.glob("step-*"):
        with suppress(FileNotFoundError):  # an old one, which the workers delete just now
            times.append(folder.stat().st_mtime)
    return max(times, default=None)


class _Metrics:
    """What the lines that this attempt added to the metrics file say."""

    def __init__(self, path: Path, rows_per_step: int) -> None:
        self._reader, self._rows_per_step = MetricsReader(path), rows_per_step
        self._total_steps = 0
        self._num_steps = 0
        self._num_starts = 0
        self.progress: dict[str, Any] | None = None
        self.placement: dict[str, int] | None = None
        """Workers by node id."""
        self.num_tokens = 0

    @property
    def num_rows(self) -> int:
        """Training rows that were gone through."""
        return self._num_steps * self._rows_per_step

    def read(self) -> None:
        """Take in what is new."""
        for line in self._reader.read():
            self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        if line["kind"] == "workers":
            self.placement = line["nodes"]
        elif line["kind"] == "start":
            self._total_steps = line["total_steps"]
            self._num_starts += 1
        elif line["kind"] == "train":
            self._num_steps += 1
            self.num_tokens += round(line["tokens_per_s"] * line["step_seconds"])
            self.progress = {
                "step": line["step"],
                "total_steps": self._total_steps,
                "loss": line["loss"],
                "time_left_s": line["time_left_s"],
                "rows": self.num_rows,
                "tokens": self.num_tokens,
                "starts": self._num_starts,
            }


class _Tee(io.TextIOBase):
    """Writes to a stream and, where its disk isn't full, to a file."""

    def __init__(self, stream: TextIO, file: io.RawIOBase) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        with suppress(OSError):  # Ray's own log of the driver has it
            self._file.write(text.encode())
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextmanager
def logged(run: RunFolder) -> Iterator[None]:
    """Also write what this process prints into the run folder."""
    outer = sys.stdout, sys.stderr
    with run.log.open("ab", buffering=0) as file:
        sys.stdout, sys.stderr = _Tee(outer[0], file), _Tee(outer[1], file)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = outer
