"""What each rank runs for test_calibration.py: statistics and selections, shared or alone."""

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from s2ft_ray.errors import ConfigError
from s2ft_ray.method import S2FTConfig, SharedCalibration, choose, convert
from s2ft_ray.method.calibration import activation_norms, gradient_norms
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.training import conversion
from s2ft_ray.training.parallel import decoder_layers

MEASURES = {"activation": activation_norms, "gradient": gradient_norms}


def build_model(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 41,
    }
    if kind == "experts":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def build_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of unequal sizes."""
    batches = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 41, (1 + number % 3, 5 + number), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def select(kind: str, selection: str, count: int) -> Any:
    """The selection as a document: the same on every rank, whatever their number."""
    config = S2FTConfig(budgets={"o": 0.25, "v": 0.5, "down": 0.1}, selection=selection)
    shared = SharedCalibration(build_batches(count))
    return convert(build_model(kind), config, calibration=shared).to_json()


def choose_sharded(kind: str, selection: str, count: int) -> Any:
    """The same of a model that the ranks hold together."""
    config = S2FTConfig(budgets={"o": 0.25, "v": 0.5, "down": 0.1}, selection=selection)
    shared = SharedCalibration(build_batches(count))
    return choose(shard(build_model(kind)), config, shared).to_json()


def choose_weights_sharded(kind: str) -> Any:
    config = S2FTConfig(budgets={"o": 0.25, "v": 0.5, "down": 0.1}, selection="weight")
    return choose(shard(build_model(kind)), config).to_json()


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def measure(kind: str, statistic: str, count: int, is_sharded: bool) -> dict[Any, torch.Tensor]:
    """The norms to the bit; `is_sharded`: of a plain model that the ranks hold together."""
    model = build_model(kind)
    if is_sharded:
        shard(model)
    return MEASURES[statistic](model, Decoder(model), SharedCalibration(build_batches(count)))


def train_and_watch(path: Path) -> list[tuple[bool, bool]]:
    """Train a run; tell of each `choose` in it whether its model was sharded, and is gone."""
    models = []

    def watch(model: Any, *rest: Any) -> Any:
        is_sharded = all(isinstance(p, DTensor) for p in model.parameters())
        models.append((is_sharded, weakref.ref(model)))
        return choose(model, *rest)

    def load(*args: Any, **options: Any) -> Any:
        assert all(ref() is None for _, ref in models), "two bases at once"
        return load_base_model(*args, **options)

    load_base_model = conversion.load_base_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "choose", watch)
        patch.setattr(conversion, "load_base_model", load)
        runs.train(path)
    return [(is_sharded, ref() is None) for is_sharded, ref in models]


def train_with_a_fault(path: Path, call: int) -> str:
    """Train a run whose base can't be loaded by the last rank at its `call`-th time."""
    load_base_model, calls = conversion.load_base_model, 0

    def load(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and dist.get_rank() == dist.get_world_size() - 1:
            raise ConfigError("model.name_or_path: can't be read here")
        return load_base_model(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "load_base_model", load)
        try:
            runs.train(path)
        except ConfigError as error:
            return str(error)
    return "none"


class Chosen(Exception):  # noqa: N818 - it ends a run
    """The rest of the run isn't looked at."""


def choose_and_measure(path: Path) -> dict[str, float]:
    """Return the MiB in tensors that choosing takes in a run, beside the worker's shard."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))
    from benchmarks.allocations import Allocations

    found = {}

    def watch(model: Any, *rest: Any) -> Any:
        with Allocations() as allocations:
            choose(model, *rest)
        mib = {n: p.numel() * p.element_size() / 2**20 for n, p in model.named_parameters()}
        found["peak"] = allocations.peak / 2**20
        found["shard"] = sum(p.to_local().nbytes for p in model.parameters()) / 2**20
        found["whole"] = sum(mib.values())
        found["largest"] = max(mib.values())
        found["layer"] = sum(size for name, size in mib.items() if ".layers.0." in name)
        raise Chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "choose", watch)
        with pytest.raises(Chosen):
            runs.train(path)
    return found
