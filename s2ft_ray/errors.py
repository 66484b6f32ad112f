"""Every error that the package raises on purpose.

    S2FTError
    ├── ConfigError      (ValueError)    a run's or a method's configuration
    ├── DataError        (ValueError)    a data file or a row in it
    ├── AdapterError     (ValueError)    an adapter, its files, or the base it meets
    ├── CheckpointError  (RuntimeError)  a checkpoint that can't be written, read or trusted
    ├── JobError         (RuntimeError)  a run that can't go on
    │   ├── StaleAttempt                 a report of an attempt that the queue has given up
    │   ├── UnknownJob                   an id that the queue never gave
    │   ├── Diverged                     a loss that is not finite
    │   ├── OutOfMemory, WorkersLost     what ended the workers
    │   └── RegistryUnreachable          MLflow, which is away, full or broken
    ├── Preempted                        a run that stopped because it was asked to
    ├── ServingError     (RuntimeError)  a request or an engine that can't be served
    └── NodeError        (RuntimeError)  a service of this machine that can't be started or ended

An error is made of its faults, one line each: ``ConfigError("optim.lr: ...", "data.train: ...")``.
The faults are the exception's ``args``, so each error survives pickling (Ray moves them between
processes) and prints as its lines. A fault names the value, the limit and the way out. An error
knows the exit code of a command that ends with it: 2 for what the user wrote or can mend (input,
storage), 3 for a run that was asked to stop and can go on, 1 for the rest.
"""


class S2FTError(Exception):
    """The root: ``except S2FTError`` catches whatever this package raises on purpose."""

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)

    @property
    def faults(self) -> tuple[str, ...]:
        """The faults, one clear line each, in the order in which they were found."""
        return tuple(str(fault) for fault in self.args)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class ConfigError(S2FTError, ValueError):
    """A configuration that can't be run: what the user wrote is at fault."""

    exit_code = 2


class DataError(S2FTError, ValueError):
    """A data file or row that can't be trained on; names file and line."""

    exit_code = 2


class AdapterError(S2FTError, ValueError):
    """An adapter that is damaged, foreign, or doesn't fit the model it meets."""

    exit_code = 2


class CheckpointError(S2FTError, RuntimeError):
    """A checkpoint that can't be written, read back or trusted."""

    exit_code = 2


class JobError(S2FTError, RuntimeError):
    """A run that had to stop: divergence, lost workers, resources that never come."""


class StaleAttempt(JobError):  # noqa: N818 - what happened, in the queue's words
    """A report of an attempt that the queue has given up: the job went on without it."""

    def __init__(self, job_id: str, attempt: int, now: str) -> None:
        super().__init__(f"job {job_id}: attempt {attempt} is not the current one any more: {now}")
        self._parts = (job_id, attempt, now)

    def __reduce__(self) -> tuple[type["StaleAttempt"], tuple[str, int, str]]:
        return type(self), self._parts


class UnknownJob(JobError):  # noqa: N818 - what is wrong
    """An id that the queue never gave to a job."""

    exit_code = 2


class Diverged(JobError):  # noqa: N818 - what happened
    """A loss or a gradient that is not finite: it would be so again."""


class OutOfMemory(JobError):  # noqa: N818 - what happened
    """Workers that ended for lack of memory."""


class WorkersLost(JobError):  # noqa: N818 - what happened
    """Workers that died more often than a run is started again by itself."""


class NodeLost(WorkersLost):
    """Workers that died with their node."""


class RegistryUnreachable(JobError):  # noqa: N818 - what happened
    """MLflow can't be reached, or can't do what it is asked: a full disk, a locked database."""


class Preempted(S2FTError):  # noqa: N818 - an outcome, no error
    """A run that was asked to stop and did, at `step`, with its checkpoint saved: no failure."""

    exit_code = 3

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}, checkpoint saved; --resume goes on")
        self.step = step

    def __reduce__(self) -> tuple[type["Preempted"], tuple[int]]:
        return type(self), (self.step,)


class ServingError(S2FTError, RuntimeError):
    """A request or an engine that can't be served."""


class NodeError(S2FTError, RuntimeError):
    """A service of this machine (Ray, MLflow) that can't be started or ended."""
