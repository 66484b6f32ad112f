import json
import math
from pathlib import Path
from typing import Any

from s2ft_ray.registry.journal import Entry, Journal, MetricsFile, Point


def write(path: Path, *lines: dict[str, Any], tail: str = "") -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + tail)


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": 100.0 + step, **(values or {"loss": 1.0 / step})}


def test_points_are_read_once_while_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    assert metrics.read({}, 10) == []
    write(path, train(1), train(2))
    assert [point.step for point in metrics.read({}, 10)] == [1, 2]
    write(path, train(3))
    assert metrics.read({"train": 2}, 10) == [Point("train", 3, 103.0, {"loss": 1 / 3})]
    assert metrics.read({"train": 3}, 10) == []


def test_a_line_counts_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(train(2))
    write(path, train(1), tail=whole[:9])
    metrics = MetricsFile(path)
    assert [point.step for point in metrics.read({}, 10)] == [1]
    with path.open("a") as file:
        file.write(whole[9:] + "\n")
    assert [point.step for point in metrics.read({"train": 1}, 10)] == [2]


def test_steps_that_a_resumed_run_repeats_count_the_first_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1, loss=4.0), train(2, loss=3.0), train(3, loss=2.0))
    write(path, train(2, loss=3.5), train(3, loss=2.5), train(4, loss=1.0))
    points = MetricsFile(path).read({}, 10)
    assert [(point.step, point.values["loss"]) for point in points] == [
        (1, 4.0),
        (2, 3.0),
        (3, 2.0),
        (4, 1.0),
    ]


def test_kinds_count_their_steps_apart_and_other_lines_are_no_points(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    start = {"kind": "start", "step": 0, "time": 1.0, "world_size": 2}
    held = {"kind": "eval", "step": 1, "time": 2.0, "loss": 3.0, "samples": [{"prompt": "a"}]}
    write(path, start, train(1), train(2), held)
    points = MetricsFile(path).read({}, 10)
    assert [(point.kind, point.step) for point in points] == [
        ("train", 1),
        ("train", 2),
        ("eval", 1),
    ]
    assert points[2].values == {"loss": 3.0}


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), tail='{"kind": "train", "st\n[1]\n{"kind": "train", "step": "x"}\n\n')
    write(path, train(2))
    assert [point.step for point in MetricsFile(path).read({}, 10)] == [1, 2]


def test_only_numbers_become_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1, loss=math.nan, seen=True, note="x", count=3))
    values = MetricsFile(path).read({}, 10)[0].values
    assert set(values) == {"loss", "count"}
    assert math.isnan(values["loss"])


def test_a_read_is_bounded_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(train(step) for step in range(1, 8)))
    metrics = MetricsFile(path)
    reads = []
    last = 0
    while points := metrics.read({"train": last}, 3):
        reads.append([point.step for point in points])
        last = points[-1].step
    assert reads == [[1, 2, 3], [4, 5, 6], [7]]


def test_what_was_read_but_not_delivered_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), train(2))
    metrics = MetricsFile(path)
    metrics.read({}, 10)
    metrics.rewind()
    assert [point.step for point in metrics.read({"train": 1}, 10)] == [2]


def test_a_journal_survives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    first = Journal(path)
    assert first.is_new
    first.owe(Entry("tags", {"a": "1"}), Entry("status", {"status": "RUNNING", "time": 5.0}))
    first.begin("run-1")
    first.settle_entry()
    first.settle_points([Point("train", 7, 1.0, {}), Point("eval", 5, 1.0, {})])
    second = Journal(path)
    assert not second.is_new
    assert second.run_id == "run-1"
    assert second.started_at == 5.0
    assert second.last_steps == {"train": 7, "eval": 5}
    assert second.next_entry() == Entry("status", {"status": "RUNNING", "time": 5.0})
    second.settle_entry()
    assert second.next_entry() is None


def test_another_mlflow_run_is_owed_everything_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "tracking.json")
    journal.owe(Entry("tags", {"a": "1"}))
    journal.begin("run-1")
    journal.settle_entry()
    journal.settle_points([Point("train", 7, 1.0, {})])
    journal.begin("run-1")
    assert journal.next_entry() is None
    journal.begin("run-2")
    assert journal.next_entry() == Entry("tags", {"a": "1"})
    assert journal.last_steps == {}
