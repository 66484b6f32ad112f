"""The time of a step by phase, the utilisation, and a trace of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch.distributed as dist
from gloo import GlooPool

from s2ft_ray.method import sharded
from s2ft_ray.training import collectives, worker
from s2ft_ray.training.progress import describe_speed

DELAY_S = 0.2
PHASES = ("data", "forward", "backward", "clip", "optimizer", "write_back", "agree")


def total_of(line: dict[str, float]) -> float:
    """Seconds of all phases of a step."""
    return sum(line[f"{name}_seconds"] for name in (*PHASES, "checkpoint"))


def seconds_around(line: dict[str, float]) -> float:
    """Seconds of the phases that communication lies in."""
    around = ("forward", "backward", "agree", "write_back")
    return sum(line[f"{name}_seconds"] for name in around)


def test_a_run_tells_where_its_time_went_and_leaves_a_trace(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base")
    checkpoint = {"every_steps": 2, "storage_path": str(tmp_path / "runs")}
    run = runs.make_run(tmp_path / "run", base, tracking={"profile": True}, checkpoint=checkpoint)
    two.run(runs.train, run.path)
    for line in runs.read_metrics(run, "train"):
        phases = [line[f"{name}_seconds"] for name in PHASES]
        assert min(phases) > 0
        seconds = line["step_seconds"] + line["data_seconds"]
        assert 0.8 * seconds < sum(phases) <= seconds
        assert line["agree_seconds"] < line["communication_seconds"] < seconds_around(line)
        assert 0 < line["model_flop_utilisation"] < 1
    (end,) = runs.read_metrics(run, "end")
    assert sum(end[f"{name}_share"] for name in (*PHASES, "checkpoint")) == pytest.approx(1)
    # The checkpoints of steps 2 and 4 are told with the steps after them.
    lines = runs.read_metrics(run, "train")
    assert [line["checkpoint_seconds"] > 0 for line in lines] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    # The last checkpoint is no step's: it is in the run's time alone, however long the disk took.
    num_tokens = sum(line["tokens_per_s"] * line["step_seconds"] for line in lines)
    seconds = num_tokens / end["mean_tokens_per_s"]
    assert seconds > sum(map(total_of, lines))
    communication = sum(line["communication_seconds"] for line in lines)
    assert end["communication"] == pytest.approx(communication / seconds)
    used = sum(line["model_flop_utilisation"] * total_of(line) for line in lines)
    assert end["mean_model_flop_utilisation"] == pytest.approx(used / seconds)
    described = describe_speed(end)
    for part in ("tokens/s, ", "of a large matmul's FLOP/s; ", "forward", "in communication"):
        assert part in described
    traces = sorted(path.name for path in (run.path / "profile").iterdir())
    assert traces == ["rank0.json", "rank1.json"]
    events = json.loads((run.path / "profile" / "rank0.json").read_text())["traceEvents"]
    assert any("AllGather" in str(e.get("name")) or "gather" in str(e.get("name")) for e in events)


class Slowed:
    """Calls a function after a pause; counts the calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.num_calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        time.sleep(DELAY_S)
        self.num_calls += 1
        return self._function(*args, **options)


def train_with_slow_write_backs(path: Path) -> int:
    """Train where a write-back's gathers take a pause longer; return how many there were."""
    slow = Slowed(dist.all_gather_single)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "dist", SimpleNamespace(all_gather_single=slow))
        runs.train(path)
    return slow.num_calls


def train_with_slow_groups(path: Path) -> int:
    """The same of the reductions among the groups of hybrid."""
    real = dist.all_reduce
    slow = Slowed(real)

    def reduce(*args: Any, group: Any = None, **options: Any) -> Any:
        return (slow if group is not None else real)(*args, group=group, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", reduce)
        runs.train(path)
    return slow.num_calls


@pytest.mark.parametrize(
    ("train", "mode", "group"),
    [
        (train_with_slow_write_backs, "replicate", None),
        (train_with_slow_write_backs, "full", None),
        (train_with_slow_groups, "hybrid", 2),
        (train_with_slow_groups, "hybrid", 1),  # nothing to scatter in a group
    ],
)
def test_communication_has_the_write_backs_gathers_and_the_reductions_among_groups(
    four: GlooPool, tmp_path: Path, train: Callable[[Path], int], mode: str, group: int | None
) -> None:
    base = runs.save_base(tmp_path / "base")
    parallel = {"num_workers": 4, "sharding": mode, "shard_group": group}
    run = runs.make_run(tmp_path / "run", base, optim={"max_steps": 2}, parallel=parallel)
    num_calls = four.run(train, run.path)[0]
    lines = runs.read_metrics(run, "train")
    each = num_calls // len(lines)
    assert each >= 1
    for line in lines:
        assert each * DELAY_S <= line["communication_seconds"] < seconds_around(line)


def train_with_slow_evaluations(path: Path) -> int:
    """Train where an evaluation's gathers take a pause longer; return how many there were."""
    evaluate, gather = worker.evaluate, collectives.DefaultAllGather.__call__
    slow = Slowed(gather)

    def evaluate_slowly(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                collectives.DefaultAllGather, "__call__", lambda *args, **kw: slow(*args, **kw)
            )
            return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "evaluate", evaluate_slowly)
        runs.train(path)
    return slow.num_calls


def test_an_evaluations_gathers_are_no_steps_communication(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base")
    run = runs.make_run(
        tmp_path / "run",
        base,
        optim={"max_steps": 3},
        parallel={"num_workers": 2, "sharding": "full"},
        evaluation={"every_steps": 1, "num_samples": 0},
    )
    assert min(two.run(train_with_slow_evaluations, run.path)) > 3
    for line in runs.read_metrics(run, "train"):
        assert line["communication_seconds"] < seconds_around(line)
