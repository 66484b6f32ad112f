from collections import Counter
from dataclasses import replace

from queue_worlds import CPU, NOW, node, queued, running, world

from s2ft_ray.scheduler.policy import decide
from s2ft_ray.scheduler.views import (
    NodeView,
    Plan,
    PolicySettings,
    Snapshot,
    TenantView,
    WorkerShape,
)


def admitted(plan: Plan) -> list[str]:
    return [admission.job_id for admission in plan.admissions]


def causes(plan: Plan) -> dict[str, str]:
    return {name: wait.cause for name, wait in plan.waits.items()}


# Gangs


def test_a_gang_starts_whole_or_not_at_all() -> None:
    plan = decide(world(running("r", workers=2), queued("big", workers=3)), NOW)
    assert admitted(plan) == []
    assert plan.waits["big"].cause == "workers"
    assert plan.waits["big"].lacks == "needs 3 x (1 CPU), room for 2 now"


def test_a_gang_goes_to_the_node_that_it_leaves_least_of() -> None:
    nodes = [node(8, "large"), node(3, "small"), node(4, "middle")]
    plan = decide(world(queued("a", workers=3), nodes=nodes), NOW)
    assert plan.admissions[0].placement == {"small": 3}


def test_a_gang_that_no_node_holds_spans_nodes_in_whole_workers() -> None:
    shape = WorkerShape.of({"CPU": 2})
    nodes = [node(3, "a"), node(5, "b"), node(3, "c")]
    plan = decide(world(queued("wide", workers=4, worker=shape), nodes=nodes), NOW)
    assert plan.admissions[0].placement == {"b": 2, "a": 1, "c": 1}
    plan = decide(world(queued("wide", workers=5, worker=shape), nodes=nodes), NOW)
    assert causes(plan) == {"wide": "too large"}  # 11 CPUs, but room for 4 workers of 2


def test_labels_bind_a_worker_to_its_nodes() -> None:
    shape = WorkerShape.of({"CPU": 1}, {"zone": "b"})
    nodes = [node(4, "a", labels={"zone": "a"}), node(1, "b", labels={"zone": "b"})]
    jobs = [queued(name, worker=shape) for name in ("one", "two")]
    plan = decide(world(*jobs, nodes=nodes), NOW)
    assert [dict(admission.placement) for admission in plan.admissions] == [{"b": 1}]


def test_nodes_that_the_autoscaler_may_add_are_used_last() -> None:
    nodes = [node(4, "later", present=False), node(2, "here")]
    plan = decide(world(queued("a", workers=2), queued("b", workers=2), nodes=nodes), NOW)
    assert [dict(it.placement) for it in plan.admissions] == [{"here": 2}, {"later": 2}]


def test_jobs_without_a_known_place_take_room_all_the_same() -> None:
    nodes = [node(2, "a"), node(2, "b")]
    plan = decide(world(running("r", workers=3), queued("q", workers=2), nodes=nodes), NOW)
    assert admitted(plan) == []


def test_workers_of_a_node_that_is_gone_keep_room_on_the_others() -> None:
    lost = running("lost", workers=2, placement={"gone": 1, "n0": 1})
    assert decide(world(lost, queued("small"), slots=2), NOW).admissions == []
    assert len(decide(world(lost, queued("small"), slots=3), NOW).admissions) == 1
    most = running("most", workers=3, placement={"gone": 2, "n0": 1})  # room for one is kept
    assert decide(world(most, queued("small"), slots=2), NOW).admissions == []
    grown = [node(1), node(2, "gpu-1"), node(2, "gpu/1", present=False)]  # it came as gpu-1
    came = running("came", workers=2, placement={"gpu/0": 2})
    plan = decide(world(came, queued("next", workers=2), nodes=grown), NOW)
    assert [it.placement for it in plan.admissions] == [{"gpu/1": 2}]


# Order


def test_priority_comes_first_then_share_then_age() -> None:
    jobs = [
        queued("old", "acme", submitted_at=NOW - 900),
        queued("young", "acme", submitted_at=NOW - 100),
        queued("other", "zeta", submitted_at=NOW - 50),
        queued("urgent", "acme", priority=5, submitted_at=NOW - 1),
    ]
    busy = running("r", "acme", workers=4)
    plan = decide(world(busy, *jobs), NOW)
    assert list(plan.waits) == ["urgent", "other", "old", "young"]
    assert [wait.position for wait in plan.waits.values()] == [1, 2, 3, 4]
    assert [wait.ahead for wait in plan.waits.values()] == [None, "urgent", "other", "old"]


def test_a_priority_above_the_cap_counts_as_the_cap() -> None:
    tenants = (TenantView("acme", priority_cap=0), TenantView("zeta", priority_cap=0))
    jobs = [
        queued("loud", "acme", priority=100, submitted_at=NOW - 1),
        queued("first", "zeta", submitted_at=NOW - 9),
    ]
    plan = decide(world(*jobs, running("r", "third", 4), tenants=tenants), NOW)
    assert list(plan.waits) == ["first", "loud"]


def test_a_job_that_was_stopped_stands_at_the_front_of_its_class() -> None:
    jobs = [queued("old", submitted_at=NOW - 999), queued("stopped", num_preemptions=1)]
    plan = decide(world(running("r", workers=4), *jobs), NOW)
    assert list(plan.waits) == ["stopped", "old"]


def test_workers_are_dealt_out_by_weight() -> None:
    tenants = tuple(TenantView(name, weight) for name, weight in [("a", 1), ("b", 1), ("c", 2)])
    jobs = [queued(f"{name}{i}", name) for name in "abc" for i in range(20)]
    plan = decide(world(*jobs, slots=12, tenants=tenants), NOW)
    assert Counter(name[0] for name in admitted(plan)) == {"a": 3, "b": 3, "c": 6}


def test_shares_are_those_of_the_dominant_resource() -> None:
    nodes = [NodeView("n", {"CPU": 9.0, "memory": 18.0})]
    lean, fat = (WorkerShape.of({"CPU": c, "memory": m}) for c, m in [(1, 4), (3, 1)])
    jobs = [queued(f"lean{i}", "lean", worker=lean) for i in range(9)]
    jobs += [queued(f"fat{i}", "fat", worker=fat) for i in range(9)]
    plan = decide(world(*jobs, nodes=nodes), NOW)
    # The example of the paper on dominant resource fairness: 3 against 2 workers.
    assert Counter(name.rstrip("0123456789") for name in admitted(plan)) == {"lean": 3, "fat": 2}


def test_the_same_snapshot_gives_the_same_plan() -> None:
    jobs = [queued(f"q{i}", f"t{i % 3}", workers=1 + i % 2) for i in range(9)]
    first, second = decide(world(*jobs), NOW), decide(world(*jobs), NOW)
    assert (first.admissions, dict(first.waits)) == (second.admissions, dict(second.waits))


# Limits, pauses


def test_a_limit_is_hard_and_holds_up_nobody_else() -> None:
    tenants = (TenantView("acme", max_workers=2),)
    jobs = [queued("a1", workers=2), queued("a2"), queued("a3"), queued("z", "zeta")]
    plan = decide(world(*jobs, tenants=tenants), NOW)
    assert admitted(plan) == ["a1", "z"]
    assert causes(plan) == {"a2": "limit", "a3": "limit"}


def test_small_jobs_dont_keep_their_tenant_at_its_limit() -> None:
    tenants = (TenantView("acme", max_workers=2),)
    jobs = [running("r"), queued("wide", workers=2, submitted_at=NOW - 500), queued("small")]
    assert causes(decide(world(*jobs, tenants=tenants), NOW)) == {"wide": "limit", "small": "limit"}


def test_a_job_above_cluster_or_limit_is_told_so_and_passed() -> None:
    tenants = (TenantView("zeta", max_workers=1),)
    jobs = [queued("huge", workers=9), queued("over", "zeta", workers=2), queued("fine")]
    plan = decide(world(*jobs, tenants=tenants), NOW)
    assert admitted(plan) == ["fine"]
    assert causes(plan) == {"huge": "too large", "over": "too large"}
    assert "more than the cluster" in plan.waits["huge"].lacks


def test_backoff_is_waited_out() -> None:
    job = queued("q", not_before=NOW + 1)
    assert causes(decide(world(job), NOW)) == {"q": "backoff"}
    assert admitted(decide(world(job), NOW + 1)) == ["q"]


def test_nothing_starts_stops_or_grows_while_the_cluster_drains() -> None:
    elastic = running("r", sizes=(1, 2), left_s=1e6)
    urgent = queued("q", priority=9, workers=4)
    plan = decide(world(elastic, urgent, draining=True), NOW)
    assert causes(plan) == {"q": "drain"}
    assert not plan.admissions
    assert not plan.preemptions
    assert not plan.resizes


# Backfill


def test_a_job_that_ends_in_time_passes_the_one_that_doesnt_fit() -> None:
    jobs = [
        running("r", workers=3, left_s=1000),
        queued("wide", workers=4, submitted_at=NOW - 900),
        queued("long", time_left_s=1500.0),
        queued("unknown", time_left_s=None),
        queued("short", time_left_s=900.0, submitted_at=NOW),
    ]
    plan = decide(world(*jobs), NOW)
    assert admitted(plan) == ["short"]
    assert causes(plan) == {"wide": "workers", "long": "order", "unknown": "order"}


def test_a_long_job_passes_where_it_leaves_room_for_the_one_ahead() -> None:
    jobs = [
        running("r", workers=4, left_s=1000),
        queued("wide", workers=4, submitted_at=NOW - 900),
        queued("long", time_left_s=1e6),
    ]
    assert admitted(decide(world(*jobs, slots=5), NOW)) == ["long"]
    assert admitted(decide(world(*jobs, queued("next", time_left_s=1e6), slots=5), NOW)) == ["long"]


def test_a_wide_job_isnt_starved_by_a_stream_of_small_ones() -> None:
    wide = queued("wide", "acme", workers=4, submitted_at=NOW)
    held = [running(f"s{i}", "flood", left_s=600.0 * (i + 1)) for i in range(4)]
    for minute in range(0, 3000, 10):
        now = NOW + 60 * minute
        held = [replace(job, time_left_s=job.time_left_s - 600) for job in held]
        held = [job for job in held if job.time_left_s > 0]
        stream = [
            queued(f"s{minute}-{i}", "flood", submitted_at=now, time_left_s=2400.0)
            for i in range(4)
        ]
        plan = decide(world(*held, *stream, wide), now)
        if "wide" in admitted(plan):
            break
        held += [running(name, "flood", left_s=2400.0) for name in admitted(plan)]
    assert minute <= 50  # the longest job that ran when it came had 40 minutes left


# Preemption


def test_nobody_is_stopped_for_a_job_that_starts_soon_anyway() -> None:
    jobs = [running("ending", left_s=60.0), running("r", workers=3), queued("urgent", priority=5)]
    assert not decide(world(*jobs), NOW).preemptions


def test_a_higher_priority_stops_the_cheapest_of_the_lowest() -> None:
    jobs = [
        running("dear", progress_lost_s=500.0),
        running("cheap", progress_lost_s=10.0),
        running("important", priority=3, progress_lost_s=0.0),
        running("same", priority=5),
        queued("urgent", "zeta", workers=2, priority=5),
    ]
    assert {it.job_id for it in decide(world(*jobs), NOW).preemptions} == {"cheap", "dear"}
    jobs[-1] = queued("urgent", "zeta", priority=5)
    plan = decide(world(*jobs), NOW)
    assert [(it.job_id, it.for_job_id, it.cause) for it in plan.preemptions] == [
        ("cheap", "urgent", "priority")
    ]


def test_a_job_near_its_end_is_waited_for_and_counts_as_room() -> None:
    jobs = [
        running("dear", progress_lost_s=500.0),
        running("cheap", progress_lost_s=10.0),
        running("rest", priority=5),
        running("ending", left_s=60.0),
        queued("urgent", "zeta", priority=5),
    ]
    assert not decide(world(*jobs), NOW).preemptions
    jobs[-1] = queued("urgent", "zeta", workers=2, priority=5)
    assert [it.job_id for it in decide(world(*jobs), NOW).preemptions] == ["cheap"]


def test_the_room_of_one_that_stops_counts_where_nobody_is_near_its_end() -> None:
    jobs = [
        running("leaving", state="preempting"),
        *(running(f"r{number}", left_s=13.0) for number in range(3)),
        queued("urgent", "zeta", priority=5),
    ]
    never = PolicySettings(near_end_s=0.0)
    assert not decide(world(*jobs, settings=never), NOW).preemptions
    jobs[0] = running("stays", left_s=13.0)
    assert len(decide(world(*jobs, settings=never), NOW).preemptions) == 1


def test_a_job_that_starts_soon_holds_up_nobody_elses_preemption() -> None:
    gpu = WorkerShape.of({"GPU": 1.0})
    nodes = [NodeView("n0", {"CPU": 1.0}), NodeView("n1", {"GPU": 1.0})]
    jobs = [
        running("ending", left_s=60.0, placement={"n0": 1}),
        running("low", worker=gpu, placement={"n1": 1}),
        queued("soon", priority=9),
        queued("urgent", "zeta", worker=gpu, priority=5),
    ]
    plan = decide(Snapshot(jobs, (), nodes), NOW)
    assert [(it.job_id, it.for_job_id) for it in plan.preemptions] == [("low", "urgent")]


def test_no_more_are_stopped_than_the_gang_needs_and_never_in_vain() -> None:
    held = [running(f"r{i}", progress_lost_s=lost) for i, lost in enumerate([0.0, 9.0, 9.0])]
    held.append(running("wide", workers=3, progress_lost_s=1.0))
    plan = decide(world(*held, queued("urgent", workers=3, priority=1), slots=6), NOW)
    assert [it.job_id for it in plan.preemptions] == ["wide"]
    held = [running("r", workers=2), running("same", workers=2, priority=1)]
    assert not decide(world(*held, queued("urgent", workers=3, priority=1)), NOW).preemptions


def test_the_room_of_jobs_that_are_stopping_is_counted_on() -> None:
    jobs = [
        running("leaving", workers=2, state="preempting"),
        running("stays", workers=2),
        queued("urgent", workers=2, priority=1),
        queued("next", workers=2, time_left_s=60.0),
    ]
    plan = decide(world(*jobs), NOW)
    assert not plan.preemptions
    assert not plan.admissions


def test_equal_priorities_stop_nobody() -> None:
    jobs = [running("r", workers=4), queued("q", "zeta", workers=4)]
    assert not decide(world(*jobs), NOW).preemptions


def test_lent_quota_is_reclaimed_and_comes_before_priority() -> None:
    tenants = (TenantView("owner", quota=2), TenantView("guest", quota=2))
    jobs = [
        running("own", "guest", workers=2, started_at=NOW - 5000),
        running("lent", "guest", workers=2, priority=9, started_at=NOW - 4000),
        queued("claim", "owner", workers=2),
        queued("urgent", "guest", priority=50),
    ]
    jobs[0] = replace(jobs[0], priority=9)
    plan = decide(world(*jobs, tenants=tenants), NOW)
    assert next(iter(plan.waits)) == "claim"
    assert ("lent", "claim", "quota") in [
        (it.job_id, it.for_job_id, it.cause) for it in plan.preemptions
    ]
    assert "own" not in [it.job_id for it in plan.preemptions if it.cause == "quota"]


def test_a_job_within_quota_is_stopped_for_its_own_tenant_alone() -> None:
    tenants = (TenantView("owner", quota=4),)
    held = running("own", "owner", workers=4)
    stranger = queued("urgent", "zeta", workers=4, priority=9)
    assert not decide(world(held, stranger, tenants=tenants), NOW).preemptions
    mine = queued("mine", "owner", workers=4, priority=9)
    plan = decide(world(held, mine, tenants=tenants), NOW)
    assert [it.job_id for it in plan.preemptions] == ["own"]


def test_idle_quota_is_lent() -> None:
    tenants = (TenantView("owner", quota=4),)
    assert admitted(decide(world(queued("q", "guest", workers=4), tenants=tenants), NOW)) == ["q"]


# Elastic jobs


def test_an_elastic_job_starts_small_and_grows_when_nobody_waits() -> None:
    job = queued("q", sizes=(1, 2, 4))
    assert decide(world(job), NOW).admissions[0].num_workers == 1
    started = running("q", sizes=(1, 2, 4), left_s=1e5, placement={"n0": 1})
    (resize,) = decide(world(started), NOW).resizes
    assert (resize.num_workers, dict(resize.placement)) == (4, {"n0": 4})
    (resize,) = decide(world(started, running("other")), NOW).resizes
    assert resize.num_workers == 2  # 3 are free, but its batch can't be split over 3
    assert not decide(world(started, queued("wide", workers=4)), NOW).resizes


def test_growing_stops_at_the_tenants_limit_and_near_the_end() -> None:
    tenants = (TenantView("acme", max_workers=2),)
    started = running("q", sizes=(1, 2, 3, 4), left_s=1e5)
    assert decide(world(started, tenants=tenants), NOW).resizes[0].num_workers == 2
    assert not decide(world(replace(started, time_left_s=600.0)), NOW).resizes
    assert not decide(world(replace(started, started_at=NOW - 60)), NOW).resizes


def test_a_grown_job_shrinks_for_the_first_that_waits_instead_of_a_stop() -> None:
    grown = running("e", sizes=(1, 2, 3, 4), num_workers=4, placement={"n0": 3, "n1": 1})
    nodes = [node(3, "n0"), node(1, "n1")]
    plan = decide(world(grown, queued("q", "zeta", priority=1), nodes=nodes), NOW)
    (resize,) = plan.resizes
    assert (resize.num_workers, dict(resize.placement)) == (3, {"n0": 3})
    assert not plan.preemptions


def test_what_a_shrinking_job_gives_back_is_kept_for_the_first() -> None:
    shrinking = running("e", sizes=(1, 4), num_workers=4, next_workers=1, state="preempting")
    jobs = [shrinking, queued("first", workers=3, submitted_at=NOW - 900), queued("second")]
    plan = decide(world(*jobs), NOW)
    assert not plan.resizes
    assert not plan.admissions


def test_a_growing_jobs_workers_are_held_before_it_has_stopped() -> None:
    growing = running("e", sizes=(1, 4), next_workers=4, state="preempting")
    assert not decide(world(growing, queued("q")), NOW).admissions


def test_a_shape_is_the_same_however_it_was_written() -> None:
    assert WorkerShape.of({"GPU": 0, "CPU": 1.0}) == CPU
