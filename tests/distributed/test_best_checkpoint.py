"""Early stopping and the choice of the best step, interrupted or not."""

from pathlib import Path
from typing import Any

import pytest
import runs
from gloo import GlooPool

from s2ft_ray.errors import Preempted
from s2ft_ray.method import Adapter
from s2ft_ray.training import worker
from s2ft_ray.training.evaluation import EvalResult, Standing
from s2ft_ray.training.run_folder import RunFolder

# Held-out losses by step, two steps between them: the best is at step 4.
LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 3.0, 8: 4.0, 10: 3.5, 12: 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


def train_with_given_losses(path: Path, stop_at: int | None = None) -> str:
    """Train with the evaluations' losses given; a stop is asked at a step."""
    real_step, real_evaluate = worker.train_step, worker.evaluate
    done = [0]

    def step(*args: Any, number: int, **rest: Any) -> Any:
        if number + 1 == stop_at:
            RunFolder(path).request_stop("test")
        done[0] = number + 1
        return real_step(*args, number=number, **rest)

    worker.train_step = step
    worker.evaluate = lambda *_: EvalResult(LOSSES[done[0]], 1.0, 0.5, 10)
    try:
        runs.train(path)
    except Preempted:
        return "preempted"
    finally:
        worker.train_step, worker.evaluate = real_step, real_evaluate
    return "finished"


def make_run(folder: Path, base: Path, max_steps: int, **sections: Any) -> RunFolder:
    checkpoints = {"every_steps": 2, "keep": 1, "storage_path": str(folder / "runs")}
    return runs.make_run(
        folder,
        base,
        optim={"max_steps": max_steps, "schedule": "constant"},
        evaluation={"every_steps": 2, **sections.get("evaluation", {})},
        checkpoint={**checkpoints, **sections.get("checkpoint", {})},
    )


def test_the_best_step_becomes_the_adapter_and_patience_ends_the_run(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    short = make_run(tmp_path / "short", base, 4)
    two.run(train_with_given_losses, short.path)
    wanted = Adapter.load(short.adapter).fingerprint
    sections = {"evaluation": {"patience": 3}, "checkpoint": {"select": "best"}}
    whole = make_run(tmp_path / "whole", base, 12, **sections)
    two.run(train_with_given_losses, whole.path)
    cut = make_run(tmp_path / "cut", base, 12, **sections)
    assert two.run(train_with_given_losses, cut.path, 7) == ["preempted"] * 2
    cut.clear_stop()
    two.run(train_with_given_losses, cut.path)
    for run in (whole, cut):
        assert runs.read_metrics(run, "end")[-1]["step"] == 10  # three worse after step 4
        adapter = Adapter.load(run.adapter)
        assert adapter.fingerprint == wanted
        assert adapter.training["steps"] == 4
        names = sorted(path.name for path in run.checkpoints.iterdir())
        assert names == ["step-00000004", "step-00000010"]


def test_without_patience_the_last_step_is_the_adapter(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = make_run(tmp_path, base, 6)
    one.run(train_with_given_losses, run.path)
    assert Adapter.load(run.adapter).training["steps"] == 6
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]


def test_an_equal_loss_is_no_better_one() -> None:
    standing = Standing()
    assert [standing.add(loss, step) for step, loss in LOSSES.items()] == [
        True, True, True, False, False, False, True
    ]  # fmt: skip
    assert (standing.step, standing.num_worse) == (12, 0)
