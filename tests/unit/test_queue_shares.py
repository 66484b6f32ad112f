from dataclasses import replace

import pytest
from queue_worlds import CPU, NOW, node, queued, running, world

from s2ft_ray.scheduler.policy import (
    Measurement,
    decide,
    expected_duration_s,
    expected_starts,
    never_fits,
)
from s2ft_ray.scheduler.policy.shares import Standings
from s2ft_ray.scheduler.views import PolicySettings, TenantView, Usage, WorkerShape

HALF_LIFE_S = PolicySettings().half_life_s


def used(seconds: float, at: float = NOW) -> Usage:
    return Usage({"CPU": seconds}, at=at)


# Usage


def test_past_use_halves_with_each_half_life() -> None:
    tenants = (TenantView("acme", usage=Usage({"CPU": 800.0}, entry={"CPU": 8.0}, at=NOW)),)
    usage = decide(world(tenants=tenants), NOW + 2 * HALF_LIFE_S).usages["acme"]
    assert usage.amounts == pytest.approx({"CPU": 200.0})
    assert usage.entry == {"CPU": pytest.approx(2.0)}
    assert usage.at == NOW + 2 * HALF_LIFE_S


def test_running_work_is_added_since_the_last_look_or_the_start() -> None:
    tenants = (TenantView("acme", usage=used(0.0, at=NOW - 10)),)
    jobs = [running("long", workers=2), running("new", started_at=NOW - 4)]
    usage = decide(world(*jobs, tenants=tenants), NOW).usages["acme"]
    assert usage.amounts == pytest.approx({"CPU": 2 * 10 + 1 * 4})


def test_a_clock_that_goes_backwards_changes_no_usage() -> None:
    tenants = (TenantView("acme", usage=used(100.0)),)
    usage = decide(world(running("r"), tenants=tenants), NOW - 500).usages["acme"]
    assert usage == used(100.0)


def test_who_used_less_comes_first_in_the_measure_of_its_weight() -> None:
    tenants = (
        TenantView("a", weight=1, usage=used(1000.0)),
        TenantView("b", weight=2, usage=used(1800.0)),
        TenantView("c", weight=1, usage=used(990.0)),
    )
    jobs = [queued(name, name) for name in "abc"]
    plan = decide(world(running("r", "d", 4), *jobs, tenants=tenants), NOW)
    assert list(plan.waits) == ["b", "c", "a"]


def test_work_that_is_still_to_be_done_counts_from_the_start() -> None:
    tenants = (TenantView("a", usage=used(0.0)), TenantView("b", usage=used(0.0)))
    jobs = [
        running("long", "a", left_s=9000.0),
        running("short", "b", left_s=100.0),
        running("rest", "c", workers=2),
        queued("qa", "a"),
        queued("qb", "b"),
    ]
    assert list(decide(world(*jobs, tenants=tenants), NOW).waits) == ["qb", "qa"]


def test_a_newcomer_starts_level_with_those_who_wait_not_ahead_of_them() -> None:
    tenants = (
        TenantView("a", usage=used(4000.0)),
        TenantView("b", usage=used(8000.0)),
        TenantView("idle", usage=used(0.0, at=NOW - 5)),
        TenantView("new"),
    )
    busy = running("r", "other", workers=4)
    first = decide(world(busy, queued("qa", "a"), queued("qb", "b"), tenants=tenants), NOW)
    assert first.usages["idle"].entry == {"CPU": pytest.approx(4000.0)}  # as a's
    assert first.usages["a"].entry == first.usages["b"].entry == {}
    jobs = [queued(f"{name}{i}", name, time_left_s=600.0) for name in ("a", "new") for i in (0, 1)]
    waits = decide(world(busy, *jobs, tenants=tenants), NOW).waits
    assert list(waits) == ["a0", "new0", "a1", "new1"]


def test_nodes_that_are_away_for_a_moment_leave_no_larger_penalty() -> None:
    jobs = [running("r", "other", workers=4), queued("qa", "a"), queued("qi", "idle")]
    tenants = (TenantView("a", usage=used(4000.0)), TenantView("idle"))
    usages = {}
    for slots in (8, 1, 8):
        plan = decide(world(*jobs[:2], tenants=tenants, slots=slots), NOW)
        tenants = tuple(replace(it, usage=plan.usages[it.name]) for it in tenants)
        usages[slots] = plan.usages["idle"]
    assert usages[8].entry == {"CPU": pytest.approx(4000.0)}
    whole = Standings(world(slots=8).nodes, tenants, {it.name: it.usage for it in tenants})
    assert whole.of["idle"].level == pytest.approx(whole.of["a"].level)


# Estimates


def measured(rows: int, seconds: float, tenant: str = "acme", base: str = "tiny") -> Measurement:
    return Measurement(tenant, base, CPU, rows, seconds, startup_s=20.0)


def test_a_duration_comes_from_the_tenants_own_measurements_where_there_are_any() -> None:
    seen = [measured(100, 50.0, "zeta"), measured(100, 200.0), measured(10, 10.0, base="large")]
    assert expected_duration_s("acme", "tiny", CPU, 1000, 2, seen) == 20 + 2.0 * 1000 / 2
    assert expected_duration_s("new", "tiny", CPU, 1000, 1, seen) == 20 + 1.25 * 1000
    assert expected_duration_s("acme", "huge", CPU, 1000, 1, seen) is None


def test_starts_follow_the_order_and_the_ends_of_what_runs() -> None:
    jobs = [
        running("r1", workers=3, left_s=100.0),
        running("r2", left_s=1000.0),
        queued("first", workers=2, time_left_s=500.0, submitted_at=NOW - 3),
        queued("second", workers=2, time_left_s=50.0, submitted_at=NOW - 2),
        queued("never", workers=9, submitted_at=NOW - 1),
    ]
    assert expected_starts(world(*jobs), NOW) == {"first": NOW + 100, "second": NOW + 600}
    assert expected_starts(world(*jobs, draining=True), NOW) == {}


def test_a_tenants_limit_delays_its_own_starts_alone() -> None:
    tenants = (TenantView("acme", max_workers=1),)
    jobs = [
        running("r", left_s=700.0),
        queued("mine", submitted_at=NOW - 9),
        queued("over", workers=2),
        queued("other", "zeta"),
    ]
    starts = expected_starts(world(*jobs, tenants=tenants), NOW)
    assert starts == {"mine": NOW + 700, "other": NOW}


def test_a_gang_that_never_fits_is_told_what_there_is() -> None:
    assert never_fits([node(4)], CPU, 4) is None
    message = never_fits([node(4, "a"), node(4, "b")], WorkerShape.of({"CPU": 3, "GPU": 1}), 2)
    assert message is not None
    assert "2 x (3 CPU, 1 GPU) don't fit" in message
    assert "8 CPU, 0 GPU, room for 0 such workers" in message
