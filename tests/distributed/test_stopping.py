"""A run that is asked to stop: all workers leave at the same step, and nothing is lost."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from gloo import GlooPool

from s2ft_ray.errors import ConfigError, Preempted
from s2ft_ray.method import Adapter
from s2ft_ray.training import worker
from s2ft_ray.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


def train_counting(path: Path, stop_at: int | None = None) -> tuple[list[int], list[float], str]:
    """Train; return this rank's lines, the losses, and how it ended. A stop is asked at a step."""
    real, run = worker.train_step, RunFolder(path)
    lines: list[int] = []
    losses: list[float] = []

    def counted(model: Any, optimizer: Any, step: Any, *, number: int, **rest: Any) -> Any:
        if number + 1 == stop_at and torch.distributed.get_rank() == 0:
            run.request_stop("test")
        result = real(model, optimizer, step, number=number, **rest)
        lines.extend(step.lines)
        losses.append(result.loss)
        return result

    worker.train_step = counted
    try:
        runs.train(path)
    except Preempted as error:
        return lines, losses, str(error)
    finally:
        worker.train_step = real
    return lines, losses, "finished"


def make_run(folder: Path, base: Path, **optim: int) -> RunFolder:
    return runs.make_run(folder, base, optim={"max_steps": 8, **optim})


def lines_of(results: list[tuple[list[int], list[float], str]]) -> Counter[int]:
    return Counter(line for lines, _, _ in results for line in lines)


def test_a_new_run_computes_with_as_many_threads_as_it_is_given(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = make_run(tmp_path, base)
    try:
        assert one.run(runs.train, run.path, 2) == [2]
    finally:
        one.run(torch.set_num_threads, 1)


def test_a_stopped_run_goes_on_bit_for_bit(two: GlooPool, tmp_path: Path, base: Path) -> None:
    whole, run = make_run(tmp_path / "whole", base), make_run(tmp_path / "cut", base)
    two.run(train_counting, whole.path)
    stopped = two.run(train_counting, run.path, 3)
    message = "stopped at step 3, checkpoint saved; --resume goes on"
    assert [end for _, _, end in stopped] == [message, message]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]
    assert runs.read_metrics(run, "stop")[0]["step"] == 3
    assert not run.adapter.exists()
    # Until the request is cleared, each start does one more step and leaves again.
    assert {end for _, _, end in two.run(train_counting, run.path)} == {message.replace("3", "4")}
    run.clear_stop()
    assert two.run(runs.train, run.path, 2) == [1, 1]  # its own threads: others round differently
    assert Adapter.load(run.adapter).fingerprint == Adapter.load(whole.adapter).fingerprint


def test_a_run_resized_at_each_stop_sees_every_row_once(
    one: GlooPool, two: GlooPool, four: GlooPool, tmp_path: Path, base: Path
) -> None:
    whole = make_run(tmp_path / "whole", base, micro_batch_size=4)
    expected = two.run(train_counting, whole.path)
    run = make_run(tmp_path / "resized", base, micro_batch_size=4)
    seen: Counter[int] = Counter()
    losses: list[float] = []
    # On four workers two have no row of a step's two micro-batches of four.
    for pool, stop_at in ((two, 2), (four, 5), (one, 7), (two, None)):
        results = pool.run(train_counting, run.path, stop_at)
        seen += lines_of(results)
        losses += results[0][1]
        run.clear_stop()
    assert seen == lines_of(expected)
    assert losses == pytest.approx(expected[0][1], abs=1e-5)
    ours, theirs = Adapter.load(run.adapter).slices, Adapter.load(whole.adapter).slices
    for name, part in ours.items():
        torch.testing.assert_close(part.delta, theirs[name].delta, atol=1e-5, rtol=0)


def drain_one_node(path: Path) -> str:
    """Train, with rank 1 alone told at the third step that a node of the group will go."""
    asked = []

    def is_draining() -> bool:
        asked.append(1)
        return torch.distributed.get_rank() == 1 and len(asked) >= 3

    try:
        worker.run_worker(path, torch.device("cpu"), 1, is_draining)
    except Preempted as error:
        return str(error)
    return "finished"


def test_what_one_worker_knows_of_a_drain_stops_all_at_one_step(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = make_run(tmp_path, base)
    message = "stopped at step 3, checkpoint saved; --resume goes on"
    assert two.run(drain_one_node, run.path) == [message, message]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]


def test_a_worker_that_does_not_see_the_run_says_so(two: GlooPool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"isn't there on node .*; name a folder that every node"):
        two.run(runs.train, tmp_path / "elsewhere")


def fail_alone(path: Path, name: str) -> str:
    """Train, with what `name` does failing on rank 1 alone, as on a node that lacks something."""
    function = name.rpartition(".")[2]

    def fail(*_: object, **__: object) -> None:
        raise ConfigError(f"{function}: not on this node")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(name, fail)
        try:
            runs.train(path)
        except ConfigError as error:
            return str(error)
    return "finished"


@pytest.mark.parametrize(
    "name",
    [
        "s2ft_ray.training.run_folder.RunFolder.check_reachable",
        "s2ft_ray.training.worker.load_tokenizer",
        "s2ft_ray.training.worker.load_model_config",
        "s2ft_ray.training.conversion.load_base_model",
        "s2ft_ray.training.worker.TrainLoader",
    ],
)
def test_what_one_worker_alone_lacks_all_say(
    two: GlooPool, tmp_path: Path, base: Path, name: str
) -> None:
    said = f"{name.rpartition('.')[2]}: not on this node"
    assert two.run(fail_alone, make_run(tmp_path, base).path, name) == [said, said]


def test_a_stop_at_the_last_step_changes_nothing(one: GlooPool, tmp_path: Path, base: Path) -> None:
    run = make_run(tmp_path, base)
    ((_, _, end),) = one.run(train_counting, run.path, 8)
    assert end == "finished"
    assert run.adapter.exists()


def test_a_preemption_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(Preempted(7)))
    assert (error.step, error.exit_code, error.faults) == (7, 3, Preempted(7).faults)
