"""submit, jobs, job, logs, cancel, pause, resume, priority, drain, usage: the queue, for people."""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft_ray.cli.clients import become_client
from s2ft_ray.cli.table import print_table
from s2ft_ray.errors import JobError, NodeError

if TYPE_CHECKING:
    from s2ft_ray.scheduler.client import QueueClient
    from s2ft_ray.training.run_folder import RunFolder

_WATCH_S = 1.0
_FOLLOW_S = 0.5
_CLEAR = "\x1b[H\x1b[2J"
_SPANS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_STATES = ("queued", "starting", "running", "preempting", "succeeded", "failed", "cancelled")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    _add_submit(commands)
    _add_jobs(commands)
    for name, text, run in (
        ("job", "the whole story of a job: where it is and why, its events", _job),
        ("cancel", "end a job, whatever it does; one that has ended stays as it is", _cancel),
        ("pause", "hold a job back; one that runs stops at its next step", _pause),
        ("resume", "let a paused or failed job go on", _resume),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", metavar="ID")
        _add_json(command)
        command.set_defaults(run=run)
    command = commands.add_parser("logs", help="what a job's drivers printed")
    command.add_argument("job", metavar="ID")
    command.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    command.set_defaults(run=_logs)
    command = commands.add_parser("priority", help="change the priority of a job")
    command.add_argument("job", metavar="ID")
    command.add_argument("priority", type=int, metavar="P")
    _add_json(command)
    command.set_defaults(run=_priority)
    command = commands.add_parser("drain", help="start no more jobs, for maintenance")
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--stop", action="store_true", help="stop what runs at its next step, and let it wait"
    )
    how.add_argument("--end", action="store_true", help="end the drain: start jobs again")
    command.set_defaults(run=_drain)
    command = commands.add_parser("usage", help="what tenants were given")
    command.add_argument("--tenant", metavar="T", help="of this tenant only")
    command.add_argument(
        "--since", type=_time, default=0.0, metavar="D", help="a date, or a span as 12h or 7d"
    )
    command.add_argument("--by-job", action="store_true", help="a line for each job")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the same facts for a program")
    form.add_argument("--csv", action="store_true", help="the same facts for a spreadsheet")
    command.set_defaults(run=_usage)


def _add_submit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("submit", help="queue a fine-tune; the scheduler starts it")
    command.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="a value of the configuration, e.g. optim.lr=1e-3; may be repeated",
    )
    command.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="of a tenant's active jobs one has a key; default: name and digest of the run",
    )
    for option, what in (("--queue-timeout", "wait"), ("--run-timeout", "run")):
        command.add_argument(
            option,
            type=_seconds,
            metavar="SECONDS",
            help=f"the job fails if it has to {what} longer",
        )
    _add_json(command)
    command.set_defaults(run=_submit)


def _add_jobs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("jobs", help="the queue: what waits and why, what runs, what ran")
    command.add_argument("--tenant", metavar="T", help="of this tenant only")
    command.add_argument(
        "--state", action="append", default=[], choices=_STATES, help="in this state only; or"
    )
    command.add_argument(
        "--limit", type=_count, default=100, metavar="N", help="so many, newest first"
    )
    command.add_argument("--after", metavar="ID", help="the page after this job")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--watch", action="store_true", help="show it again every second")
    form.add_argument("--json", action="store_true", help="the same facts for a program")
    command.set_defaults(run=_jobs)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the same facts for a program")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _time(text: str) -> float:
    """Read a date and time (ISO 8601, UTC unless it says otherwise), or a span until now."""
    if text[-1:] in _SPANS and text[:-1].replace(".", "", 1).isdigit():
        span = timedelta(seconds=float(text[:-1]) * _SPANS[text[-1]])
        return (datetime.now(UTC) - span).timestamp()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a date as 2026-01-31 nor a span as 12h or 7d"
        ) from None
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()


def connect() -> "QueueClient":
    """Return the queue of the cluster that the shell names, else of this home's node.

    Nothing may have imported Ray before: it reads its environment then.
    """
    become_client()
    import logging

    import ray
    from ray._private import worker as ray_worker

    from s2ft_ray.scheduler.client import QueueClient

    # Ray tells every client of its cluster's warnings, whatever log_to_driver says, on stdout: in
    # the middle of what a program reads. They are in the cluster's logs.
    ray_worker.print_to_stdstream = lambda *_, **__: None
    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise NodeError(f"Ray at {address} can't be joined: {line}; is it up?") from error
    queue = QueueClient.find()
    if queue is None:
        raise NodeError(f"the cluster at {address} has no scheduler; s2ft up starts it")
    return queue


def _submit(args: argparse.Namespace) -> int:
    from s2ft_ray.config import load_config
    from s2ft_ray.finetune.inputs import expected_rows, settle

    config = settle(load_config(args.config, args.overrides))
    job = connect().submit(
        config.to_document(),
        idempotency_key=args.idempotency_key,
        num_rows=expected_rows(config),
        queue_timeout_s=args.queue_timeout,
        run_timeout_s=args.run_timeout,
    )
    if args.json:
        print(json.dumps(job, indent=2))
        return 0
    note = "" if job["is_new"] else "  (it was queued before, and is not queued again)"
    print(f"{job['id']}  {job['state']}{note}")
    return 0


def _jobs(args: argparse.Namespace) -> int:
    queue = connect()

    def ask() -> list[dict[str, Any]]:
        return queue.jobs(args.tenant, args.state, args.limit, args.after)

    if args.json:
        print(json.dumps(ask(), indent=2))
        return 0
    if not args.watch:
        print_jobs(ask())
        return 0
    clear = _CLEAR if sys.stdout.isatty() else "\n"
    while True:
        jobs = ask()
        print(f"{clear}{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {len(jobs)} jobs", flush=True)
        print_jobs(jobs)
        time.sleep(_WATCH_S)


def print_jobs(jobs: Sequence[dict[str, Any]]) -> None:
    """Print jobs, as the scheduler answers them, as a table."""
    from s2ft_ray.finetune.waiting import describe

    rows = [
        (
            job["id"],
            job["tenant"],
            job["name"],
            job["state"],
            str(job["priority"]),
            str(job["attempt"]),
            str(job["num_workers"] or "-"),
            describe(job),
        )
        for job in jobs
    ]
    print_table(("ID", "TENANT", "NAME", "STATE", "PRIO", "TRY", "WORKERS", "DETAIL"), rows)


def _job(args: argparse.Namespace) -> int:
    job = connect().job(args.job)
    if args.json:
        print(json.dumps(job, indent=2))
        return 0
    from s2ft_ray.finetune.waiting import describe

    print(f"{job['id']}  {job['tenant']}.{job['name']}  {job['state']}: {describe(job)}")
    for key in ("priority", "attempt", "num_workers", "created_at", "started_at", "finished_at"):
        if job[key] is not None:
            print(f"{key:<12}{job[key]}")
    for node_id, count in job["placement"].items():
        print(f"{'node':<12}{node_id}: {count} worker(s)")
    print(f"{'run':<12}{_run_folder(job).path}\n")
    rows = [
        (it["at"], str(it["attempt"]), it["state"], it["cause"], it["detail"] or "")
        for it in job["events"]
    ]
    print_table(("TIME", "TRY", "STATE", "CAUSE", "DETAIL"), rows)
    return 0


def _run_folder(job: dict[str, Any]) -> "RunFolder":
    from s2ft_ray.training.run_folder import RunFolder

    root = Path(job["config"]["checkpoint"]["storage_path"])
    return RunFolder(root / job["tenant"] / job["name"] / job["id"])


def _logs(args: argparse.Namespace) -> int:
    queue = connect()
    job = queue.job(args.job)
    path = _run_folder(job).log
    if not path.exists() and not args.follow:
        raise JobError(f"job {args.job}: {job['state']}, nothing is printed yet; -f waits for it")
    offset = 0
    while True:
        ended = job["finished_at"] is not None  # asked before reading: nothing comes after
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(offset)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                offset = file.tell()
        if ended or not args.follow:
            return 0
        time.sleep(_FOLLOW_S)
        job = queue.job(args.job)


def _cancel(args: argparse.Namespace) -> int:
    return _change(args, lambda queue: queue.cancel(args.job))


def _pause(args: argparse.Namespace) -> int:
    return _change(args, lambda queue: queue.pause(args.job))


def _resume(args: argparse.Namespace) -> int:
    return _change(args, lambda queue: queue.resume(args.job))


def _priority(args: argparse.Namespace) -> int:
    return _change(args, lambda queue: queue.set_priority(args.job, args.priority))


def _change(args: argparse.Namespace, change: "Callable[[QueueClient], dict[str, Any]]") -> int:
    queue = connect()
    had_ended = queue.job(args.job)["finished_at"] is not None
    job = change(queue)
    if had_ended and job["finished_at"] is not None:
        print(f"job {args.job} has ended: nothing is changed", file=sys.stderr)
    if args.json:
        print(json.dumps(job, indent=2))
    else:
        reason = f": {job['reason']}" if job["reason"] else ""
        print(f"{job['id']}  {job['state']}{reason}")
    return 0


def _drain(args: argparse.Namespace) -> int:
    queue = connect()
    queue.drain(not args.end, args.stop)
    holding = queue.jobs(states=("starting", "running", "preempting"))
    if args.end:
        print("jobs are started again")
    else:
        print(f"nothing is started any more; {len(holding)} jobs hold workers")
    return 0


def _usage(args: argparse.Namespace) -> int:
    rows = connect().usage(args.tenant, args.since, args.by_job)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    resources = sorted({name for row in rows for name in row["worker_seconds"]} - {"workers"})
    header = ["tenant", *(["job"] if args.by_job else ["jobs"]), "worker_s"]
    header += [f"{name}_s" for name in resources] + ["tokens", "queue_wait_s"]
    table = [
        [
            row["tenant"],
            row["job"] if args.by_job else str(row["num_jobs"]),
            f"{row['worker_seconds'].get('workers', 0):.1f}",
            *(f"{row['worker_seconds'].get(name, 0):.1f}" for name in resources),
            str(row["tokens"]),
            f"{row['queue_wait_s']:.1f}",
        ]
        for row in rows
    ]
    if args.csv:
        csv.writer(sys.stdout).writerows([header, *table])
    else:
        print_table([name.upper().replace("_", " ") for name in header], table)
    return 0
