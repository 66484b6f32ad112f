"""Which layout `auto` takes, and why."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft_ray.config import ParallelConfig
from s2ft_ray.training import parallel
from s2ft_ray.training.layout import MIB, resolve_layout
from s2ft_ray.training.memory import MemoryEstimate
from s2ft_ray.training.parallel import Layout, Workers, shard_model

NEEDS = {"replicate": 1000, "hybrid": 400, "full": 150}  # MiB


def estimate(layout: Layout) -> MemoryEstimate:
    return MemoryEstimate(NEEDS[layout.sharding] * MIB, 0, 0, 0)


def resolve(free_mib: int, node_group: int, **parallel: object) -> tuple[Layout, str]:
    config = ParallelConfig.model_validate({"num_workers": 8, **parallel})
    return resolve_layout(config, 8, node_group, free_mib * MIB, estimate)


@pytest.mark.parametrize(
    ("free_mib", "node_group", "expected"),
    [
        (1200, 4, Layout("replicate", 8, 1)),
        (1100, 4, Layout("hybrid", 8, 4)),  # a tenth stays free
        (1100, 8, Layout("full", 8, 8)),  # one node: hybrid would be full
        (1100, 1, Layout("full", 8, 8)),  # a worker a node: hybrid would be replicate
        (300, 4, Layout("full", 8, 8)),
        (100, 4, Layout("full", 8, 8)),
    ],
)
def test_auto_takes_the_first_that_fits(free_mib: int, node_group: int, expected: Layout) -> None:
    assert resolve(free_mib, node_group)[0] == expected


def test_auto_says_why() -> None:
    assert resolve(300, 4)[1] == (
        "about 150 MiB a worker fits into 90% of the 300 MiB free;"
        " replicate would take 1,000; hybrid would take 400"
    )
    assert "is the smallest, though it may not fit" in resolve(100, 4)[1]


def test_what_is_configured_is_taken_whatever_is_free() -> None:
    layout, reason = resolve(1, 8, sharding="hybrid", shard_group=2)
    assert layout == Layout("hybrid", 8, 2)
    assert layout.slice_shards == 2
    assert reason == "as configured in groups of 2"


def test_a_resized_run_takes_groups_that_divide_its_workers() -> None:
    config = ParallelConfig(num_workers=(1, 8), sharding="hybrid", shard_group=4)
    assert resolve_layout(config, 6, 6, MIB, estimate)[0] == Layout("hybrid", 6, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_module_is_sharded_over_a_mesh_of_the_workers_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a mesh fully_shard takes the GPU wherever there is one, for workers on the CPU too.
    meshes: list[object] = []
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda kind, shape, **_: (kind, shape))
    monkeypatch.setattr(parallel, "fully_shard", lambda _, *, mesh=None, **__: meshes.append(mesh))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    workers = Workers.join(torch.device(device))
    kind = workers.device.type
    for sharding, shape in (("replicate", (4,)), ("full", (4,)), ("hybrid", (2, 2))):
        meshes.clear()
        shard_model(model, workers, Layout.of(sharding, 4, 2))  # type: ignore[arg-type]
        assert len(meshes) >= 2
        assert set(meshes) == {(kind, shape)}
