"""The time of a step by phase, the utilisation, and a trace of it."""

import json
from pathlib import Path

import pytest
import runs
from gloo import GlooPool

from s2ft_ray.training.progress import describe_speed

PHASES = ("data", "forward", "backward", "clip", "optimizer", "write_back", "agree")


def test_a_run_tells_where_its_time_went_and_leaves_a_trace(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base")
    run = runs.make_run(tmp_path / "run", base, tracking={"profile": True})
    two.run(runs.train, run.path)
    for line in runs.read_metrics(run, "train"):
        phases = [line[f"{name}_seconds"] for name in PHASES]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(line["step_seconds"] + line["data_seconds"], rel=0.2)
        assert 0 < line["model_flop_utilisation"] < 1
    (end,) = runs.read_metrics(run, "end")
    assert sum(end[f"{name}_share"] for name in PHASES) == pytest.approx(1)
    assert "tokens/s; " in describe_speed(end)
    traces = sorted(path.name for path in (run.path / "profile").iterdir())
    assert traces == ["rank0.json", "rank1.json"]
    events = json.loads((run.path / "profile" / "rank0.json").read_text())["traceEvents"]
    assert any("AllGather" in str(e.get("name")) or "gather" in str(e.get("name")) for e in events)
