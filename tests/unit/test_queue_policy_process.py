"""The policy in a process of its own: the same answers, whatever becomes of the process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queue_parts import Queue
from queue_worlds import NOW, node, queued, running, world
from test_queue_history import snapshots

from s2ft_ray.errors import JobError
from s2ft_ray.scheduler import policy
from s2ft_ray.scheduler.policy_process import PolicyProcess
from s2ft_ray.scheduler.views import Snapshot


@pytest.fixture(scope="module")
def process() -> Iterator[PolicyProcess]:
    process = PolicyProcess()
    yield process
    process.close()


def check(process: PolicyProcess, snapshot: Snapshot) -> None:
    """Hold the process's answers against those of this process."""
    expected, plan = policy.decide(snapshot, NOW), process.decide(snapshot, NOW)
    assert replace(plan, waits=dict(plan.waits)) == replace(expected, waits=dict(expected.waits))
    assert list(plan.waits) == list(expected.waits)
    assert process.expected_starts(snapshot, NOW) == policy.expected_starts(snapshot, NOW)


def children() -> list[psutil.Process]:
    """Return this process's children that compute the policy."""
    found = psutil.Process().children()
    return [it for it in found if "s2ft_ray.scheduler.policy_process" in it.cmdline()]


@given(worlds=st.lists(snapshots(), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_one_process_answers_as_the_policy_does(
    process: PolicyProcess, worlds: list[Snapshot]
) -> None:
    for snapshot in worlds:  # the same ids with other views: it has to be told each time
        check(process, snapshot)


def test_jobs_that_change_go_and_come_are_seen(process: PolicyProcess) -> None:
    first, second = queued("a", workers=2), queued("b", workers=3)
    check(process, world(first, second))
    check(process, world(replace(first, sizes=(4,)), second))
    check(process, world(second))
    check(process, world(running("a", workers=2, placement={"n0": 2}), second, queued("c")))
    check(process, world(second, first, nodes=[node(1), node(8, "n1")]))
    check(process, world())


def test_a_process_that_was_killed_is_started_again(process: PolicyProcess) -> None:
    snapshot = world(queued("a"), queued("b", workers=9))
    check(process, snapshot)
    (child,) = children()
    child.kill()
    child.wait()
    check(process, snapshot)
    assert [it.pid for it in children()] != [child.pid]


def test_where_no_process_can_be_had_the_scheduler_decides_itself(
    process: PolicyProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        check(process, world(queued("a"), queued("b", workers=9)))
    assert "has died twice" in caplog.text
    assert children() == []
    check(process, world(queued("a"), queued("b", workers=9)))
    assert len(children()) == 1


def test_a_policy_that_fails_says_so_and_answers_the_next_question(process: PolicyProcess) -> None:
    broken = world(queued("a", sizes=()))
    with pytest.raises(JobError, match=r"the policy failed: (.|\n)*IndexError"):
        process.decide(broken, NOW)
    check(process, world(queued("a")))


PARENT = """
import time
from queue_worlds import NOW, queued, world
from s2ft_ray.scheduler.policy_process import PolicyProcess

process = PolicyProcess()
process.decide(world(queued("a")), NOW)
print("asked", flush=True)
time.sleep(60)
"""


def test_the_process_ends_with_its_parent() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "asked\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
    assert psutil.wait_procs([child], timeout=10)[0]


def test_a_scheduler_ticks_with_it(tmp_path: Path, process: PolicyProcess) -> None:
    queue = Queue(tmp_path, slots=1, policy=process)
    first, second = queue.submit("a"), queue.submit("b")
    queue.tick()
    assert [queue.state(first), queue.state(second)] == ["starting", "queued"]
    told = queue.scheduler.job(second)
    assert told["position"] == 1
    assert told["estimated_start"] is not None
    end = {"outcome": "succeeded", "model": ("s2ft.acme.a", "1")}
    queue.scheduler.report(first, queue.begin(first), end)
    queue.tick()
    assert queue.state(second) == "starting"
