"""Every layout of the weights: the same losses, and what each holds and moves, as estimated."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from gloo import GlooPool
from transformers import MixtralConfig

from s2ft_ray.bases import load_model_config
from s2ft_ray.method import Adapter
from s2ft_ray.training import parallel, worker
from s2ft_ray.training.memory import (
    estimate_checkpoint,
    estimate_memory,
    estimate_traffic,
    measure_base,
)
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.traffic import TrafficCounter

JOBS = Path(__file__).parents[2] / "jobs"
MODES = ("replicate", "full", "hybrid")
# Nothing in it divides by the workers: neither the rows of a weight nor the selected ones.
UNEVEN = {"hidden_size": 30, "intermediate_size": 37}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"), **UNEVEN)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def make_run(folder: Path, base: Path, mode: str, **sections: Any) -> RunFolder:
    parallel = {"num_workers": 4, "sharding": mode, "shard_group": 2}
    return runs.make_run(folder, base, parallel=parallel, **sections)


def differences(left: RunFolder, right: RunFolder) -> tuple[float, float]:
    """Largest difference of a loss, and of a delta."""
    losses = [[line["loss"] for line in runs.read_metrics(run, "train")] for run in (left, right)]
    ours, theirs = Adapter.load(left.adapter).slices, Adapter.load(right.adapter).slices
    deltas = [float((part.delta - theirs[name].delta).abs().max()) for name, part in ours.items()]
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), max(deltas)


def test_all_layouts_train_alike_on_uneven_sizes(
    four: GlooPool, tmp_path: Path, base: Path
) -> None:
    made = {}
    budgets = {"o": 0.3, "v": 0.3, "up": 0.08, "down": 0.01}  # one column of down
    for mode in MODES:
        made[mode] = make_run(tmp_path / mode, base, mode, method={"budgets": budgets})
        four.run(runs.train, made[mode].path)
    for mode in ("full", "hybrid"):
        loss, delta = differences(made["replicate"], made[mode])
        assert loss < 1e-5
        assert delta < 1e-5


def test_experts_train_alike_in_every_layout_and_their_gradients_are_clipped(
    four: GlooPool, tmp_path: Path, home: Path
) -> None:
    # grouped_mm wants strides of 16 bytes
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    base = runs.save_base(tmp_path / "base", kind=MixtralConfig, num_experts_per_tok=2, **sizes)
    made = {}
    for mode in MODES:
        optim = {"max_grad_norm": 0.05}
        made[mode] = make_run(tmp_path / mode, base, mode, optim=optim)
        four.run(train_at_home, made[mode].path, home)
        norms = [line["grad_norm"] for line in runs.read_metrics(made[mode], "train")]
        assert min(norms) > 0.05
    assert any("experts" in name for name in Adapter.load(made["full"].adapter).slices)
    for mode in ("full", "hybrid"):
        loss, delta = differences(made["replicate"], made[mode])
        assert loss < 1e-5
        assert delta < 1e-5


def train_at_home(path: Path, home: Path, free_bytes: int | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2FT_HOME", str(home))
        if free_bytes is not None:
            patch.setattr(worker.Workers, "free_bytes", lambda _: free_bytes)
        runs.train(path)


@pytest.mark.parametrize(("free_kib", "expected"), [(10_000, "replicate"), (100, "full")])
def test_auto_decides_by_what_is_free_and_the_run_keeps_to_it(
    two: GlooPool, tmp_path: Path, home: Path, base: Path, free_kib: int, expected: str
) -> None:
    run = make_run(tmp_path / "run", base, "auto")
    two.run(train_at_home, run.path, home, free_kib * 1024)
    world = run.read_json("world.json")
    assert world is not None
    assert world["sharding"] == expected
    assert Adapter.load(run.adapter).slices


def test_a_hybrid_run_resumes_in_groups_of_another_size(
    two: GlooPool, four: GlooPool, tmp_path: Path, base: Path
) -> None:
    whole, cut = (make_run(tmp_path / name, base, "hybrid") for name in ("whole", "cut"))
    four.run(runs.train, whole.path)
    four.run(stop_after_one_step, cut.path)
    cut.clear_stop()
    two.run(runs.train, cut.path)
    assert differences(whole, cut)[1] < 1e-5


def stop_after_one_step(path: Path) -> None:
    RunFolder(path).request_stop("test")
    with pytest.raises(worker.Preempted):
        runs.train(path)


def measure(path: Path) -> dict[str, int]:
    """Train; return what this worker's second step receives, and what it holds after it."""
    real = worker.train_step
    seen: dict[str, int] = {}

    def measured(model: Any, optimizer: Any, *args: Any, number: int, **rest: Any) -> Any:
        if number != 1:
            return real(model, optimizer, *args, number=number, **rest)
        with TrafficCounter() as traffic:
            result = real(model, optimizer, *args, number=number, **rest)
        seen.update(traffic.received)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        seen["base"] = sum(local_bytes(p) for p in frozen)
        states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        trained = [p for p in model.parameters() if p.requires_grad]
        seen["slices"] = 2 * sum(map(local_bytes, trained)) + sum(map(local_bytes, states))
        return result

    worker.train_step = measured
    try:
        runs.train(path)
    finally:
        worker.train_step = real
    return seen


def test_hybrid_takes_the_workers_of_a_node_as_a_group_and_tells(
    four: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 4, "sharding": "hybrid"})
    told, *others = four.run(train_on_nodes_of_two, run.path)
    assert "the base is in hybrid on 4 workers: as configured in groups of 2" in told
    assert "3 of 3 layers are laid out" in told
    assert others == [[], [], []]


def train_on_nodes_of_two(path: Path) -> list[str]:
    """Train as if two of the four workers stood on each node; return what the log says."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("s2ft_ray.training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr(parallel, "PROGRESS_S", 0.0)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            runs.train(path)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    return [text for text in told if "the base is in" in text or "laid out" in text]


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("mode", MODES)
def test_the_estimates_are_what_a_run_holds_and_receives(
    four: GlooPool, tmp_path: Path, mode: str
) -> None:
    base = runs.save_base(
        tmp_path / "base", hidden_size=64, intermediate_size=160, num_attention_heads=8, head_dim=8
    )
    budgets = {"o": 0.25, "v": 0.5, "down": 0.1}
    run = make_run(tmp_path / "run", base, mode, method={"budgets": budgets})
    measured = four.run(measure, run.path)
    config = run.load_config()
    model_config = load_model_config(config.model)
    trained = Adapter.load(run.adapter).num_parameters
    size = measure_base(config, model_config)
    layout = worker.Layout.of(mode, 4, 2)  # type: ignore[arg-type]
    memory = estimate_memory(config, model_config, size, trained, 64, layout)
    held = [rank["base"] for rank in measured]
    # FSDP pads a weight to equal shards: a little more than a share.
    assert memory.base <= max(held) <= 1.1 * memory.base
    state = max(rank["slices"] for rank in measured)
    assert state == pytest.approx(16 * trained / layout.slice_shards, rel=0.25)
    traffic = estimate_traffic(config, size, trained, layout)
    gathered = max(rank["gather"] for rank in measured)
    assert gathered == pytest.approx(traffic.gathered, rel=0.25)
    # Beside the slices a few scalars are reduced: the loss, the norm of the gradient.
    reduced = max(rank["reduce_scatter"] + rank["all_reduce"] for rank in measured)
    assert reduced == pytest.approx(traffic.reduced, rel=0.35)
    saved = sum(p.stat().st_size for p in (run.checkpoints / "step-00000006").glob("*.distcp"))
    pieces = 4 * 4 * len(Adapter.load(run.adapter).slices)  # a header each, 1.5 kB
    assert 0 < saved - estimate_checkpoint(trained) < 2_000 * pieces


@pytest.mark.parametrize("loss", ["cross_entropy", "dpo"])
@pytest.mark.parametrize("mode", ["replicate", "full"])
def test_the_traffic_of_an_objective_is_as_estimated(
    two: GlooPool, tmp_path: Path, mode: str, loss: str
) -> None:
    base = runs.save_base(tmp_path / "base")
    pairs = [{"prompt": f"{n}", "chosen": " yes", "rejected": " no"} for n in range(20)]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = runs.make_run(
        tmp_path / "run",
        base,
        parallel={"num_workers": 2, "sharding": mode},
        objective={"loss": loss},
        method={"budgets": {"o": 0.3, "down": 0.08}},
        optim={"max_steps": 2},  # of two micro-batches on each worker
        **({"data": {"train": str(rows), "format": "preference"}} if loss == "dpo" else {}),
    )
    measured = two.run(measure, run.path)
    config = run.load_config()
    size = measure_base(config, load_model_config(config.model))
    trained = Adapter.load(run.adapter).num_parameters
    layout = worker.Layout.of(mode, 2, 1)  # type: ignore[arg-type]
    estimate = estimate_traffic(config, size, trained, layout)
    gathered = max(rank["gather"] for rank in measured)
    assert gathered == pytest.approx(estimate.gathered, rel=0.05)


def train_in_the_benchmark(mode: str) -> tuple[int, int]:
    """Return the peak of a step in bytes, and what is said of it before."""
    sys.path.insert(0, str(JOBS))
    from benchmarks.sharding import train_in

    arguments = argparse.Namespace(layers=4, width=256, rows=8, steps=4)
    layout = worker.Layout.of(mode, 4, 2)  # type: ignore[arg-type]
    seen = train_in(layout, worker.Workers.join(torch.device("cpu")), arguments)
    return seen.peak, seen.estimate


@pytest.mark.parametrize("mode", MODES)
def test_the_peak_of_a_step_is_as_estimated(four: GlooPool, mode: str) -> None:
    for peak, estimate in four.run(train_in_the_benchmark, mode):
        # How many layers are whole at one time depends on when the gathered ones arrive.
        assert peak <= 1.05 * estimate
        assert estimate <= 1.25 * peak
