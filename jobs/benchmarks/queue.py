"""``jobs/benchmark.py queue``: a synthetic month under fair share, FIFO and strict priority.

The three get the same trace; FIFO and strict priority backfill too. Then the cost of the policy's
tick, and of the service on a real database, at growing numbers of jobs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine, load_warning
from benchmarks.queue_measures import (
    Fairness,
    Floats,
    LateJob,
    hourly_utilisation,
    ideal_delays,
    late_jobs,
    measure_fairness,
    used_while_wanted,
    utilisation,
)
from benchmarks.queue_service import measure_service
from benchmarks.queue_simulation import Decide, Record, Simulation
from benchmarks.queue_tick import measure_ticks
from benchmarks.queue_trace import HOUR, Trace, build_trace
from s2ft_ray.scheduler.policy import decide
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import Plan, Snapshot, TenantView

SIZES = (1, 2, 4, 8)
# The month's database lies in memory where it can: a hundred thousand commits wait for no disk.
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Result:
    """One policy's month."""

    name: str
    record: Record
    fairness: Fairness
    utilisation: float
    used_while_wanted: float
    hourly: Floats


def run(arguments: argparse.Namespace) -> None:
    """Simulate, measure, print."""
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning, flush=True)
    document: dict[str, Any] = {"machine": machine, "warning": warning}
    if "month" in arguments.parts:
        trace = build_trace(arguments.days, arguments.tenants, arguments.nodes, seed=arguments.seed)
        document["month"] = simulate(trace, arguments.figure)
    if "tick" in arguments.parts:
        _tell("ticks")
        document["ticks"] = list(measure_ticks(arguments.queued))
        print("\n" + render_ticks(document["ticks"]), flush=True)
    if "service" in arguments.parts:
        _tell("the service on SQLite")
        document["service"] = [measure_service(queued) for queued in arguments.queued]
        print("\n" + render_service(document["service"]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def simulate(trace: Trace, figure: str | None) -> dict[str, Any]:
    """Run the three policies over a trace and print their tables."""
    work_s = sum(job.work_s for job in trace.jobs)
    print(
        f"\n{len(trace.jobs):,} jobs of {len(trace.tenants)} tenants in"
        f" {trace.duration_s / 86400:g} days on {trace.num_workers} workers: demand"
        f" {work_s / trace.num_workers / trace.duration_s:.2f}, largest job"
        f" {max(job.work_s for job in trace.jobs) / trace.num_workers / 86400:.1%} of a day's"
        f" capacity, longest {max(it.work_s / it.sizes[0] for it in trace.jobs) / HOUR:.1f} h",
        flush=True,
    )
    results = []
    policies: dict[str, Decide] = {
        "fair share": decide,
        "FIFO": _as_one_tenant(with_priority=False),
        "strict priority": _as_one_tenant(with_priority=True),
    }
    for name, policy in policies.items():
        _tell(f"a month under {name}")
        record = _simulate(trace, policy)
        hourly = hourly_utilisation(trace, record)
        fairness = measure_fairness(trace, record)
        used = used_while_wanted(trace, record)
        results.append(Result(name, record, fairness, utilisation(trace, record), used, hourly))
    if not all(it.fairness.jain.size for it in results):
        raise SystemExit(
            f"--days {trace.duration_s / 86400:g}: in no day several tenants waited all along, so"
            " there is no share to compare; take more days"
        )
    _tell("the ideal fair queue")
    delays = ideal_delays(trace)
    slower = ideal_delays(trace, results[0].used_while_wanted)
    print("\n" + render_summary(trace, results, delays, slower))
    if late := late_jobs(trace, results[0].record, results[0].fairness, delays):
        print("\n" + render_late(late))
    print("\n" + render_waits(results))
    print("\n" + render_tenants(trace, results[0]), flush=True)
    if figure:
        from benchmarks.queue_figure import draw

        draw(Path(figure), trace, results)
    return {result.name: _to_json(trace, result, delays) for result in results}


def _simulate(trace: Trace, policy: Decide) -> Record:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        store = Store(f"sqlite:///{Path(folder) / 'queue.db'}")
        record = Simulation(trace, policy, store).run()
        store.close()
    return record


def _as_one_tenant(with_priority: bool) -> Decide:
    """Return the same policy for one tenant who owns everything: first come, first served."""

    def decide_for_one(snapshot: Snapshot, now: float) -> Plan:
        jobs = [
            replace(job, tenant="all", priority=job.priority if with_priority else 0)
            for job in snapshot.jobs
        ]
        return decide(replace(snapshot, jobs=jobs, tenants=[TenantView("all")]), now)

    return decide_for_one


def render_summary(
    trace: Trace, results: list[Result], delays: dict[str, float], slower: dict[str, float]
) -> str:
    """Return the table of what is promised, a column a policy.

    `slower` are the delays of an ideal queue that has no more workers than were in use under the
    first policy while jobs waited.
    """
    fifo = results[1].utilisation
    work_s = sum(job.work_s for job in trace.jobs)
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("utilisation", lambda it: f"{it.utilisation:.4f}"),
        ("utilisation / FIFO (at least 0.98)", lambda it: f"{it.utilisation / fifo:.4f}"),
        ("tenant-days of waiting all day", lambda it: f"{len(it.fairness.off_capacity)}"),
        ("Jain's index, mean", lambda it: f"{it.fairness.jain.mean():.3f}"),
        ("Jain's index, lowest day", lambda it: f"{it.fairness.jain.min():.3f}"),
        (
            "below its entitlement, of a day's capacity: p95 / worst (at most 5%)",
            lambda it: _spread(-it.fairness.off_capacity),
        ),
        (
            "above its entitlement, of a day's capacity: p95 / worst (at most 5%)",
            lambda it: _spread(it.fairness.off_capacity),
        ),
        (
            "off its entitlement, as a part of it: p50 / p95 / worst",
            lambda it: _spread(np.abs(it.fairness.off_entitlement), 50),
        ),
        (
            "tenant's largest job, of its day's entitlement, p50",
            lambda it: f"{np.median(it.fairness.granularity):.0%}",
        ),
        (
            "jobs over twice the ideal wait + longest (0)",
            lambda it: _count(late_jobs(trace, it.record, it.fairness, delays)),
        ),
        (
            f"the same with {results[0].used_while_wanted:.1%} of the workers, as fair share used",
            lambda it: _count(late_jobs(trace, it.record, it.fairness, slower)),
        ),
        ("preemptions", lambda it: f"{it.record.num_preemptions}"),
        ("resizes", lambda it: f"{it.record.num_resizes}"),
        (
            "worker time lost to stops (under 1%)",
            lambda it: f"{it.record.lost_to_stops_s / work_s:.3%}",
        ),
        (
            "worker time lost to failures",
            lambda it: f"{it.record.lost_to_failures_s / work_s:.3%} ({it.record.num_failures})",
        ),
    ]
    lines = ["| | " + " | ".join(it.name for it in results) + " |", "|---|" + "--:|" * len(results)]
    lines += [f"| {name} | " + " | ".join(map(cell, results)) + " |" for name, cell in rows]
    return "\n".join(lines)


def _spread(off: Floats, *quantiles: float) -> str:
    values = [*np.percentile(np.maximum(off, 0.0), [*quantiles, 95]), off.max()]
    return " / ".join(f"{value:.1%}" for value in values)


def _count(late: list[LateJob]) -> str:
    return f"{len(late)}, worst by {late[0].beyond_s / HOUR:.1f} h" if late else "0"


def render_late(late: list[LateJob]) -> str:
    """Return the jobs that waited too long, and what their tenants had got before."""
    lines = [
        "| late job of | submitted, day | waited h | ideal h | beyond h"
        " | tenant's surplus of the day before, worker-h |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for it in late:
        lines.append(
            f"| {it.job.tenant} | {it.job.submitted_at / 86400:.1f} | {it.waited_s / HOUR:.1f}"
            f" | {it.ideal_s / HOUR:.1f} | {it.beyond_s / HOUR:.1f} | {it.surplus_h:+.0f} |"
        )
    return "\n".join(lines)


def render_waits(results: list[Result]) -> str:
    """Return the waits by size of the gang."""
    lines = [
        "| workers | jobs | " + " | ".join(f"{it.name}: wait p50 / p99 h" for it in results) + " |",
        "|---|--:|" + "--:|" * len(results),
    ]
    for size in SIZES:
        cells = []
        for result in results:
            waits = [it.waited_s for it in result.record.jobs.values() if it.spec.sizes[-1] == size]
            cells.append(_waits(waits))
        lines.append(f"| {size} | {len(waits):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _waits(waits_s: list[float]) -> str:
    p50, p99 = np.percentile(np.array(waits_s) / HOUR, [50, 99])
    return f"{p50:.1f} / {p99:.1f}"


def render_tenants(trace: Trace, result: Result) -> str:
    """Return each tenant's share of the days in which it waited all along, and its waits."""
    lines = [
        f"| {result.name}: tenant | weight | quota | limit | full days waiting"
        " | got, worker-h a day | entitled | got / entitled | wait p50 / p99 h |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tenant in trace.tenants:
        mine = [it.waited_s for it in result.record.jobs.values() if it.spec.tenant == tenant.name]
        days, got, due = result.fairness.by_tenant.get(tenant.name, (0, 0.0, 0.0))
        share = f"{got:.1f} | {due:.1f} | {got / due:.3f}" if days else " | | "
        limit = tenant.max_workers or ""
        lines.append(
            f"| {tenant.name} | {tenant.weight:g} | {tenant.quota or ''} | {limit}"
            f" | {days / 24:.1f} | {share} | {_waits(mine)} |"
        )
    return "\n".join(lines)


def render_ticks(ticks: list[dict[str, float]]) -> str:
    """Return the cost of one decision as it grows."""
    lines = [
        "| queued | running | tenants | nodes | tick ms | worst ms | estimates ms |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for it in ticks:
        aim = " (under 100)" if it["queued"] == 10_000 else ""
        lines.append(
            f"| {it['queued']:,} | {it['running']:,} | {it['tenants']} | {it['nodes']}"
            f" | {it['tick_ms']:.1f}{aim} | {it['worst_ms']:.1f} | {it['estimates_ms']:.0f} |"
        )
    return "\n".join(lines)


def render_service(measured: list[dict[str, float]]) -> str:
    """Return what the service answers in, on a real database."""
    lines = [
        "| queued | submit p50 / p99 ms (under 20) | page of 100 p50 / p99 ms (under 20)"
        " | heartbeat p99 ms | whole tick ms |",
        "|--:|--:|--:|--:|--:|",
    ]
    for it in measured:
        lines.append(
            f"| {it['queued']:,} | {it['submit_p50_ms']:.1f} / {it['submit_p99_ms']:.1f}"
            f" | {it['page_p50_ms']:.1f} / {it['page_p99_ms']:.1f}"
            f" | {it['heartbeat_p99_ms']:.2f} | {it['tick_ms']:.0f} |"
        )
    return "\n".join(lines)


def _to_json(trace: Trace, result: Result, delays: dict[str, float]) -> dict[str, Any]:
    record, fairness = result.record, result.fairness
    late = late_jobs(trace, record, fairness, delays)
    return {
        "utilisation": result.utilisation,
        "jain_mean": float(fairness.jain.mean()),
        "off_capacity_worst": float(np.abs(fairness.off_capacity).max()),
        "off_entitlement_worst": float(np.abs(fairness.off_entitlement).max()),
        "by_tenant": fairness.by_tenant,
        "used_while_wanted": result.used_while_wanted,
        "late_jobs": len(late),
        "latest_beyond_s": late[0].beyond_s if late else 0.0,
        "preemptions": record.num_preemptions,
        "resizes": record.num_resizes,
        "failures": record.num_failures,
        "lost_to_stops_s": record.lost_to_stops_s,
        "waits_s": {name: job.waited_s for name, job in record.jobs.items()},
    }


def _tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)
