"""What each rank runs for test_calibration.py: statistics and selections, shared or alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from s2ft_ray.method import S2FTConfig, SharedCalibration, choose, convert
from s2ft_ray.method.calibration import activation_norms, gradient_norms
from s2ft_ray.method.decoder import Decoder
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
