"""The main job: from a configuration to a registered adapter, in stages that can be run again.

    plan      check the configuration, base, data and parent; encode the data      (plan)
    train     workers under Ray Train, until the run folder holds the adapter      (launch)
    register  the adapter as a version of <tenant>.<name> in MLflow                (registry)

Invariant: what a stage made is in the run folder before the next one starts, so that
``--resume RUN`` does only what is missing. The driver is glue: it imports Ray, holds no weights.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from s2ft_ray.config import RunConfig, load_config
from s2ft_ray.errors import ConfigError, JobError, S2FTError
from s2ft_ray.training.progress import ProgressPrinter
from s2ft_ray.training.run_folder import RunFolder, create_run_folder, find_run_folder

if TYPE_CHECKING:
    from s2ft_ray.registry import RegisteredVersion, TrackedRun
    from s2ft_ray.training.plan import RunPlan

# Ray, torch and MLflow take seconds to import, so what needs them imports them: a mistake in the
# command or the configuration is told at once.

MLFLOW_TIMEOUT_S = 30.0


def main(argv: list[str] | None = None) -> int:
    """Run the job that the command line names; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune", description="Fine-tune a base model into a registered S2FT adapter."
    )
    parser.add_argument("--config", type=Path, help="the run, a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as optim.lr=1e-3"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run: its id or its folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("s2ft_ray").setLevel(logging.INFO)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        if args.resume:
            if args.config or args.set:
                raise ConfigError(
                    "--resume goes on with the run as it was; leave --config and --set out"
                )
            run = find_run_folder(args.resume)
            _join_cluster(run.load_config())
        elif args.config:
            plan = _plan(load_config(args.config, args.set))
            print(plan.describe(), flush=True)
            if args.dry_run:
                return 0
            _join_cluster(plan.config)
            run = create_run(plan)
        else:
            raise ConfigError("--config FILE or --resume RUN is required")
        version = finish_run(run)
    except S2FTError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"registered {version.name} version {version.version} as @{version.alias}", flush=True)
    return 0


def _plan(config: RunConfig) -> "RunPlan":
    from s2ft_ray.training.plan import plan_run

    return plan_run(config)


def _join_cluster(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one for this process; see it has room."""
    import ray

    from s2ft_ray.training.launch import check_room

    if not ray.is_initialized():
        address = None if os.environ.get("RAY_ADDRESS") else "local"
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
    check_room(config.parallel)


def create_run(plan: "RunPlan") -> RunFolder:
    """Make the run's folder with all that its workers read."""
    run = create_run_folder(plan.config)
    plan.data.save(run.data)
    if plan.parent:
        plan.parent.adapter.save(run.parent)
        run.write_json("lineage.json", dict(plan.parent.tags))
    return run


def finish_run(run: RunFolder) -> "RegisteredVersion":
    """Do what the run still lacks: train, then register. Repeating it changes nothing."""
    from s2ft_ray.data import PreparedData
    from s2ft_ray.method import Adapter
    from s2ft_ray.registry import TrackedRun, register_adapter
    from s2ft_ray.training.launch import train_with_ray

    config = run.load_config()
    print(f"run         {run.run_id} in {run.path}", flush=True)
    tags = {**(run.read_json("lineage.json") or {}), "job": run.run_id}
    with TrackedRun.start(config, run_folder=run.path, tags=tags) as tracked:
        tracked.record_data(PreparedData.load(run.data).report)
        if not run.adapter.exists():
            with ProgressPrinter(run.metrics):
                train_with_ray(run, config.parallel)
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
        raise JobError(
            f"MLflow could not be reached within {MLFLOW_TIMEOUT_S:.0f} s: the adapter is trained"
            " but not registered; --resume registers it"
        )
    return tracked.run_id
