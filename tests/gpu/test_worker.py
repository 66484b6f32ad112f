"""The training worker on a GPU: NCCL, FSDP2 and checkpoints, as Ray Train starts it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
from gloo import GlooPool

from s2ft_ray.errors import Preempted
from s2ft_ray.method import Adapter
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.worker import run_worker

DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def nccl() -> Iterator[None]:
    if not torch.cuda.is_available():  # pytest makes it before it looks at the marks
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=where, rank=0, world_size=1, device_id=DEVICE)
    yield
    dist.destroy_process_group()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[RunFolder]:
    """The run that nothing is asked of, on the CPU."""
    pool = GlooPool(1)
    run = runs.make_run(tmp_path_factory.mktemp("cpu"), base)
    pool.run(runs.train, run.path)
    yield run
    pool.close()


def train(folder: Path, base: Path, **sections: Any) -> RunFolder:
    run = runs.make_run(folder, base, **sections)
    run_worker(run.path, DEVICE, 1)
    return run


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in runs.read_metrics(run, "train")]


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_a_run_learns_what_the_cpu_learns(
    tmp_path: Path, base: Path, on_cpu: RunFolder, sharding: str
) -> None:
    run = train(tmp_path, base, parallel={"sharding": sharding})
    assert json.loads((run.path / "world.json").read_text())["device"] != "cpu"
    assert len(losses(on_cpu)) == 6
    assert losses(run) == pytest.approx(losses(on_cpu), abs=1e-4)
    ours, theirs = Adapter.load(run.adapter).slices, Adapter.load(on_cpu.adapter).slices
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert torch.equal(part.indices, theirs[name].indices)
        torch.testing.assert_close(part.delta, theirs[name].delta, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_is_stopped_ends_as_one_that_is_not(
    tmp_path: Path, base: Path, dtype: str
) -> None:
    model = {"name_or_path": str(base), "dtype": dtype}
    whole = train(tmp_path / "whole", base, model=model)
    run = runs.make_run(tmp_path / "stopped", base, model=model)
    asked: list[None] = []

    def is_draining() -> bool:
        asked.append(None)
        return len(asked) >= 3

    with pytest.raises(Preempted):
        run_worker(run.path, DEVICE, 1, is_draining)
    run_worker(run.path, DEVICE, 1)
    expected = Adapter.load(whole.adapter)
    assert Adapter.load(run.adapter).fingerprint == expected.fingerprint
    assert max(float(part.delta.abs().max()) for part in expected.slices.values()) > 0


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"packing": True, "max_seq_len": 128}},
        {"parallel": {"activation_checkpointing": True}},
        {"method": {"selection": "product"}},
        {"method": {"selection": "gradient"}},
        {"method": {"layout": "permuted"}},
        {"objective": {"label_smoothing": 0.1, "neftune_alpha": 0.5}},
        {"tracking": {"profile": True}},
    ],
    ids=lambda sections: "-".join(key for part in sections.values() for key in part),
)
def test_what_a_run_can_ask_for_runs(
    tmp_path: Path, base: Path, sections: dict[str, dict[str, Any]]
) -> None:
    model = {"name_or_path": str(base), "dtype": "bfloat16"}
    run = train(tmp_path, base, model=model, **sections)
    seen = losses(run)
    assert len(seen) == 6
    assert seen[-1] < seen[0]
    (end,) = runs.read_metrics(run, "end")
    assert end["mean_tokens_per_s"] > 0
    assert any(float(p.delta.abs().max()) > 0 for p in Adapter.load(run.adapter).slices.values())
