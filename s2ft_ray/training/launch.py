"""Ray glue: workers of a run under Ray Train, and whether the cluster can ever hold them."""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from s2ft_ray.config import ParallelConfig
from s2ft_ray.errors import ConfigError, JobError, S2FTError
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.worker import run_worker

# A worker group that dies is started again from the newest checkpoint so often; a fault of the
# run itself is no dead group and is never tried again.
MAX_WORKER_FAILURES = 3
# Ray waits 60 s for the workers' resources, then tries again: together half an hour.
MAX_START_FAILURES = 30

RAY_TRAIN_SETTINGS = {
    # How soon the end of the workers is seen: 2 s by default, much of a short run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # An actor beside each run that watches for node drains, which nothing here acts on.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def check_room(parallel: ParallelConfig) -> None:
    """Refuse a worker group that this cluster can never hold, saying what it has.

    Raises ConfigError. Ray itself would wait for ever.
    """
    count, each = _num_workers(parallel), _resources(parallel)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(
        min(int(node.get(name, 0) // amount) for name, amount in each.items()) for node in nodes
    )
    if places < count:
        asked = ", ".join(f"{name} {amount:g}" for name, amount in each.items())
        has = "; ".join(
            ", ".join(f"{name} {node.get(name, 0):g}" for name in each) for node in nodes
        )
        raise ConfigError(
            f"parallel.num_workers: {count} workers of {asked} never fit: the cluster has"
            f" {len(nodes)} node(s) with {has}: room for {places}; lower num_workers or"
            " resources_per_worker, or add nodes"
        )


def train_with_ray(run: RunFolder, parallel: ParallelConfig) -> None:
    """Train the run under Ray Train until its adapter is saved.

    A killed worker restarts the group from the newest checkpoint. Raises the run's own error
    (bad data, divergence, a full disk), or JobError where the workers were lost too often.
    """
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    attempt = 1 + len(list(run.path.glob("ray/attempt-*")))
    trainer = TorchTrainer(
        _worker_entry,
        train_loop_config={
            "run_folder": str(run.path),
            "num_threads": max(1, int(_resources(parallel).get("CPU", 1))),
        },
        scaling_config=ScalingConfig(
            num_workers=_num_workers(parallel),
            use_gpu=parallel.use_gpu,
            resources_per_worker=_resources(parallel),
        ),
        torch_config=TorchConfig(backend="nccl" if parallel.use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=MAX_START_FAILURES
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        fault = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _explain(error) from error
    if fault is not None:
        raise fault


def _worker_entry(settings: dict[str, Any]) -> S2FTError | None:
    """Run one worker; return the run's own fault as a value, so that Ray doesn't try again."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("s2ft_ray").setLevel(logging.INFO)
    try:
        run_worker(Path(settings["run_folder"]), get_device(), settings["num_threads"])
    except S2FTError as error:
        return error
    return None


def _explain(error: TrainingFailedError) -> S2FTError:
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, cause = next(iter(sorted(error.worker_failures.items())))
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        return JobError(
            f"worker {rank} failed {MAX_WORKER_FAILURES + 1} times, last with: {lines[-1]};"
            " its log has the traceback; --resume goes on from the newest checkpoint"
        )
    return JobError(f"Ray Train gave up: {' '.join(str(error).split())}")


def _num_workers(parallel: ParallelConfig) -> int:
    """A range starts at its upper end here: without a queue nobody else wants the room."""
    workers = parallel.num_workers
    return workers if isinstance(workers, int) else workers[1]


def _resources(parallel: ParallelConfig) -> dict[str, float]:
    each = dict(parallel.resources_per_worker)
    if parallel.use_gpu:
        each.setdefault("GPU", 1)
    return each
