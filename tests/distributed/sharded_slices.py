"""What each rank runs for test_write_back.py: a converted model under fully_shard, and alone."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from s2ft_ray.method import S2FTConfig, base_fingerprint, convert, extract_adapter, slice_layers
from s2ft_ray.method.weights import gather

ALL = ("q", "k", "v", "o", "up", "gate", "down")
# 87 channels and 6 rows of k and v divide by neither 2 nor 4; one channel leaves ranks empty.
BUDGETS = {"even": 0.5, "uneven": 0.3, "single": 1e-9}
FULL_PRECISION = MixedPrecisionPolicy()


def build_model(share: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=36,
        intermediate_size=87,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=2,
        vocab_size=41,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 5)
    model.to(dtype)
    convert(model, S2FTConfig(budgets=dict.fromkeys(ALL, BUDGETS[share])))
    return model


def build_kind(kind: str) -> Any:
    """A model of another kind of weight; sizes that neither 2 nor 4 divides."""
    torch.manual_seed(0)
    budgets = dict.fromkeys(ALL, 0.3)
    layout = "gathered"
    if kind == "transposed":
        del budgets["gate"]
        sizes = {"n_embd": 36, "n_inner": 87, "n_layer": 2, "n_head": 9, "vocab_size": 41}
        model: Any = GPT2LMHeadModel(
            GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, use_cache=False)
        )
    elif kind == "experts":
        model = MixtralForCausalLM(
            MixtralConfig(
                hidden_size=32,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=3,
                vocab_size=41,
            )
        )
    else:
        assert kind == "permuted"
        layout = "permuted"
        config = LlamaConfig(
            hidden_size=36,
            intermediate_size=87,
            num_hidden_layers=2,
            num_attention_heads=9,
            vocab_size=41,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 5)
    convert(model, S2FTConfig(budgets=budgets, layout=layout))
    return model


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(0, 41, (2, 7), generator=generator)
    logits = model(ids).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return loss / 50


def shard(model: nn.Module, mode: str, policy: MixedPrecisionPolicy = FULL_PRECISION) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    ignored = frozen if mode == "replicate" else None
    names = set(model._no_split_modules)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in [*layers, model]:
        fully_shard(layer, mesh=mesh, ignored_params=ignored, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(mode: str, share: str, dtype: torch.dtype, steps: int = 3) -> dict[str, Any]:
    """Train sharded over the ranks. Return the whole state, and the adapter of this rank."""
    model = build_model(share, dtype)
    shard(model, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    empty = 0
    for step in range(steps):
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in slice_layers(model):
            assert isinstance(layer.slice, DTensor), name
            assert isinstance(layer.weight, DTensor) == (mode == "full"), name
            empty += layer.slice.to_local().numel() == 0
            held = whole(layer.weight).index_select(layer.dim, layer.indices)
            assert torch.equal(held, whole(layer.slice).to(dtype)), f"{name} is stale"
    adapter = extract_adapter(model)
    assert base_fingerprint(model) == adapter.base.fingerprint
    return {
        "state": {name: whole(value) for name, value in model.state_dict().items()},
        "deltas": {name: part.delta for name, part in adapter.slices.items()},
        "fingerprint": adapter.fingerprint,
        "empty": empty,
    }


def train_kind(kind: str, mode: str | None, steps: int = 3) -> tuple[str, list[Tensor]]:
    """Train sharded over the ranks, or alone what they see; return the adapter and the losses."""
    model = build_kind(kind)
    ranks = range(dist.get_world_size())
    if mode is not None:
        shard(model, mode)
        ranks = range(dist.get_rank(), dist.get_rank() + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        for rank in ranks:
            loss = loss_of(model, step, rank)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in slice_layers(model):
            held = gather(whole(layer.weight), layer.dim, layer.place)
            assert torch.equal(held, whole(layer.slice)), f"{name} is stale"
    adapter = extract_adapter(model)
    assert base_fingerprint(model) == adapter.base.fingerprint
    assert any(bool(part.delta.any()) for part in adapter.slices.values())
    return adapter.fingerprint, losses


def train_alone(share: str, dtype: torch.dtype, steps: int = 3) -> dict[str, Any]:
    """Train in one process that accumulates what the ranks see."""
    model = build_model(share, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        for rank in range(dist.get_world_size()):
            loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = extract_adapter(model)
    return {
        "state": copy.deepcopy(model.state_dict()),
        "deltas": {name: part.delta for name, part in adapter.slices.items()},
        "fingerprint": adapter.fingerprint,
    }


def extract_after_evaluation(mode: str) -> tuple[str, str]:
    """Extract before and after a forward that leaves parameters gathered, and rounded to bf16."""
    model = build_model("uneven", torch.float32)
    for _, layer in slice_layers(model):
        layer.slice.data.add_(1e-4)
        layer.write_back()
    expected = extract_adapter(model).fingerprint
    shard(model, mode, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    model.set_reshard_after_forward(False)
    with torch.no_grad():
        loss_of(model, 0, 0)
    assert {layer.slice.dtype for _, layer in slice_layers(model)} == {torch.bfloat16}
    return expected, extract_adapter(model).fingerprint


def refresh_from_changed_weights(mode: str) -> None:
    """Change the weights in place, refresh, and compare the slices to the weights."""
    model = build_model("uneven", torch.float32)
    shard(model, mode)
    for name, layer in slice_layers(model):
        weight = layer.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        with torch.no_grad():
            local.mul_(1.5)
        layer.refresh()
        held = whole(weight).index_select(layer.dim, layer.indices)
        assert torch.equal(whole(layer.slice), held), name
