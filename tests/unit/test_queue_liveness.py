"""What the scheduler makes of silent drivers, of clocks that jump, and of what comes between."""

from pathlib import Path

import pytest
from queue_parts import Queue, document

from s2ft_ray.errors import ConfigError, StaleAttempt
from s2ft_ray.scheduler import policy
from s2ft_ray.scheduler.accounting import usage
from s2ft_ray.scheduler.views import NodeView, Plan, Snapshot

HOUR_S = 3600.0


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


def test_a_driver_that_ray_doesnt_know_loses_its_workers_after_the_grace_period(
    queue: Queue,
) -> None:
    job_id = queue.submit(driver_id="shell-1")
    queue.tick()
    assert queue.scheduler.claim(job_id, "shell-1") is not None
    queue.beat(job_id, 1)
    queue.scheduler.cancel(job_id)
    queue.tick()
    for passed_s in (queue.settings.service.grace_s - 2, 2.0):
        queue.clock.now += passed_s
        assert queue.beat(job_id, 1) == "stop"
        queue.tick()
    assert queue.state(job_id) == "cancelled"
    with pytest.raises(StaleAttempt):
        queue.beat(job_id, 1)


def test_a_driver_that_hangs_is_ended_and_its_job_tried_again(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    queue.tick(after_s=queue.settings.service.hung_s - 10)
    assert queue.launcher.stops == []
    queue.tick(after_s=20.0)
    assert queue.launcher.stops == [f"{job_id}-1"]
    queue.tick()
    assert "tried again after driver_lost" in queue.causes(job_id)


def test_with_the_clock_put_back_a_dead_driver_is_still_noticed(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    queue.clock.put(-HOUR_S)
    queue.launcher.drivers[f"{job_id}-1"] = "ended"
    queue.tick(after_s=queue.settings.service.quiet_s + 1)
    assert "tried again after driver_lost" in queue.causes(job_id)
    for _ in range(3):  # nor does the pause before the next attempt last an hour
        queue.tick(after_s=5.0)
    assert queue.store.job(job_id).attempt == 2


def test_with_the_clock_put_back_a_waiting_driver_that_is_gone_is_replaced(queue: Queue) -> None:
    job_id = queue.submit(driver_id="driver-1")
    queue.tick()
    queue.clock.put(-HOUR_S)
    queue.tick(after_s=queue.settings.service.claim_s + queue.settings.service.waits_for_s)
    assert queue.launcher.launches == [f"{job_id}-1"]


def test_with_the_clock_put_forward_nobody_is_ended(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    queue.clock.put(HOUR_S)
    queue.tick()
    assert queue.launcher.stops == []
    assert queue.state(job_id) == "running"


def test_a_drain_that_stops_all_stops_a_job_that_is_resized_too(queue: Queue) -> None:
    job_id = queue.submit(workers=[1, 4])
    queue.tick()
    queue.begin(job_id)
    for _ in range(4):
        queue.beat(job_id, 1)
        queue.launcher.drivers[f"{job_id}-1"] = "alive"
        queue.clock.now += 300.0
        progress = {"step": 2, "total_steps": 100, "loss": 1.0, "time_left_s": 9000.0}
        queue.scheduler.heartbeat(job_id, 1, progress)
        queue.tick()
    assert queue.store.job(job_id).next_workers == 4
    queue.scheduler.drain(True, stop_running=True)
    queue.scheduler.report(job_id, 1, {"outcome": "preempted", "step": 2})
    queue.tick()
    assert (queue.state(job_id), queue.store.job(job_id).attempt) == ("queued", 1)


def test_a_paused_job_misses_no_deadline_of_the_queue(queue: Queue) -> None:
    queue.submit("first", workers=4)
    job_id = queue.submit(queue_timeout_s=60.0)
    queue.tick()
    queue.scheduler.pause(job_id)
    queue.tick(after_s=100.0)
    assert queue.state(job_id) == "queued"
    queue.scheduler.resume(job_id)
    queue.tick(after_s=50.0)
    assert queue.state(job_id) == "queued"
    queue.tick(after_s=20.0)
    assert queue.state(job_id) == "failed"


def test_the_time_of_a_pause_is_no_wait(queue: Queue) -> None:
    job_id = queue.submit(tenant="acme")
    queue.scheduler.pause(job_id)
    queue.tick(after_s=HOUR_S)
    queue.scheduler.resume(job_id)
    queue.tick(after_s=5.0)
    (row,) = usage(queue.store.engine, queue.clock() + 1)
    assert row.queue_wait_s == pytest.approx(5.0)


def test_what_an_attempt_trained_counts_though_it_ended_without_a_report(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    told = {"step": 7, "total_steps": 100, "loss": 1.0, "time_left_s": 900.0}
    queue.scheduler.heartbeat(job_id, 1, {**told, "rows": 112, "tokens": 5000})
    queue.launcher.drivers[f"{job_id}-1"] = "ended"
    queue.tick(after_s=queue.settings.service.quiet_s + 1)
    (row,) = usage(queue.store.engine, queue.clock())
    assert row.tokens == 5000
    queue.tick(after_s=20.0)
    queue.begin(job_id, step=8)
    queue.launcher.drivers[f"{job_id}-2"] = "ended"
    queue.tick(after_s=queue.settings.service.quiet_s + 1)
    (row,) = usage(queue.store.engine, queue.clock())
    assert row.tokens == 5000


def test_workers_that_were_started_again_are_an_event(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    told = {"step": 7, "total_steps": 100, "loss": 1.0, "time_left_s": 900.0}
    for starts in (1, 1, 2, 2, 3):
        queue.clock.now += 2.0
        queue.scheduler.heartbeat(job_id, 1, {**told, "starts": starts})
    queue.restart()
    queue.scheduler.heartbeat(job_id, 1, {**told, "starts": 3})
    assert queue.causes(job_id).count("workers started again") == 2


def test_a_job_that_can_never_fit_is_refused_before_the_first_tick_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower num_workers"):
        Queue(tmp_path, slots=2).submit(workers=4)


def test_a_job_submitted_again_while_a_node_is_away_is_the_same_job(queue: Queue) -> None:
    job_id = queue.submit(workers=4)
    queue.tick()
    queue.cluster.views = [NodeView("n0", {"CPU": 1.0})]
    queue.tick()
    again = queue.scheduler.submit(document(workers=4))
    assert (again["id"], again["is_new"]) == (job_id, False)


def test_what_changes_while_a_decision_is_made_is_left_alone(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, cancelled, paused = (queue.submit(name) for name in ("kept", "cancelled", "paused"))
    late: list[str] = []

    def decide_slowly(snapshot: Snapshot, now: float) -> Plan:
        plan = decide(snapshot, now)
        assert {it.job_id for it in plan.admissions} == {kept, cancelled, paused}
        queue.scheduler.cancel(cancelled)
        queue.scheduler.pause(paused)
        late.append(queue.submit("late"))
        return plan

    decide = policy.decide
    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", decide_slowly)
        queue.tick()
    states = [queue.state(it) for it in (kept, cancelled, paused, *late)]
    assert states == ["starting", "cancelled", "queued", "queued"]
    queue.tick()
    assert queue.state(late[0]) == "starting"


def test_a_drain_that_begins_while_a_decision_is_made_holds(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue.submit()
    decide = policy.decide

    def decide_slowly(snapshot: Snapshot, now: float) -> Plan:
        queue.scheduler.drain(True)
        return decide(snapshot, now)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", decide_slowly)
        queue.tick()
    assert queue.state(job_id) == "queued"


def test_the_ledger_follows_the_workers_to_where_ray_put_them(queue: Queue) -> None:
    queue.cluster.views = [NodeView("n0", {"CPU": 2.0}), NodeView("n1", {"CPU": 2.0})]
    job_id = queue.submit(workers=2)
    queue.tick()
    assert queue.store.job(job_id).placement == {"n0": 2}
    queue.scheduler.claim(job_id, f"{job_id}-1")
    queue.scheduler.heartbeat(job_id, 1, placement={"n1": 2})
    queue.scheduler.heartbeat(job_id, 1)  # a driver that has not seen them yet
    queue.restart()
    queue.tick()
    assert queue.cluster.held == {"n1": {"CPU": 2.0}}
    other = queue.submit("other", workers=2)
    queue.tick()
    assert queue.store.job(other).placement == {"n0": 2}


def test_a_job_that_grows_keeps_the_place_of_its_next_size(queue: Queue) -> None:
    job_id = queue.submit(workers=[1, 4])
    queue.tick()
    queue.begin(job_id)
    queue.clock.now += 3600.0
    progress = {"step": 2, "total_steps": 100, "loss": 1.0, "time_left_s": 9000.0}
    queue.launcher.drivers[f"{job_id}-1"] = "alive"
    queue.scheduler.heartbeat(job_id, 1, progress)
    queue.tick()
    assert queue.store.job(job_id).placement == {"n0": 4}
    assert queue.scheduler.heartbeat(job_id, 1, progress, placement={"n0": 1}) == "stop"
    queue.tick()
    assert queue.cluster.held == {"n0": {"CPU": 4.0}}
