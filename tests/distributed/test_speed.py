"""The time of a step by phase, the utilisation, and a trace of it."""

import json
from pathlib import Path

import pytest
import runs
from gloo import GlooPool

from s2ft_ray.training.progress import describe_speed

PHASES = ("data", "forward", "backward", "clip", "optimizer", "write_back", "agree")


def total_of(line: dict[str, float]) -> float:
    """Seconds of all phases of a step."""
    return sum(line[f"{name}_seconds"] for name in (*PHASES, "checkpoint"))


def test_a_run_tells_where_its_time_went_and_leaves_a_trace(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base")
    checkpoint = {"every_steps": 2, "storage_path": str(tmp_path / "runs")}
    run = runs.make_run(tmp_path / "run", base, tracking={"profile": True}, checkpoint=checkpoint)
    two.run(runs.train, run.path)
    for line in runs.read_metrics(run, "train"):
        phases = [line[f"{name}_seconds"] for name in PHASES]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(line["step_seconds"] + line["data_seconds"], rel=0.2)
        # Within forward and backward, and the agreement itself.
        inside = line["forward_seconds"] + line["backward_seconds"] + line["agree_seconds"]
        assert line["agree_seconds"] < line["communication_seconds"] < inside
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
    seconds = sum(map(total_of, lines))
    told = sum(line["communication_seconds"] for line in lines) / seconds
    assert end["communication"] == pytest.approx(told, rel=0.5)  # the last checkpoint is no step's
    used = sum(line["model_flop_utilisation"] * total_of(line) for line in lines) / seconds
    assert end["mean_model_flop_utilisation"] == pytest.approx(used, rel=0.5)
    described = describe_speed(end)
    for part in ("tokens/s, ", "of a large matmul's FLOP/s; ", "forward", "in communication"):
        assert part in described
    traces = sorted(path.name for path in (run.path / "profile").iterdir())
    assert traces == ["rank0.json", "rank1.json"]
    events = json.loads((run.path / "profile" / "rank0.json").read_text())["traceEvents"]
    assert any("AllGather" in str(e.get("name")) or "gather" in str(e.get("name")) for e in events)
