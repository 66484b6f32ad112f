"""The job's command line, and the stages of a run, which can each be run again.

    plan      check the configuration, base, data and parent; encode the data      (plan)
    train     workers under Ray Train, until the run folder holds the adapter      (launch)
    register  the adapter as a version of <tenant>.<name> in MLflow                (registry)

Invariant: what a stage made is in the run folder before the next one starts, so that whoever goes
on with the run does only what is missing. The driver is glue: it imports Ray, holds no weights.
"""

import argparse
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft_ray.config import ParallelConfig, RunConfig, load_config, parse_config
from s2ft_ray.errors import (
    CheckpointError,
    ConfigError,
    JobError,
    Preempted,
    RegistryUnreachable,
    S2FTError,
    UnknownJob,
)
from s2ft_ray.finetune.inputs import expected_rows, settle
from s2ft_ray.training.progress import ProgressPrinter
from s2ft_ray.training.run_folder import RunFolder, create_run_folder, find_run_folder

if TYPE_CHECKING:
    from s2ft_ray.finetune.attempt import Attempt
    from s2ft_ray.registry import RegisteredVersion, TrackedRun
    from s2ft_ray.scheduler.client import QueueClient
    from s2ft_ray.training.plan import RunPlan

# Ray, torch and MLflow take seconds to import, so what needs them imports them: a mistake in the
# command or the configuration is told at once, and a driver that waits its turn stays small.

MLFLOW_TIMEOUT_S = 30.0


def main(argv: list[str] | None = None) -> int:
    """Run the job that the command line names; return its exit code."""
    args = _build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("s2ft_ray").setLevel(logging.INFO)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        return _run(args)
    except S2FTError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return error.exit_code


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune", description="Fine-tune a base model into a registered S2FT adapter."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="the run, a YAML file")
    what.add_argument("--resume", metavar="RUN", help="go on with a run: its id or its folder")
    what.add_argument("--job", metavar="ID", help="drive a job of the queue that was admitted")
    what.add_argument("--follow", metavar="ID", help="tell what becomes of a job of the queue")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as optim.lr=1e-3"
    )
    parser.add_argument(
        "--profile", action="store_true", help="leave a torch trace of three steps of each worker"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
    parser.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="of a tenant's active jobs one has a key; default: name and digest of the run",
    )
    for option, verb in (("--queue-timeout", "wait"), ("--run-timeout", "run")):
        parser.add_argument(
            option, type=float, metavar="SECONDS", help=f"the job fails if it has to {verb} longer"
        )
    parser.add_argument("--attempt", type=int, metavar="N", help="of the job that --job names")
    return parser


def _run(args: argparse.Namespace) -> int:
    overrides = [*args.set, *["tracking.profile=true"] * args.profile]
    if overrides and not args.config:
        raise ConfigError("--set and --profile change what --config names; leave them out")
    if args.job:
        return _drive(args.job, args.attempt)
    if args.follow:
        return _follow(args.follow)
    if args.resume:
        return _resume(find_run_folder(args.resume))
    config = load_config(args.config, overrides)
    if args.dry_run:
        print(_plan(config).describe(), flush=True)
        return 0
    queue = _join_queue()
    if queue is not None:
        return _enqueue(queue, settle(config), args)
    plan = _plan(settle(config))
    print(plan.describe(), flush=True)
    _join_cluster(plan.config)
    _tell(finish_run(create_run(plan)))
    return 0


# The doors


def _join_queue() -> "QueueClient | None":
    """Join the cluster that RAY_ADDRESS names; return its queue where it has one."""
    if not os.environ.get("RAY_ADDRESS"):
        return None
    _init_ray()
    from s2ft_ray.scheduler.client import QueueClient

    return QueueClient.find()


def _enqueue(queue: "QueueClient", config: RunConfig, args: argparse.Namespace) -> int:
    """Queue the run, wait for its turn, and train it.

    Where the queue takes the workers away, or tries again after a failure, another driver goes
    on with the job, and this process tells what becomes of it.
    """
    from s2ft_ray.finetune.attempt import Attempt
    from s2ft_ray.finetune.waiting import become_follower, driver_id, wait

    driver = driver_id()
    job = queue.submit(
        config.to_document(),
        idempotency_key=args.idempotency_key,
        driver_id=driver,
        num_rows=expected_rows(config),
        queue_timeout_s=args.queue_timeout,
        run_timeout_s=args.run_timeout,
    )
    claim = wait(queue, job, driver, config)
    if isinstance(claim, int):
        return claim
    attempt = Attempt(queue, claim)
    try:
        _train(attempt)
    except S2FTError as error:
        goes_on = queue.job(claim.job_id)["finished_at"] is None
        if goes_on:
            note = f"job {claim.job_id} goes on by itself; s2ft cancel {claim.job_id} ends it"
            print(note, file=sys.stderr, flush=True)
        if not goes_on or (isinstance(error, Preempted) and not attempt.was_asked):
            raise  # the job is at its end, or this process was told to be
        for fault in error.faults:
            print(f"note: {fault}", file=sys.stderr, flush=True)
        become_follower(claim.job_id)
    return 0


def _drive(job_id: str, attempt: int | None) -> int:
    """Drive an attempt that the scheduler launched this process for."""
    from s2ft_ray.finetune.attempt import Attempt, Claim
    from s2ft_ray.finetune.waiting import driver_id

    queue = _join_queue()
    if queue is None:
        raise ConfigError(f"--job {job_id}: the cluster at RAY_ADDRESS has no queue")
    answer = queue.claim(job_id, driver_id())
    if answer is None or attempt not in (None, answer["attempt"]):
        raise JobError(f"job {job_id}: attempt {attempt} is not to be driven here (any more)")
    _train(Attempt(queue, Claim.of(job_id, answer)))
    return 0


def _follow(job_id: str) -> int:
    from s2ft_ray.finetune.waiting import follow

    queue = _join_queue()
    if queue is None:
        raise ConfigError(f"--follow {job_id}: the cluster at RAY_ADDRESS has no queue")
    return follow(queue, job_id)


def _resume(run: RunFolder) -> int:
    """Go on with a run outside of the queue, which must not be working on it."""
    queue = _join_queue()
    if queue is not None:
        _refuse_active(queue, run.run_id)
    config = run.load_config()
    if not run.is_trained:  # to register takes no workers
        _join_cluster(config)
    _tell(finish_run(run))
    return 0


def _refuse_active(queue: "QueueClient", job_id: str) -> None:
    from s2ft_ray.scheduler.intake import FAILS_AGAIN

    try:
        job = queue.job(job_id)
    except UnknownJob:
        return  # a run that never was a job of this queue
    if job["state"] == "failed" and job["reason"] not in FAILS_AGAIN:
        raise ConfigError(
            f"--resume {job_id}: the queue has this run, which failed; `s2ft resume {job_id}` lets"
            " it go on there"
        )
    if job["finished_at"] is None:
        raise ConfigError(
            f"--resume {job_id}: the queue has this run, {job['state']}; it goes on by itself, and"
            f" `s2ft resume {job_id}` lets it where it is paused"
        )


def _train(attempt: "Attempt") -> None:
    """Do what the attempt's run still lacks, and tell the queue how it ended."""
    from s2ft_ray.finetune.attempt import logged

    claim = attempt.claim
    with attempt:
        config = parse_config(claim.config, source=f"job {claim.job_id}")
        if not _is_created(claim.run):
            shutil.rmtree(claim.run.path, ignore_errors=True)  # an attempt died while making it
            plan = _plan(config)
            print(plan.describe(), flush=True)
            create_run(plan, claim.job_id)
        workers = config.parallel.model_copy(update={"num_workers": claim.num_workers})
        with logged(claim.run):
            version = finish_run(claim.run, workers, attempt)
            attempt.succeed(version.name, str(version.version))
            _tell(version)


# The stages


def _plan(config: RunConfig) -> "RunPlan":
    from s2ft_ray.training.plan import plan_run

    return plan_run(config)


def _init_ray(**options: Any) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)


def _start_ray() -> None:
    """Start a Ray for this process alone.

    Its processes are told where it is asked: Train's watcher of a placement group looks for that by
    itself, and fails where other Rays are on the machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    _init_ray(address="local", dashboard_port=port)


def _join_cluster(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one for this process; see it has room."""
    from s2ft_ray.training.launch import check_room

    if os.environ.get("RAY_ADDRESS"):
        _init_ray()
    else:
        _start_ray()
    check_room(config.parallel)


def create_run(plan: "RunPlan", run_id: str | None = None) -> RunFolder:
    """Make the run's folder with all that its workers read; the data's report comes last.

    Raises ConfigError or CheckpointError where the storage can't be written.
    """
    run = create_run_folder(plan.config, run_id)
    try:
        if plan.parent:
            plan.parent.adapter.save(run.parent)
            run.write_json("lineage.json", dict(plan.parent.tags))
        for number, it in enumerate(plan.avoided):
            it.adapter.save(run.avoided / str(number))
        if plan.avoided:
            run.write_json("lineage.json", {"avoids": ", ".join(map(str, plan.avoided))})
        plan.data.save(run.data)
    except OSError as error:
        raise CheckpointError(
            f"{run.path}: {error.strerror or error}; make room there, or name another"
            " checkpoint.storage_path"
        ) from error
    return run


def _is_created(run: RunFolder) -> bool:
    return (run.data / "report.json").exists()


def finish_run(
    run: RunFolder,
    parallel: ParallelConfig | None = None,
    attempt: "Attempt | None" = None,
) -> "RegisteredVersion":
    """Do what the run still lacks: train, then register. Repeating it changes nothing.

    `parallel` is what the run gets, where that isn't what its configuration says. An attempt
    that the queue has given up registers nothing: StaleAttempt is raised.
    """
    from s2ft_ray.data import PreparedData
    from s2ft_ray.method import Adapter
    from s2ft_ray.registry import TrackedRun, register_adapter
    from s2ft_ray.training.launch import train_with_ray

    config = run.load_config()
    print(f"run         {run.run_id} in {run.path}", flush=True)
    tags = {**(run.read_json("lineage.json") or {}), "job": run.run_id}
    with TrackedRun.start(config, run_folder=run.path, tags=tags) as tracked:
        tracked.record_data(PreparedData.load(run.data).report)
        if not run.is_trained:
            with ProgressPrinter(run.metrics):
                train_with_ray(run, parallel or config.parallel)
            if config.tracking.profile:
                print(f"trace       {run.profile}, for Perfetto or chrome://tracing", flush=True)
        if attempt is not None:
            attempt.check()
        adapter = Adapter.load(run.adapter)
        print(f"adapter     {adapter.fingerprint} in {run.adapter}", flush=True)
        tracked.record_adapter(adapter, Adapter.load(run.parent) if run.parent.exists() else None)
        return register_adapter(
            run.adapter,
            config,
            mlflow_run_id=_reach(tracked),
            tags=tags,
            metrics=tracked.last_values("eval"),
        )


def _reach(tracked: "TrackedRun") -> str:
    """Wait for the MLflow run to exist: the version is registered under it."""
    tracked.flush(MLFLOW_TIMEOUT_S)
    if tracked.run_id is None:
        raise RegistryUnreachable(
            f"MLflow could not be reached within {MLFLOW_TIMEOUT_S:.0f} s: the adapter is trained"
            " but not registered; --resume registers it"
        )
    return tracked.run_id


def _tell(version: "RegisteredVersion") -> None:
    print(f"registered {version.name} version {version.version} as @{version.alias}", flush=True)
