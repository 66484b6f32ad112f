"""Ray glue: workers of a run under Ray Train, and whether the cluster can ever hold them."""

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from s2ft_ray.config import ParallelConfig
from s2ft_ray.errors import (
    ConfigError,
    JobError,
    NodeLost,
    OutOfMemory,
    Preempted,
    S2FTError,
    WorkersLost,
)
from s2ft_ray.training.rendezvous import NodeNetworkConfig
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.worker import run_worker

logger = logging.getLogger(__name__)

# A worker group that dies is started again from the newest checkpoint so often; a fault of the
# run itself is no dead group and is never tried again.
MAX_WORKER_FAILURES = 3
# Ray waits 60 s for the workers' resources, then tries again: together half an hour.
MAX_START_FAILURES = 30

# A process or node that is gone. Ray Train's controller gives up at once where it meets that
# between two looks at its workers: as the group starts, or as it is ended. It isn't started again
# here: its placement group may outlive it, and is given back with this process's job alone.
_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

RAY_TRAIN_SETTINGS = {
    # How soon the end of the workers is seen: 2 s by default, much of a short run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How soon a node's drain is seen: 5 s by default, and a spot node may be gone in 30.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


# torch's own, of CUDA and the CPU's allocator, and Ray's, which kills when a node runs short.
_OUT_OF_MEMORY = re.compile(r"OutOfMemory|out of memory|can't allocate memory|memory pressure")


def check_room(parallel: ParallelConfig) -> None:
    """Refuse a worker group that this cluster can never hold, saying what it has.

    Raises ConfigError. Ray itself would wait for ever.
    """
    count, each = _fewest(parallel), _resources(parallel)
    nodes = _nodes(parallel)
    places = _count_places(parallel)
    if places < count:
        asked = ", ".join(f"{name} {amount:g}" for name, amount in each.items())
        has = "; ".join(
            ", ".join(f"{name} {node.get(name, 0):g}" for name in each) for node in nodes
        )
        raise ConfigError(
            f"parallel.num_workers: {count} workers of {asked} never fit: the cluster has"
            f" {len(nodes)} node(s){_carrying(parallel)} with {has}: room for {places}; lower"
            " num_workers or resources_per_worker, or add nodes"
        )


def train_with_ray(run: RunFolder, parallel: ParallelConfig) -> None:
    """Train the run under Ray Train until its adapter is saved.

    A killed worker restarts the group from the newest checkpoint. Where Ray drains a node, the
    workers save and leave it, and the run goes on at once where the other nodes have room.
    Raises Preempted when they haven't, or the run was asked to stop (``RunFolder.request_stop``,
    SIGTERM or SIGINT to this process), and its checkpoint is saved; the run's own error (bad data,
    divergence, a full disk); or JobError where the workers were lost too often. A request to stop
    from before is cleared.
    """
    run.clear_stop()
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    with _stopped_by_signals(run):
        while (fault := _fit(run, parallel)) is not None:
            if not isinstance(fault, Preempted) or run.is_stop_requested():
                raise fault
            if _count_places(parallel) < _fewest(parallel):
                logger.warning("a node is being drained, and the others have no room")
                raise fault
            logger.warning("a node is being drained: from step %d on the others", fault.step)


def _fit(run: RunFolder, parallel: ParallelConfig) -> S2FTError | None:
    """Train under one Ray Train controller; return the run's own fault."""
    attempt = 1 + len(list(run.path.glob("ray/attempt-*")))
    trainer = _Trainer(
        _worker_entry,
        train_loop_config={
            "run_folder": str(run.path),
            "num_threads": max(1, int(_resources(parallel).get("CPU", 1))),
        },
        scaling_config=ScalingConfig(
            num_workers=_num_workers(parallel),
            use_gpu=parallel.use_gpu,
            resources_per_worker=_resources(parallel),
            label_selector=parallel.labels_per_worker or None,
        ),
        torch_config=NodeNetworkConfig(backend="nccl" if parallel.use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_START_FAILURES
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    nodes = _alive_nodes()
    try:
        fault: S2FTError | None = trainer.fit().return_value
    except (TrainingFailedError, *_GONE) as error:
        raise _explain(error, nodes - _alive_nodes()) from error
    return fault


@contextmanager
def _stopped_by_signals(run: RunFolder) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT to this process ask the run to stop; the second ends it.

    `ray job stop` sends SIGTERM, and kills after RAY_JOB_STOP_WAIT_TIME_S (3 s by default).
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: object) -> None:
        restore()
        run.request_stop(signal.Signals(number).name)

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, without its own way with Ctrl-C, which aborts the workers at once."""

    def _register_sigint_handler(self, controller: object) -> None:
        """Leave the signal to `_stopped_by_signals`."""


def _worker_entry(settings: dict[str, Any]) -> S2FTError | None:
    """Run one worker; return the run's own fault as a value, so that Ray doesn't try again."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("s2ft_ray").setLevel(logging.INFO)
    try:
        run_worker(
            Path(settings["run_folder"]),
            get_device(),
            settings["num_threads"],
            _is_draining,
            ray.get_runtime_context().get_node_id(),
        )
    except S2FTError as error:
        return error
    return None


def _is_draining() -> bool:
    """Return whether Ray has told this worker that a node of the group will be taken away.

    Looked up where Ray's watcher puts it: ``ray.train.get_preemption_info`` is a barrier of all
    workers through an actor, and this is asked at every step. The workers agree by themselves.
    """
    return get_train_context().preemption_context.preemption_info is not None


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _explain(error: Exception, lost_nodes: set[str]) -> S2FTError:
    lost = NodeLost if lost_nodes else WorkersLost
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, cause = next(iter(sorted(error.worker_failures.items())))
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        died = OutOfMemory if _OUT_OF_MEMORY.search(str(cause)) else lost
        return died(
            f"worker {rank} failed {MAX_WORKER_FAILURES + 1} times, last with: {lines[-1]};"
            f"{_name(lost_nodes)} its log has the traceback; --resume goes on from the newest"
            " checkpoint"
        )
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = f"Ray Train gave up: {lines[-1]}; the job's log has the traceback"
    if isinstance(cause, _GONE):
        return lost(f"{told};{_name(lost_nodes)} --resume goes on from the newest checkpoint")
    return JobError(told)


def _name(lost_nodes: set[str]) -> str:
    return f" lost nodes: {', '.join(sorted(lost_nodes))};" if lost_nodes else ""


def _fewest(parallel: ParallelConfig) -> int:
    workers = parallel.num_workers
    return workers if isinstance(workers, int) else workers[0]


def _num_workers(parallel: ParallelConfig) -> int:
    """Return a fixed number, or of a range the most that the cluster holds.

    A range comes here only without a queue. It never reaches Ray Train, which would resize the
    group by itself.
    """
    workers = parallel.num_workers
    if isinstance(workers, int):
        return workers
    return max(workers[0], min(workers[1], _count_places(parallel)))


def _nodes(parallel: ParallelConfig) -> list[dict[str, float]]:
    """Return what each node has that a worker may be on and that isn't being drained."""
    draining, wanted = ray_state.get_draining_nodes(), parallel.labels_per_worker.items()
    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in draining
        and wanted <= node.get("Labels", {}).items()
    ]


def _carrying(parallel: ParallelConfig) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in parallel.labels_per_worker.items())
    return f" carrying {labels}" if labels else ""


def _count_places(parallel: ParallelConfig) -> int:
    """Return how many workers the whole cluster holds."""
    each = _resources(parallel)
    return sum(
        min(int(node.get(name, 0) // amount) for name, amount in each.items())
        for node in _nodes(parallel)
    )


def _resources(parallel: ParallelConfig) -> dict[str, float]:
    each = dict(parallel.resources_per_worker)
    if parallel.use_gpu:
        each.setdefault("GPU", 1)
    return each
