"""A driver between the queue and its run: waiting, signs of life, the stop, the end."""

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from s2ft_ray.config import parse_config
from s2ft_ray.errors import (
    CheckpointError,
    ConfigError,
    Diverged,
    JobError,
    OutOfMemory,
    Preempted,
    RegistryUnreachable,
    StaleAttempt,
)
from s2ft_ray.finetune import waiting
from s2ft_ray.finetune.attempt import Attempt, Claim, logged
from s2ft_ray.training.metrics import MetricsLog
from s2ft_ray.training.run_folder import RunFolder

CONFIG = parse_config({"tenant": "acme", "name": "bot", "data": {"train": "rows.jsonl"}})


def answer(state: str = "queued", **values: Any) -> dict[str, Any]:
    keys = ("reason", "position", "blocker", "estimated_start", "progress", "model", "error")
    known = {**dict.fromkeys(keys), "finished_at": None, "submission_id": None, "attempt": 1}
    return {"id": "job-1", "state": state, **known, **values}


class FakeQueue:
    """Gives the answers of a script, the last one for ever."""

    def __init__(self, *answers: dict[str, Any], beat: Any = "go on") -> None:
        self.answers, self.beat = list(answers), beat
        self.beats: list[Any] = []
        self.reports: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.told = threading.Event()

    def poll(self, _job_id: str, _driver: str) -> dict[str, Any]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.poll(job_id, "")

    def claim(self, _job_id: str, driver: str) -> dict[str, Any] | None:
        folder, config = "/runs/acme/bot/job-1", CONFIG.model_dump(mode="json")
        mine = driver == "me"
        claim = {"attempt": 1, "num_workers": 2, "run_folder": folder, "config": config}
        return claim if mine else None

    def cancel(self, job_id: str) -> dict[str, Any]:
        self.cancelled.append(job_id)
        return answer("cancelled")

    def heartbeat(
        self, _job_id: str, _attempt: int, progress: Any, saved_at: Any, placement: Any
    ) -> str:
        self.beats.append((progress, saved_at, placement))
        self.told.set()
        if isinstance(self.beat, Exception):
            raise self.beat
        return str(self.beat)

    def report(self, _job_id: str, _attempt: int, outcome: dict[str, Any]) -> None:
        self.reports.append(outcome)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.001)


def begin(queue: FakeQueue, folder: Path) -> Attempt:
    (folder / "checkpoints").mkdir()
    claim = Claim("job-1", 1, 2, RunFolder(folder), CONFIG.model_dump(mode="json"))
    return Attempt(queue, claim, interval_s=0.001)  # type: ignore[arg-type]


def wait(queue: FakeQueue, first: dict[str, Any], driver: str = "me") -> Claim | int:
    return waiting.wait(queue, first, driver, CONFIG)  # type: ignore[arg-type]


def test_a_driver_tells_its_place_and_reason_once_and_takes_its_turn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    third = answer(position=3, blocker="job-0", reason="needs 2 x (1 CPU), room for 1 now")
    queue = FakeQueue(third, third, {**third, "position": 1, "blocker": None}, answer("starting"))
    claim = wait(queue, {**answer(reason="submitted"), "is_new": True, "may_wait": True})
    assert isinstance(claim, Claim)
    assert (claim.attempt, claim.num_workers) == (1, 2)
    assert claim.run.path == Path("/runs/acme/bot/job-1")
    assert capsys.readouterr().out.splitlines() == [
        "job         job-1, queued",
        "queued      submitted",
        "queued      place 3, behind job-0; needs 2 x (1 CPU), room for 1 now",
        "queued      place 1; needs 2 x (1 CPU), room for 1 now",
    ]


def test_one_driver_too_many_leaves_its_job_in_the_queue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    queue = FakeQueue(answer())
    assert wait(queue, {**answer(), "is_new": True, "may_wait": False}) == 0
    assert "starts by itself; s2ft job job-1" in capsys.readouterr().out
    assert queue.cancelled == []


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        (
            answer("succeeded", finished_at="now", model={"name": "acme.bot", "version": "4"}),
            0,
            "registered acme.bot version 4",
        ),
        (answer("failed", finished_at="now", error="step 3: not finite"), 1, "step 3: not finite"),
        (answer("failed", finished_at="now", reason="diverged", error="no"), 1, "no"),
        (answer("failed", finished_at="now", reason="bad_input", error="rows: no"), 2, "rows: no"),
        (answer("failed", finished_at="now", reason="storage", error="full"), 2, "full"),
        (answer("cancelled", finished_at="now", reason="cancelled"), 1, "cancelled"),
    ],
)
def test_a_job_that_another_driver_has_is_followed_to_its_end(
    end: dict[str, Any], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = {"step": 5, "total_steps": 10, "loss": 0.5, "time_left_s": 61.0}
    queue = FakeQueue(answer("running", progress=progress), end)
    first = {**answer("starting", submission_id="other"), "is_new": False, "may_wait": True}
    assert wait(queue, first) == code
    out = capsys.readouterr().out
    assert "step 5/10  loss 0.5000  1:01 left" in out
    assert text in out


def test_a_driver_that_is_told_to_end_takes_its_job_out_of_the_queue() -> None:
    queue = FakeQueue(answer())

    def poll(_job_id: str, _driver: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    queue.poll = poll  # type: ignore[method-assign]
    assert wait(queue, {**answer(), "is_new": True, "may_wait": True}) == 130
    assert queue.cancelled == ["job-1"]


@pytest.mark.parametrize(("code", "is_refused"), [(2, True), (1, False), (0, False)])
def test_bad_input_takes_a_waiting_job_out_of_the_queue_and_an_mlflow_that_is_away_does_not(
    code: int,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = f"import sys; print('error: data.train: no', file=sys.stderr); sys.exit({code})"
    check = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert check.wait() == code
    monkeypatch.setattr(waiting, "_CHECK_AFTER_S", 0.0)
    monkeypatch.setattr(waiting, "_start_check", lambda _config, _folder: check)
    queue = FakeQueue(answer(), answer("starting"))
    got = wait(queue, {**answer(), "is_new": True, "may_wait": True})
    assert queue.cancelled == (["job-1"] if is_refused else [])
    assert got == 2 if is_refused else isinstance(got, Claim)
    assert ("error: data.train: no" in capsys.readouterr().err) is is_refused
    assert check.stderr is not None
    check.stderr.close()


def test_waiting_needs_no_torch() -> None:
    program = (
        "import s2ft_ray.finetune.main, s2ft_ray.finetune.waiting, sys\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_signs_of_life_carry_the_progress_and_the_end_what_was_done(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("train", 1, loss=9.0, tokens_per_s=1e6, step_seconds=1.0, time_left_s=0.0)  # before
    queue = FakeQueue()
    with begin(queue, tmp_path) as attempt:
        log.write("workers", 0, nodes={"n1": 2})
        log.write("start", 1, total_steps=10)
        for step in (2, 3):
            log.write("train", step, loss=0.5, tokens_per_s=50.0, step_seconds=2.0, time_left_s=7.0)
        (tmp_path / "checkpoints" / "step-00000002").mkdir()
        deadline = time.monotonic() + 10
        while not (queue.beats and queue.beats[-1][0] and queue.beats[-1][0]["step"] == 3):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        attempt.succeed("acme.bot", "1")
    progress, saved_at, placement = queue.beats[-1]
    assert placement == {"n1": 2}
    assert progress == {
        **{"step": 3, "total_steps": 10, "loss": 0.5, "time_left_s": 7.0},
        **{"rows": 32, "tokens": 200, "starts": 1},
    }
    assert saved_at is None or saved_at == pytest.approx(time.time(), abs=60)
    (end,) = queue.reports
    rows = 2 * CONFIG.optim.global_batch_size
    assert end == {"outcome": "succeeded", "model": ["acme.bot", "1"], "rows": rows, "tokens": 200}


def test_a_stop_that_the_queue_asks_for_reaches_the_run(tmp_path: Path) -> None:
    queue = FakeQueue(beat="stop")
    attempt = begin(queue, tmp_path)

    def train() -> None:
        with attempt:
            deadline = time.monotonic() + 10
            while not attempt.claim.run.is_stop_requested():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            raise Preempted(7)

    with pytest.raises(Preempted):
        train()
    assert attempt.was_asked
    assert queue.reports == [{"outcome": "preempted", "step": 7, "rows": 0, "tokens": 0}]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("model.name_or_path: no"), "bad_input"),
        (CheckpointError("adapter: no room"), "storage"),
        (Diverged("step 3: not finite"), "diverged"),
        (OutOfMemory("worker 0: out of memory"), "out_of_memory"),
        (RegistryUnreachable("MLflow is away"), "registry"),
        (JobError("Ray Train gave up"), "error"),
        (ZeroDivisionError("by zero"), "error"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
    ],
)
def test_a_failure_is_reported_with_its_cause(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    queue = FakeQueue()
    with pytest.raises(type(error)), begin(queue, tmp_path):
        raise error
    (end,) = queue.reports
    assert (end["outcome"], end["reason"], end["message"]) == ("failed", reason, str(error))


def test_a_driver_that_was_given_up_ends_at_once(tmp_path: Path) -> None:
    codes: list[int] = []
    queue = FakeQueue(beat=StaleAttempt("job-1", 1, "running, attempt 2"))
    (tmp_path / "checkpoints").mkdir()
    claim = Claim("job-1", 1, 2, RunFolder(tmp_path), CONFIG.model_dump(mode="json"))
    with Attempt(queue, claim, 0.001, codes.append):  # type: ignore[arg-type]
        assert queue.told.wait(10)
    assert codes == [1]


def test_a_stop_for_which_the_disk_has_no_room_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = RunFolder.request_stop, []

    def request(run: RunFolder, reason: str) -> None:
        asked.append(reason)
        if len(asked) == 1:
            raise CheckpointError("stop.json: No space left on device")
        real(run, reason)

    monkeypatch.setattr(RunFolder, "request_stop", request)
    with begin(FakeQueue(beat="stop"), tmp_path) as attempt:
        deadline = time.monotonic() + 10
        while not attempt.claim.run.is_stop_requested():
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_scheduler_that_is_away_stops_nothing(tmp_path: Path) -> None:
    queue = FakeQueue(beat=JobError("the scheduler doesn't answer"))
    with begin(queue, tmp_path) as attempt:
        while len(queue.beats) < 3:
            time.sleep(0.001)
        attempt.succeed("acme.bot", "1")
    assert not attempt.was_asked


def test_a_line_that_a_full_disk_cut_short_doesnt_end_the_signs_of_life(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = {"kind": "train", "step": 3, "loss": 0.5, "tokens_per_s": 50.0, "step_seconds": 2.0}
    queue = FakeQueue()
    with begin(queue, tmp_path) as attempt:
        path.write_text(
            '{"kind": "tra{"kind": "start"}\n' + json.dumps({**whole, "time_left_s": 7.0}) + "\n"
        )
        attempt.succeed("acme.bot", "1")
    assert queue.reports[0]["tokens"] == 100


def test_a_driver_prints_on_where_its_log_is_on_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    run.log.symlink_to("/dev/full")
    with logged(run):
        print("step 1")
    assert capsys.readouterr().out == "step 1\n"


def test_a_place_further_back_isnt_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    # None: a scheduler that has just been started again
    seen = (7, 6, 7, None, 6, 5)
    places = [answer(position=place, reason="needs 1 x (1 CPU)") for place in seen]
    queue = FakeQueue(*places, answer("starting"))
    wait(queue, {**answer(position=7, reason="submitted"), "is_new": True, "may_wait": True})
    told = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(";")[0].split()[-1] for line in told] == ["7", "6", "5"]


def test_what_a_driver_prints_is_kept_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    for text in ("first", "second"):
        with logged(run):
            print(json.dumps(text))
            print("bad", file=sys.stderr)
    assert run.log.read_text() == '"first"\nbad\n"second"\nbad\n'
    out, err = capsys.readouterr()
    assert (out, err) == ('"first"\n"second"\n', "bad\nbad\n")
