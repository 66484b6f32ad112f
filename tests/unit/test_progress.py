import json
from pathlib import Path

import pytest
from full_disk import file_limit

from s2ft_ray.training.metrics import MetricsLog
from s2ft_ray.training.metrics_reader import MetricsReader
from s2ft_ray.training.progress import ProgressPrinter

STEP = {"loss": 1.5, "lr": 1e-3, "tokens_per_s": 1234.5, "time_left_s": 61.0}


def test_what_is_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with ProgressPrinter(path):
        log.write("workers", 0, nodes={"4c1e": 2})
        log.write("start", 0, total_steps=20, world_size=2, sharding="full")
        log.write("train", 1, **STEP)
        log.write(
            "eval",
            1,
            loss=1.0,
            perplexity=2.7,
            token_accuracy=0.5,
            samples=[{"prompt": "a\nb", "answer": "c", "expected": "d"}],
        )
        log.write("train", 20, **STEP)
        log.write("stop", 20)
    printed = capsys.readouterr().out
    assert "stopped after step 20; the checkpoint is saved" in printed
    assert "started: 2 worker(s), base in full" in printed
    assert "step  1/20  loss 1.5000  lr 1.00e-03  1,234 tokens/s  1:01 left" in printed
    assert "step  1/20  held out: loss 1.0000  perplexity 2.70  token accuracy 50.0%" in printed
    assert "a b -> c  (expected d)" in printed
    assert "step 20/20" in printed


def test_a_resumed_run_is_not_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write("train", 1, **STEP)
    with ProgressPrinter(path):
        MetricsLog(path).write("start", 1, total_steps=2, world_size=1, sharding="replicate")
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["resumed after step 1: 1 worker(s), base in replicate"]


def test_a_torn_line_is_not_told_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with ProgressPrinter(path):
        path.write_text('{"kind": "tra{"kind": "start"}\n[1]\n\n')
        MetricsLog(path).write("start", 0, total_steps=2, world_size=1, sharding="replicate")
    assert capsys.readouterr().out.splitlines() == ["started: 1 worker(s), base in replicate"]


def test_a_line_that_is_still_being_written_is_told_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    path.write_text('{"kind": "stop", "st')
    assert list(reader.read()) == []
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert list(reader.read()) == [{"kind": "stop", "step": 3}]
    assert list(reader.read()) == []


def test_a_line_for_which_there_is_room_in_part_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("train", 1, **STEP)
    with file_limit(path.stat().st_size + 9):
        log.write("train", 2, **STEP)
        assert not path.read_bytes().endswith(b"\n")
        log.write("train", 3, **STEP)
    log.write("train", 4, **STEP)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_torn_line_of_a_killed_writer_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    MetricsLog(path).write("train", 2, **STEP)
    torn, whole = path.read_text().splitlines()
    assert torn == '{"kind": "train", "st'
    assert json.loads(whole)["step"] == 2


def test_lines_that_could_not_be_written_come_later_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    log = MetricsLog(folder / "metrics.jsonl")
    log.write("train", 1, **STEP)
    log.write("train", 2, **STEP)
    folder.mkdir()
    log.write("train", 3, **STEP)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
