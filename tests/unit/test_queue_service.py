from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from queue_parts import Queue, document

from s2ft_ray.errors import ConfigError, JobError, StaleAttempt
from s2ft_ray.scheduler.cluster import still_to_come, without_others
from s2ft_ray.scheduler.settings import NodeGroup
from s2ft_ray.scheduler.views import NodeView

SUCCESS = {"outcome": "succeeded", "model": ["acme.bot", 3], "rows": 1600, "tokens": 9000}


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


# The way through


def test_a_job_is_admitted_launched_driven_and_ends(queue: Queue) -> None:
    job_id = queue.submit()
    assert queue.state(job_id) == "queued"
    queue.tick()
    assert queue.state(job_id) == "starting"
    assert queue.launcher.launches == [f"{job_id}-1"]
    attempt = queue.begin(job_id)
    assert queue.state(job_id) == "running"
    queue.clock.now += 50
    queue.scheduler.report(job_id, attempt, SUCCESS)
    answer = queue.scheduler.job(job_id)
    assert answer["model"] == {"name": "acme.bot", "version": "3"}
    assert answer["finished_at"].endswith("+00:00")
    assert queue.causes(job_id) == ["submitted", "admitted", "first step", "registered"]
    (row,) = queue.scheduler.usage()
    assert row["tokens"] == 9000
    assert row["worker_seconds"]["CPU"] == pytest.approx(50)


def test_a_driver_that_waits_takes_its_own_admission(queue: Queue) -> None:
    job_id = queue.submit(driver_id="raysubmit_1")
    assert queue.scheduler.poll(job_id, "raysubmit_1")["state"] == "queued"
    queue.tick()
    assert queue.launcher.launches == []
    claimed = queue.scheduler.claim(job_id, "raysubmit_1")
    assert claimed is not None
    assert claimed["run_folder"].endswith(f"/acme/bot/{job_id}")
    assert (claimed["attempt"], claimed["num_workers"], claimed["resume"]) == (1, 1, False)
    assert queue.scheduler.claim(job_id, "somebody-else") is None
    queue.tick(20)
    assert queue.launcher.launches == []


def test_a_waiting_driver_that_is_gone_is_replaced(queue: Queue) -> None:
    job_id = queue.submit(driver_id="raysubmit_1")
    queue.tick()
    queue.tick(20)
    queue.tick()
    assert queue.launcher.launches == [f"{job_id}-1"]
    assert queue.scheduler.claim(job_id, "raysubmit_1") is None


def test_no_more_drivers_wait_than_may(tmp_path: Path) -> None:
    queue = Queue(tmp_path, max_waiting=1)
    first = queue.scheduler.submit(document("one"), driver_id="d1")
    second = queue.scheduler.submit(document("two"), driver_id="d2")
    assert (first["may_wait"], second["may_wait"]) == (True, False)
    queue.clock.now += 60  # the first one is gone
    assert queue.scheduler.submit(document("three"), driver_id="d3")["may_wait"]


def test_submitted_twice_is_one_job_until_it_ends(queue: Queue) -> None:
    first = queue.scheduler.submit(document())
    again = queue.scheduler.submit(document())
    assert (first["is_new"], again["is_new"], again["id"]) == (True, False, first["id"])
    keyed = queue.scheduler.submit(document(), idempotency_key="mine")
    assert keyed["is_new"]
    queue.scheduler.cancel(first["id"])
    assert queue.scheduler.submit(document())["is_new"]


# Waiting


def test_a_job_that_waits_says_why_and_when(queue: Queue) -> None:
    held, first, second = (queue.submit(name, workers=3) for name in ("a", "b", "c"))
    queue.tick()
    queue.begin(held)
    queue.tick(20)
    one, two = queue.scheduler.job(first), queue.scheduler.job(second)
    assert (one["position"], one["blocker"]) == (1, None)
    assert (two["position"], two["blocker"]) == (2, first)
    assert one["reason"] == "needs 3 x (1 CPU), room for 1 now"
    assert queue.scheduler.job(held)["created_at"] < one["estimated_start"] < two["estimated_start"]


def test_estimated_starts_get_truer_with_what_was_measured(tmp_path: Path) -> None:
    queue = Queue(tmp_path, slots=1)
    settings = queue.settings.service
    first, second, third = (queue.submit(name) for name in ("first", "second", "third"))
    queue.tick()
    queue.tick(after_s=settings.estimate_s)
    attempt = queue.begin(first)

    def starts_in_s(job_id: str) -> float:
        start = datetime.fromisoformat(queue.scheduler.job(job_id)["estimated_start"])
        return start.timestamp() - queue.clock()

    def tick() -> None:
        queue.tick(after_s=settings.estimate_s)
        queue.beat(first, attempt)

    unknown_s = starts_in_s(third) - starts_in_s(second)
    assert unknown_s == pytest.approx(3600.0, rel=0.01)
    tick()
    tick()
    assert starts_in_s(second) == pytest.approx(900.0, abs=30)  # as its driver tells
    queue.clock.now += 80.0
    told = {"outcome": "succeeded", "model": ["acme.first", "1"], "rows": 1600, "tokens": 9}
    queue.scheduler.report(first, attempt, told)
    queue.tick(after_s=settings.measure_s)
    attempt = queue.begin(second)
    queue.submit("fourth")
    queue.tick(after_s=settings.estimate_s)
    fourth = queue.scheduler.jobs(limit=1)[0]["id"]
    measured_s = starts_in_s(fourth) - starts_in_s(third)
    assert measured_s == pytest.approx(110.0, abs=20)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"priority": 7}, "above tenant acme's cap of 5"),
        ({"parallel": {"num_workers": 3}}, "may hold 2 workers at most"),
        ({"parallel": {"resources_per_worker": {"TPU": 1}}}, "0 TPU, room for 0 such workers"),
        ({"optim": {"lr": -1}}, "optim.lr"),
        ({"tenant": "acm"}, "did you mean acme?"),
    ],
)
def test_bad_input_is_refused_with_value_limit_and_way_out(
    queue: Queue, changes: dict, expected: str
) -> None:
    queue.accounts.set_tenant("acme", priority_cap=5, max_workers=2)
    queue.tick()
    with pytest.raises(ConfigError, match=expected):
        queue.scheduler.submit({**document(), **changes})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"queue_timeout_s": -5.0}, "queue timeout: -5 is no number of seconds above 0"),
        ({"run_timeout_s": float("nan")}, "run timeout: nan"),
        ({"run_timeout_s": 0.0}, "run timeout: 0"),
        ({"idempotency_key": "k" * 300}, "has 300 characters; take 1 to 255"),
    ],
)
def test_what_no_database_or_clock_takes_is_refused(
    queue: Queue, options: dict, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        queue.scheduler.submit(document(), **options)
    with pytest.raises(ConfigError, match=r"priority 1099511627776: take one from"):
        queue.scheduler.submit({**document(), "priority": 2**40})
    assert queue.scheduler.jobs() == []


def test_a_full_queue_of_a_tenant_refuses_the_next(queue: Queue) -> None:
    queue.accounts.set_tenant("acme", max_queued=1)
    job_id = queue.submit("a")
    with pytest.raises(ConfigError, match="1 jobs are queued, its limit is 1"):
        queue.submit("b")
    assert queue.submit("a") == job_id  # the same again is no second one
    queue.tick()
    assert queue.state(job_id) == "starting"
    queue.submit("b")


def test_a_job_that_waited_too_long_fails_and_one_that_runs_too_long_is_stopped(
    queue: Queue,
) -> None:
    runs = queue.submit("a", workers=4, run_timeout_s=100)
    waits = queue.submit("b", workers=4, queue_timeout_s=30)
    queue.tick()
    attempt = queue.begin(runs)
    queue.tick(40)
    answer = queue.scheduler.job(waits)
    assert (answer["state"], answer["reason"]) == ("failed", "queue_deadline")
    queue.tick(100)
    assert queue.beat(runs, attempt) == "stop"
    queue.scheduler.report(runs, attempt, {"outcome": "preempted"})
    assert queue.scheduler.job(runs)["reason"] == "run_deadline"


def test_time_in_which_a_job_was_stopped_for_others_is_no_running_time(queue: Queue) -> None:
    low = queue.submit("low", workers=4, run_timeout_s=100)
    queue.tick()
    attempt = queue.begin(low)
    queue.tick(60)
    high = queue.scheduler.submit({**document("high", workers=4), "priority": 1})["id"]
    queue.tick()
    queue.scheduler.report(low, attempt, {"outcome": "preempted"})
    queue.tick(500)
    queue.scheduler.cancel(high)
    queue.launcher.drivers[f"{high}-1"] = "ended"
    queue.tick(10)
    queue.tick()
    attempt = queue.begin(low)
    queue.tick(30)
    assert queue.beat(low, attempt) == "go on"
    queue.tick(20)
    assert queue.beat(low, attempt) == "stop"


# Stops


def test_a_preempted_job_waits_at_the_front_and_goes_on_with_the_next_attempt(
    queue: Queue,
) -> None:
    low = queue.submit("low", workers=4)
    queue.tick()
    attempt = queue.begin(low)
    high = queue.scheduler.submit({**document("high", workers=4), "priority": 1})["id"]
    queue.tick()
    assert queue.state(low) == "preempting"
    assert queue.beat(low, attempt) == "stop"
    queue.scheduler.report(low, attempt, {"outcome": "preempted"})
    queue.tick()
    assert (queue.state(low), queue.state(high)) == ("queued", "starting")
    queue.scheduler.report(high, queue.begin(high), SUCCESS)
    queue.tick()
    claimed = queue.scheduler.claim(low, f"{low}-2")
    assert claimed is not None
    assert (claimed["attempt"], claimed["resume"]) == (2, True)


def test_past_its_grace_period_a_job_is_killed_and_goes_on_later(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    attempt = queue.begin(job_id)
    queue.scheduler.pause(job_id)
    queue.clock.now += 119
    queue.beat(job_id, attempt)
    queue.tick()
    assert queue.launcher.stops == []
    queue.tick()
    assert queue.launcher.stops == [f"{job_id}-1"]
    queue.tick()
    assert queue.state(job_id) == "queued"
    assert queue.scheduler.job(job_id)["reason"] == "paused; s2ft resume lets it go on"
    queue.tick()
    assert queue.state(job_id) == "queued"
    queue.scheduler.resume(job_id)
    queue.tick()
    assert queue.state(job_id) == "starting"


def test_cancel_works_in_every_state_and_on_an_ended_job_does_nothing(queue: Queue) -> None:
    queued, starting, running = (queue.submit(name, workers=2) for name in ("a", "b", "c"))
    queue.scheduler.cancel(queued)
    queue.tick()
    attempt = queue.begin(running)
    assert queue.scheduler.cancel(running)["state"] == "preempting"
    queue.scheduler.report(running, attempt, {"outcome": "preempted"})
    queue.scheduler.cancel(starting)
    queue.launcher.drivers[f"{starting}-1"] = "ended"
    queue.tick(10)
    assert [queue.state(it) for it in (queued, starting, running)] == ["cancelled"] * 3
    assert queue.scheduler.cancel(running)["state"] == "cancelled"
    with pytest.raises(JobError, match="there is none"):
        queue.scheduler.cancel("job-none")


def fail(queue: Queue, name: str, reason: str) -> str:
    """Have a job fail for good."""
    job_id = queue.submit(name)
    while queue.state(job_id) != "failed":
        queue.tick(700)
        outcome = {"outcome": "failed", "reason": reason, "message": "told so"}
        queue.scheduler.report(job_id, queue.begin(job_id), outcome)
    return job_id


def test_a_failed_job_that_is_resumed_goes_on_as_its_next_attempt(queue: Queue) -> None:
    job_id = fail(queue, "a", "storage")
    before = queue.scheduler.job(job_id)
    assert before["error"] == "told so"
    answer = queue.scheduler.resume(job_id)
    assert (answer["state"], answer["finished_at"], answer["error"]) == ("queued", None, None)
    queue.tick()
    attempt = queue.begin(job_id, step=5)
    assert attempt == before["attempt"] + 1
    model = {"outcome": "succeeded", "model": ("acme.a", "1")}
    queue.scheduler.report(job_id, attempt, model)
    assert queue.state(job_id) == "succeeded"
    assert queue.scheduler.resume(job_id)["state"] == "succeeded"


def test_a_failed_job_that_would_fail_again_or_is_queued_anew_is_not_resumed(queue: Queue) -> None:
    diverged, failed = fail(queue, "a", "diverged"), fail(queue, "b", "bad_input")
    with pytest.raises(ConfigError, match=f"{diverged}: would diverge again; lower optim.lr"):
        queue.scheduler.resume(diverged)
    again = queue.submit("b")
    with pytest.raises(ConfigError, match=f"{failed}: {again} is the same run, and queued"):
        queue.scheduler.resume(failed)
    queue.scheduler.cancel(again)
    queue.accounts.set_tenant("acme", max_queued=1)
    other = queue.submit("c")
    with pytest.raises(ConfigError, match="1 jobs are queued, its limit is 1"):
        queue.scheduler.resume(failed)
    queue.scheduler.cancel(other)
    queue.accounts.set_tenant("acme", data_roots=["/elsewhere"])
    with pytest.raises(ConfigError, match="lies in none of tenant acme's data roots"):
        queue.scheduler.resume(failed)
    queue.accounts.set_tenant("acme", data_roots=[])
    assert queue.scheduler.resume(failed)["state"] == "queued"


def test_a_job_resumed_while_it_stops_for_its_pause_goes_on_at_once(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.tick()
    attempt = queue.begin(job_id)
    assert queue.scheduler.pause(job_id)["state"] == "preempting"
    assert queue.scheduler.resume(job_id)["state"] == "preempting"
    assert queue.beat(job_id, attempt, 2) == "stop"
    queue.scheduler.report(job_id, attempt, {"outcome": "preempted", "step": 2})
    assert queue.state(job_id) == "starting"
    assert queue.begin(job_id, step=3) == attempt + 1


def test_a_job_paused_while_it_is_stopped_for_another_is_held(queue: Queue) -> None:
    low = queue.submit("low", workers=4)
    queue.tick()
    attempt = queue.begin(low)
    high = queue.scheduler.submit({**document("high", workers=4), "priority": 1})["id"]
    queue.tick()
    queue.scheduler.pause(low)
    queue.scheduler.report(low, attempt, {"outcome": "preempted"})
    queue.scheduler.cancel(high)
    queue.tick()
    assert queue.scheduler.job(low)["reason"] == "paused; s2ft resume lets it go on"
    queue.scheduler.resume(low)
    queue.tick()
    assert queue.state(low) == "starting"


def growing(queue: Queue) -> tuple[str, int]:
    """An elastic job, and its attempt that is asked to stop because there is room for more."""
    job_id = queue.submit(workers=[1, 4])
    queue.tick()
    attempt = queue.begin(job_id)
    queue.clock.now += 1000
    progress = {"step": 10, "total_steps": 100, "loss": 1.0, "time_left_s": 9000.0}
    queue.scheduler.heartbeat(job_id, attempt, progress)
    queue.tick()
    return job_id, attempt


def test_a_job_paused_while_it_is_resized_is_held(queue: Queue) -> None:
    job_id, attempt = growing(queue)
    queue.scheduler.pause(job_id)
    queue.scheduler.report(job_id, attempt, {"outcome": "preempted"})
    queue.tick()
    assert queue.scheduler.job(job_id)["reason"] == "paused; s2ft resume lets it go on"


def test_a_changed_priority_is_soon_seen_in_the_estimates(queue: Queue) -> None:
    runs, first, last = (queue.submit(name, workers=4) for name in ("a", "b", "c"))
    queue.tick()
    queue.begin(runs)
    queue.tick(11)

    def starts() -> list[str]:
        return [queue.scheduler.job(it)["estimated_start"] for it in (first, last)]

    assert starts() == sorted(starts())
    queue.scheduler.set_priority(last, 5)
    queue.tick(0.1)
    assert starts() == sorted(starts(), reverse=True)
    assert len(set(starts())) == 2


def test_an_admission_cancelled_before_anybody_drove_it_ends_at_once(queue: Queue) -> None:
    job_id = queue.submit(driver_id="waits")
    queue.tick()
    queue.scheduler.cancel(job_id)
    queue.tick()
    assert queue.state(job_id) == "cancelled"


def test_an_elastic_job_grows_without_queueing_again(queue: Queue) -> None:
    job_id, attempt = growing(queue)
    assert queue.state(job_id) == "preempting"
    queue.scheduler.report(job_id, attempt, {"outcome": "preempted"})
    job = queue.store.job(job_id)
    assert (job.state, job.num_workers, job.attempt) == ("starting", 4, 2)
    assert queue.causes(job_id)[-2:] == ["asked to stop: resize", "relaunched with 4 workers"]


def test_a_drain_admits_nothing_and_may_stop_what_runs(queue: Queue) -> None:
    runs = queue.submit("a")
    queue.tick()
    attempt = queue.begin(runs)
    waits = queue.submit("b")
    queue.scheduler.drain(True, stop_running=True)
    queue.tick()
    assert queue.beat(runs, attempt) == "stop"
    assert queue.scheduler.job(waits)["reason"].startswith("the cluster is being drained")
    queue.scheduler.drain(False)
    queue.tick()
    assert queue.state(waits) == "starting"


# Losses


def test_a_driver_that_ended_without_a_report_is_followed_by_another(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    attempt = queue.begin(job_id)
    queue.launcher.drivers[f"{job_id}-1"] = "ended"
    queue.tick(10)
    answer = queue.scheduler.job(job_id)
    assert answer["state"] == "queued"
    assert queue.causes(job_id)[-1] == "tried again after driver_lost"
    queue.tick(10)
    assert queue.launcher.launches == [f"{job_id}-1", f"{job_id}-2"]
    with pytest.raises(StaleAttempt):
        queue.beat(job_id, attempt)
    with pytest.raises(StaleAttempt):
        queue.scheduler.report(job_id, attempt, SUCCESS)


def test_a_driver_outside_ray_is_lost_when_it_falls_silent(queue: Queue) -> None:
    job_id = queue.submit(driver_id="host:42")
    queue.tick()
    claimed = queue.scheduler.claim(job_id, "host:42")
    assert claimed is not None
    queue.tick(20)
    assert queue.state(job_id) == "starting"
    queue.tick(20)
    assert queue.state(job_id) == "queued"


def test_a_report_that_is_repeated_changes_nothing(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    attempt = queue.begin(job_id)
    queue.scheduler.report(job_id, attempt, SUCCESS)
    queue.scheduler.report(job_id, attempt, SUCCESS)
    assert queue.causes(job_id).count("registered") == 1


def test_what_a_failed_attempt_trained_is_accounted_for(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    failure = {"outcome": "failed", "reason": "worker_lost", "message": "gone", "tokens": 70}
    queue.scheduler.report(job_id, queue.begin(job_id), failure)
    queue.tick(10)
    queue.clock.now += 5
    queue.scheduler.report(job_id, queue.begin(job_id), SUCCESS)
    (row,) = queue.scheduler.usage()
    assert row["tokens"] == 9070


def test_each_cause_has_retries_of_its_own(queue: Queue) -> None:
    job_id = queue.submit()

    def fail(reason: str) -> str:
        queue.tick(700)
        failure = {"outcome": "failed", "reason": reason, "message": reason}
        queue.scheduler.report(job_id, queue.begin(job_id), failure)
        return queue.state(job_id)

    lost = ["worker_lost"] * 5
    assert [fail(reason) for reason in (*lost, "storage", "error")] == ["queued"] * 7
    assert fail("error") == "failed"


def test_a_job_is_told_with_all_that_a_program_may_ask(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    queue.begin(job_id)
    (told,) = queue.scheduler.jobs()
    assert told.keys() == {
        *("id", "tenant", "name", "state", "reason", "priority", "position", "blocker"),
        *("estimated_start", "created_at", "started_at", "finished_at", "attempt", "progress"),
        *("model", "error", "num_workers", "placement", "submission_id"),
    }
    assert told["progress"].keys() == {"step", "total_steps", "loss", "time_left_s"}
    assert queue.scheduler.job(job_id).keys() - told.keys() == {"config", "events"}
    assert told["created_at"] == "2027-01-15T08:00:00+00:00"


def test_bad_input_is_never_tried_again(queue: Queue) -> None:
    job_id = queue.submit()
    queue.tick()
    attempt = queue.begin(job_id)
    failure = {"outcome": "failed", "reason": "bad_input", "message": "rows.jsonl: no such file"}
    queue.scheduler.report(job_id, attempt, failure)
    answer = queue.scheduler.job(job_id)
    assert (answer["state"], answer["error"]) == ("failed", "rows.jsonl: no such file")


def test_a_restarted_scheduler_goes_on_and_does_nothing_twice(queue: Queue) -> None:
    first, second = queue.submit("a", workers=4), queue.submit("b", workers=4)
    queue.tick()
    attempt = queue.begin(first)
    queue.restart()
    queue.tick()
    assert queue.beat(first, attempt) == "go on"
    queue.restart()
    queue.tick()
    assert queue.launcher.launches == [f"{first}-1"]
    queue.scheduler.report(first, attempt, SUCCESS)
    queue.tick()
    assert queue.launcher.launches == [f"{first}-1", f"{second}-1"]


def test_an_admission_that_wasnt_launched_before_the_crash_is_launched_after_it(
    queue: Queue,
) -> None:
    job_id = queue.submit()
    queue.launcher.is_away = True
    queue.tick()
    assert (queue.state(job_id), queue.launcher.launches) == ("starting", [])
    queue.restart()
    queue.launcher.is_away = False
    queue.tick()
    assert queue.launcher.launches == [f"{job_id}-1"]


def test_what_others_hold_of_a_node_isnt_given_away() -> None:
    total, available = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 2.0}
    assert without_others(total, available, {"CPU": 2.0}) == {"CPU": 5.0, "GPU": 2.0}
    # a gang that is admitted and not there yet leaves more available than the ledger says
    assert without_others(total, total, {"CPU": 2.0}) == total


def test_what_the_autoscaler_may_add_is_counted_until_it_has_come() -> None:
    group = NodeGroup("gpu", 2, {"CPU": 8.0, "GPU": 1.0})
    head = NodeView("head", {"CPU": 2.0})
    first, second = still_to_come([group], [head])
    assert (first.id, first.present, second.id) == ("gpu/0", False, "gpu/1")
    assert first.labels["ray.io/node-group"] == "gpu"
    named = NodeView("n1", {"CPU": 3.0, "GPU": 1.0}, {"ray.io/node-group": "gpu"})
    assert still_to_come([group], [head, named]) == [second]
    alike = NodeView("n2", {"GPU": 0.0}, capacity={"CPU": 8.0, "GPU": 1.0})
    assert still_to_come([group], [head, alike]) == [second]


def test_a_job_for_nodes_that_are_not_there_yet_is_started(queue: Queue) -> None:
    queue.tick()
    with pytest.raises(ConfigError, match=r"0 of 1 nodes carry zone=a"):
        queue.scheduler.submit(bound_to_zone("a"))
    group = NodeGroup("far", 1, {"CPU": 2.0}, {"zone": "a"})
    queue.cluster.views = [*queue.cluster.views, *still_to_come([group], queue.cluster.views[:0])]
    queue.tick()
    job_id = queue.scheduler.submit(bound_to_zone("a"))["id"]
    queue.tick()
    assert queue.store.job(job_id).placement == {"far/0": 2}


def test_what_others_hold_now_refuses_nothing(queue: Queue) -> None:
    queue.cluster.views = [NodeView("n0", {"CPU": 1.0}, capacity={"CPU": 4.0})]
    queue.tick()
    job_id = queue.submit(workers=4)
    queue.tick()
    assert queue.state(job_id) == "queued"
    queue.cluster.views = [NodeView("n0", {"CPU": 4.0}, capacity={"CPU": 4.0})]
    queue.tick()
    assert queue.state(job_id) == "starting"


def bound_to_zone(zone: str) -> dict[str, Any]:
    run = document("bound", workers=2)
    run["parallel"]["labels_per_worker"] = {"zone": zone}
    return run


def test_nodes_that_come_and_go_are_followed(queue: Queue) -> None:
    job_id = queue.submit(workers=4)
    queue.cluster.views = [NodeView("n0", {"CPU": 2.0})]
    queue.tick()
    assert queue.scheduler.job(job_id)["reason"].endswith("its tenant's limit has at all")
    queue.cluster.views = [NodeView("n0", {"CPU": 2.0}), NodeView("n1", {"CPU": 2.0})]
    queue.tick()
    assert queue.store.job(job_id).placement == {"n0": 2, "n1": 2}
