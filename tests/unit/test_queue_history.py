"""The policy's invariants over random snapshots, and over whole histories of random queues."""

import importlib
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queue_worlds import NOW

from s2ft_ray.scheduler.models import State
from s2ft_ray.scheduler.policy import decide
from s2ft_ray.scheduler.policy.backfill import Release
from s2ft_ray.scheduler.policy.decision import build_world
from s2ft_ray.scheduler.policy.order import effective_priority
from s2ft_ray.scheduler.policy.placement import Room
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.views import (
    Admit,
    JobView,
    NodeView,
    Plan,
    PolicySettings,
    Snapshot,
    TenantView,
    WorkerShape,
)

# S2FT_LONG=1 looks at many more.
EXAMPLES = 3000 if os.environ.get("S2FT_LONG") else 60
HISTORIES = 200 if os.environ.get("S2FT_LONG") else 2
SHAPES = [WorkerShape.of({"CPU": 1}), WorkerShape.of({"CPU": 2}), WorkerShape.of({"GPU": 1})]
NODES = [NodeView("a", {"CPU": 4.0, "GPU": 2.0}), NodeView("b", {"CPU": 6.0})]
TENANTS = ["red", "green", "blue"]

queued_jobs = st.builds(
    JobView,
    id=st.just(""),
    tenant=st.sampled_from(TENANTS),
    state=st.just("queued"),
    worker=st.sampled_from(SHAPES),
    sizes=st.sampled_from([(1,), (2,), (3,), (1, 2, 4), (9,)]),
    submitted_at=st.floats(NOW - 1e4, NOW),
    priority=st.integers(0, 3),
    time_left_s=st.floats(1, 1e4),
    num_preemptions=st.integers(0, 2),
)
tenants = st.tuples(
    *(
        st.builds(
            TenantView,
            st.just(name),
            weight=st.sampled_from([0.5, 1.0, 4.0]),
            quota=st.integers(0, 4),
            max_workers=st.none() | st.integers(1, 6),
            priority_cap=st.none() | st.integers(0, 2),
        )
        for name in TENANTS
    )
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Jobs that the policy itself admitted and that have run for a while, and others that wait."""
    who = draw(tenants)
    waiting = draw(st.lists(queued_jobs, max_size=8))
    first = [replace(job, id=f"r{number}") for number, job in enumerate(waiting)]
    running = []
    for it in decide(Snapshot(first, who, NODES), NOW - 3600).admissions:
        job = next(job for job in first if job.id == it.job_id)
        ran = draw(st.booleans())
        running.append(
            replace(
                job,
                state="running",
                num_workers=it.num_workers,
                placement=it.placement,
                started_at=NOW - (3600 if ran else 10),
                time_left_s=draw(st.floats(0, 1e4)),
                progress_lost_s=draw(st.floats(0, 600)),
            )
        )
    later = draw(st.lists(queued_jobs, max_size=10))
    queued = [replace(job, id=f"q{number}") for number, job in enumerate(later)]
    return Snapshot([*running, *queued], who, NODES, settings=PolicySettings(grow_after_s=60.0))


def check(snapshot: Snapshot, plan: Plan, now: float) -> None:
    """What must hold of every plan."""
    jobs = {job.id: job for job in snapshot.jobs}
    queued = {job.id for job in snapshot.jobs if job.state == "queued"}
    admitted = [it.job_id for it in plan.admissions]
    assert len(set(admitted)) == len(admitted)
    assert set(admitted) | set(plan.waits) == queued
    assert not set(admitted) & set(plan.waits)
    assert [wait.position for wait in plan.waits.values()] == list(range(1, len(plan.waits) + 1))
    placements = build_world(snapshot, now)
    used: dict[str, dict[str, float]] = {node.id: defaultdict(float) for node in snapshot.nodes}
    held: dict[str, int] = defaultdict(int)
    resized = {it.job_id: it for it in plan.resizes}
    for holder in placements.holders:
        job, placement = holder.job, holder.placement
        workers = job.held_workers
        if job.id in resized and resized[job.id].num_workers > workers:
            placement, workers = resized[job.id].placement, resized[job.id].num_workers
        held[job.tenant] += workers
        _add(used, job.worker, placement)
    for it in plan.admissions:
        assert it.num_workers == jobs[it.job_id].min_workers == sum(it.placement.values())
        held[jobs[it.job_id].tenant] += it.num_workers
        _add(used, jobs[it.job_id].worker, it.placement)
    for node in snapshot.nodes:
        for name, amount in used[node.id].items():
            assert amount <= node.total.get(name, 0.0) + 1e-6, "over a node"
    for tenant in snapshot.tenants:
        if tenant.max_workers is not None:
            assert held[tenant.name] <= tenant.max_workers, "over a limit"
    _check_stops(snapshot, plan, jobs, now)


def _add(
    used: dict[str, dict[str, float]], shape: WorkerShape, placement: Mapping[str, int]
) -> None:
    for node_id, count in placement.items():
        for name, amount in shape.resources:
            used[node_id][name] += amount * count


def _check_stops(snapshot: Snapshot, plan: Plan, jobs: dict[str, JobView], now: float) -> None:
    claims = {tenant.name: tenant for tenant in snapshot.tenants}
    stopped = [it.job_id for it in plan.preemptions] + [it.job_id for it in plan.resizes]
    assert len(set(stopped)) == len(stopped)
    for it in plan.preemptions:
        victim, winner = jobs[it.job_id], jobs[it.for_job_id]
        assert winner.state == "queued"
        near_end_s = snapshot.settings.near_end_s
        assert victim.time_left_s is None or victim.time_left_s >= near_end_s
        if it.cause == "priority":  # may stop what is only starting, too
            assert victim.state in ("starting", "running")
            assert effective_priority(winner, claims[winner.tenant]) > effective_priority(
                victim, claims[victim.tenant]
            )
        else:
            assert victim.state == "running"
            assert victim.started_at is not None
            assert now - victim.started_at >= snapshot.settings.min_run_s
            assert winner.min_workers <= claims[winner.tenant].quota


@settings(max_examples=EXAMPLES, deadline=None)
@given(snapshots())
def test_no_plan_passes_a_node_a_limit_or_a_gang(snapshot: Snapshot) -> None:
    check(snapshot, decide(snapshot, NOW), NOW)


@settings(max_examples=EXAMPLES, deadline=None)
@given(snapshots())
def test_no_victim_may_stop_in_its_turn_what_it_was_stopped_for(snapshot: Snapshot) -> None:
    plan = decide(snapshot, NOW)
    for it in plan.preemptions:
        victim = next(job for job in snapshot.jobs if job.id == it.job_id)
        winner = next(job for job in snapshot.jobs if job.id == it.for_job_id)
        gone = {other.job_id for other in plan.preemptions}
        others = [job for job in snapshot.jobs if job.state == "running" and job.id not in gone]
        back = replace(
            victim, state="queued", num_workers=0, placement={}, started_at=None, num_preemptions=3
        )
        runs = replace(
            winner,
            state="running",
            num_workers=winner.min_workers,
            started_at=NOW,
            time_left_s=1e5,
        )
        then = NOW + 1000
        turned = decide(replace(snapshot, jobs=[*others, runs, back]), then)
        assert (winner.id, victim.id) not in [
            (stop.job_id, stop.for_job_id) for stop in turned.preemptions
        ]


@settings(max_examples=EXAMPLES, deadline=None)
@given(snapshots())
def test_given_right_estimates_backfill_doesnt_delay_the_first_that_waits(
    snapshot: Snapshot,
) -> None:
    plan = decide(snapshot, NOW)
    head = next((it for it in plan.waits.values() if it.cause == "workers"), None)
    if head is None:
        return
    order = list(decide(replace(snapshot, draining=True), NOW).waits)
    ahead = set(order[: order.index(head.job_id)])
    first = next(job for job in snapshot.jobs if job.id == head.job_id)
    before = _starts_at(snapshot, first, [it for it in plan.admissions if it.job_id in ahead])
    assert _starts_at(snapshot, first, list(plan.admissions)) <= before


def _starts_at(snapshot: Snapshot, job: JobView, admissions: list[Admit]) -> float:
    """When a gang fits if nobody else is admitted: an oracle of its own."""
    jobs = {it.id: it for it in snapshot.jobs}
    world = build_world(snapshot, NOW)
    room = Room(snapshot.nodes)
    releases = []
    for holder in world.holders:
        room.take(holder.job.worker, holder.placement)
        end = NOW + (holder.job.time_left_s or 0.0)
        releases.append(Release(end, holder.job.worker, holder.placement))
    for it in admissions:
        room.take(jobs[it.job_id].worker, it.placement)
        end = NOW + (jobs[it.job_id].time_left_s or 0.0)
        releases.append(Release(end, jobs[it.job_id].worker, it.placement))
    at = NOW
    for release in sorted(releases, key=lambda release: release.at):
        if room.count(job.worker) >= job.min_workers:
            break
        room.give(release.shape, release.placement)
        at = release.at
    return at


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "jobs")
    return importlib.import_module("benchmarks.queue_simulation")


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_every_job_of_a_history_ends_and_every_plan_in_it_holds(
    simulation: ModuleType, tmp_path: Path, seed: int
) -> None:
    trace = importlib.import_module("benchmarks.queue_trace").build_trace(
        days=1.5, num_tenants=5, num_nodes=2, mean_hours=1.0, demand=1.2, seed=seed
    )

    def checked(snapshot: Snapshot, now: float) -> Plan:
        plan = decide(snapshot, now)
        check(snapshot, plan, now)
        return plan

    store = Store(f"sqlite:///{tmp_path / 'queue.db'}")
    run = simulation.Simulation(trace, checked, store, failures_per_worker_hour=1 / 50, seed=seed)
    record = run.run()
    ends = {store.job(job_id).state for job_id in record.jobs}
    store.close()
    assert ends == {State.SUCCEEDED}
    assert record.num_failures > 0
