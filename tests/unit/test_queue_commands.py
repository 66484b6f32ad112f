"""What a person reads and a program gets of the queue, on answers as the scheduler gives them."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private import worker as ray_worker

from s2ft_ray import cli
from s2ft_ray.cli import queue_commands
from s2ft_ray.errors import ConfigError, UnknownJob
from s2ft_ray.scheduler.client import QueueClient

RUNNING = {
    "id": "job-1",
    "tenant": "acme",
    "name": "bot",
    "state": "running",
    "reason": "first step",
    "priority": 5,
    "position": None,
    "blocker": None,
    "estimated_start": None,
    "created_at": "2026-01-31T10:00:00+00:00",
    "started_at": "2026-01-31T10:01:00+00:00",
    "finished_at": None,
    "attempt": 2,
    "num_workers": 3,
    "placement": {"4c1e": 2, "9a07": 1},
    "submission_id": "job-1-2",
    "progress": {"step": 7, "total_steps": 40, "loss": 1.25, "time_left_s": 3661.0},
    "model": None,
    "error": None,
}
QUEUED = {
    **RUNNING,
    "id": "job-2",
    "state": "queued",
    "reason": "needs 2 x (1 CPU), room for 1 now",
    "position": 2,
    "blocker": "job-0",
    "attempt": 0,
    "num_workers": 0,
    "placement": {},
    "started_at": None,
    "progress": None,
}


class FakeQueue:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = {job["id"]: dict(job) for job in (RUNNING, QUEUED)}
        self.calls: list[tuple[Any, ...]] = []

    def jobs(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        self.calls.append(("jobs", *args, *kwargs.values()))
        return list(self.known.values())

    def job(self, job_id: str) -> dict[str, Any]:
        if job_id not in self.known:
            raise UnknownJob(f"job {job_id}: there is none; s2ft jobs lists them")
        at = "2026-01-31T10:00:00+00:00"
        event = {"at": at, "attempt": 0, "state": "queued", "cause": "submitted", "detail": None}
        config = {"checkpoint": {"storage_path": str(self.folder)}}
        return {**self.known[job_id], "config": config, "events": [event]}

    def cancel(self, job_id: str) -> dict[str, Any]:
        return {**self.known[job_id], "state": "cancelled", "reason": "cancelled"}

    def set_priority(self, job_id: str, priority: int) -> dict[str, Any]:
        if priority > 5:
            raise ConfigError(f"priority {priority}: above tenant acme's cap of 5")
        return {**self.known[job_id], "priority": priority}

    def submit(self, document: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.calls.append(("submit", document, options))
        return {**QUEUED, "is_new": len(self.calls) == 1, "may_wait": False}

    def drain(self, on: bool, stop_running: bool) -> None:
        self.calls.append(("drain", on, stop_running))

    def usage(self, *args: Any) -> list[dict[str, Any]]:
        self.calls.append(("usage", *args))
        seconds = {"workers": 61.6, "CPU": 123.2}
        row = {"tenant": "acme", "job": None, "num_jobs": 2, "worker_seconds": seconds}
        return [{**row, "tokens": 992, "queue_wait_s": 1.5}]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    fake = FakeQueue(tmp_path)
    monkeypatch.setattr(queue_commands, "connect", lambda: fake)
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    return fake


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(args)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.usefixtures("queue")
def test_the_table_says_how_far_each_is_and_why_it_waits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "jobs")
    assert code == 0
    head, running, queued = out.splitlines()
    assert head.split() == ["ID", "TENANT", "NAME", "STATE", "PRIO", "TRY", "WORKERS", "DETAIL"]
    assert running.split()[:7] == ["job-1", "acme", "bot", "running", "5", "2", "3"]
    assert running.endswith("step 7/40  loss 1.2500  1:01:01 left")
    assert queued.endswith("place 2, behind job-0; needs 2 x (1 CPU), room for 1 now")


def test_the_watched_table_is_shown_again_as_it_changes(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_on(_: float) -> None:
        if queue.known["job-1"]["state"] == "succeeded":
            raise KeyboardInterrupt
        model = {"name": "acme.bot", "version": "1"}
        queue.known["job-1"] |= {"state": "succeeded", "model": model}

    monkeypatch.setattr(queue_commands.time, "sleep", go_on)
    code, out, _ = run(capsys, "jobs", "--watch")
    assert code == 130
    first, second = (line for line in out.splitlines() if line.startswith("job-1"))
    assert "step 7/40" in first
    assert second.endswith("registered acme.bot version 1")


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize(
    "args",
    [("jobs", "--limit", "0"), ("submit", "--config", "f", "--run-timeout", "nan")],
)
def test_a_number_that_cant_be_is_bad_input(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert "is no number" in capsys.readouterr().err


def test_a_program_gets_the_scheduler_s_answer_for_what_it_asked(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "jobs", "--json", "--tenant", "acme", "--state", "queued")
    assert code == 0
    assert json.loads(out) == [RUNNING, QUEUED]
    assert queue.calls == [("jobs", "acme", ["queued"], 100, None)]


@pytest.mark.usefixtures("queue")
def test_a_job_s_story_has_its_events_and_its_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "job", "job-1")
    assert code == 0
    assert out.splitlines()[0].startswith("job-1  acme.bot  running: step 7/40")
    assert str(tmp_path / "acme" / "bot" / "job-1") in out
    assert "node        9a07: 1 worker(s)\n" in out
    assert out.splitlines()[-1].split() == ["2026-01-31T10:00:00+00:00", "0", "queued", "submitted"]


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize("command", [("job",), ("cancel",), ("logs",), ("pause",)])
def test_an_unknown_id_is_bad_input(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *command, "job-x")
    assert (code, err) == (2, "error: job job-x: there is none; s2ft jobs lists them\n")


def test_cancel_of_an_ended_job_says_so(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.known["job-1"]["finished_at"] = "2026-01-31T11:00:00+00:00"
    code, _, err = run(capsys, "cancel", "job-1")
    assert (code, err) == (0, "job job-1 has ended: nothing is changed\n")


@pytest.mark.usefixtures("queue")
def test_a_priority_above_the_cap_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "priority", "job-1", "5")[0] == 0
    code, _, err = run(capsys, "priority", "job-1", "6")
    assert (code, err) == (2, "error: priority 6: above tenant acme's cap of 5\n")


def test_a_run_is_submitted_resolved_and_once(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    document = {"tenant": "acme", "name": "bot", "data": {"train": str(tmp_path / "rows.jsonl")}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    args = ("submit", "--config", str(path), "--set", "optim.lr=1e-3", "--run-timeout", "60")
    assert run(capsys, *args)[1] == "job-2  queued\n"
    assert "not queued again" in run(capsys, *args)[1]
    _, sent, options = queue.calls[0]
    assert sent["optim"]["lr"] == 1e-3
    assert sent["checkpoint"]["storage_path"] == str(tmp_path / "home" / "runs")
    assert options["run_timeout_s"] == 60.0


def test_logs_are_those_of_the_run_folder(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "logs", "job-1")
    assert code == 1
    assert "nothing is printed yet" in err
    folder = tmp_path / "acme" / "bot" / "job-1"
    folder.mkdir(parents=True)
    (folder / "driver.log").write_text("step 1\nstep 2\n")
    queue.known["job-1"]["finished_at"] = "2026-01-31T11:00:00+00:00"
    assert run(capsys, "logs", "-f", "job-1")[1] == "step 1\nstep 2\n"


def test_usage_is_a_table_json_or_csv(queue: FakeQueue, capsys: pytest.CaptureFixture[str]) -> None:
    _, table, _ = run(capsys, "usage", "--since", "2026-01-31", "--tenant", "acme")
    assert table.splitlines()[1].split() == ["acme", "2", "61.6", "123.2", "992", "1.5"]
    since = datetime(2026, 1, 31, tzinfo=UTC).timestamp()
    assert queue.calls == [("usage", "acme", since, False)]
    _, text, _ = run(capsys, "usage", "--csv")
    assert text.split() == [
        "tenant,jobs,worker_s,CPU_s,tokens,queue_wait_s",
        "acme,2,61.6,123.2,992,1.5",
    ]
    _, document, _ = run(capsys, "usage", "--json")
    assert json.loads(document)[0]["worker_seconds"] == {"workers": 61.6, "CPU": 123.2}


def test_a_span_ends_now_and_a_word_is_no_time(
    queue: FakeQueue, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "usage", "--since", "12h")
    since = queue.calls[0][2]
    assert since == pytest.approx(datetime.now(UTC).timestamp() - 12 * 3600, abs=60)
    with pytest.raises(SystemExit) as error:
        cli.main(["usage", "--since", "yesterday"])
    assert error.value.code == 2
    assert "neither a date as 2026-01-31 nor a span" in capsys.readouterr().err


def test_a_drain_is_begun_and_ended(queue: FakeQueue, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is started any more" in run(capsys, "drain", "--stop")[1]
    assert "started again" in run(capsys, "drain", "--end")[1]
    drains = [call for call in queue.calls if call[0] == "drain"]
    assert drains == [("drain", True, True), ("drain", False, False)]


def test_without_a_node_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = run(capsys, "jobs")
    assert (code, err) == (
        1,
        f"error: nothing is up in {tmp_path}; s2ft up starts it, RAY_ADDRESS names a cluster\n",
    )


def test_what_ray_tells_of_its_cluster_is_not_among_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ray_worker.print_to_stdstream
    monkeypatch.setattr(ray_worker, "print_to_stdstream", told)  # put back in the end
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(QueueClient, "find", lambda: object())
    message = {"lines": ["WARNING: 8 workers"], "pid": "raylet", "is_err": False}
    ray_worker.print_to_stdstream(message, ignore_prefix=False)
    assert "WARNING: 8 workers" in capsys.readouterr().out
    queue_commands.connect()
    ray_worker.print_to_stdstream(message, ignore_prefix=False)
    assert capsys.readouterr().out == ""
