"""A converted model under somebody's loop: optimizers, accumulation, clipping, checkpointing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_models import ALL, assert_same_state, build_model, snapshot, tokens
from torch import Tensor, nn

from s2ft_ray.method import S2FTConfig, convert, restore, slice_layers

CONFIG = S2FTConfig(budgets=dict.fromkeys(ALL, 0.3))


def slices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_current(model: nn.Module) -> None:
    for name, layer in slice_layers(model):
        held = layer.weight.index_select(layer.dim, layer.indices)
        assert torch.equal(held, layer.slice.detach().to(layer.weight.dtype)), name


def loss_of(model: Any, seed: int = 1) -> Tensor:
    ids = tokens(seed)
    loss: Tensor = model(ids, labels=ids).loss
    return loss


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw-for": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_current_after_every_step(name: str, dtype: torch.dtype) -> None:
    model = build_model().to(dtype)
    before = snapshot(model)
    convert(model, CONFIG)
    assert all(parameter.dtype == torch.float32 for parameter in slices(model))
    optimizer = OPTIMIZERS[name](slices(model))
    for seed in range(3):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_current(model)
    state = model.state_dict()
    assert sum(not torch.equal(state[key], before[key]) for key in before) == 2 * 7
    for key, layer in slice_layers(model):
        frozen = torch.ones(layer.weight.shape, dtype=torch.bool).index_fill_(
            layer.dim, layer.indices, False
        )
        held = before[f"{key}.weight"][frozen]
        assert torch.equal(layer.weight[frozen], held), f"{key}: changed outside the slice"


def train_masked(model: Any, masks: dict[str, Tensor], steps: int) -> None:
    """Train whole weights whose gradient is masked: what a slice must be equal to."""
    weights = {name: model.get_submodule(name).weight for name in masks}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2, weight_decay=0)
    for step in range(steps):
        for micro in range(2):
            (loss_of(model, 2 * step + micro) / 2).backward()
        for name, weight in weights.items():
            weight.grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def test_accumulated_and_clipped_training_equals_masked_full_training() -> None:
    plain = build_model("qwen2")
    model = copy.deepcopy(plain)
    convert(model, CONFIG)
    masks = {
        name: torch.zeros(layer.weight.shape).index_fill_(layer.dim, layer.indices, 1)
        for name, layer in slice_layers(model)
    }
    optimizer = torch.optim.AdamW(slices(model), lr=1e-2, weight_decay=0)
    for step in range(4):
        for micro in range(2):
            (loss_of(model, 2 * step + micro) / 2).backward()
        torch.nn.utils.clip_grad_norm_(slices(model), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    train_masked(plain, masks, steps=4)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_weight_decay_reaches_the_slice_alone() -> None:
    model = build_model()
    before = snapshot(model)
    convert(model, S2FTConfig(budgets={"down": 0.1}))
    optimizer = torch.optim.AdamW(slices(model), lr=0.1, weight_decay=0.5)
    for parameter in slices(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, layer in slice_layers(model):
        expected = before[f"{name}.weight"].clone()
        expected[:, layer.indices] *= 1 - 0.1 * 0.5
        torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model = build_model().train()
    convert(model, CONFIG)
    loss_of(model).backward()
    expected = [parameter.grad.clone() for parameter in slices(model)]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss_of(model).backward()
    for parameter, gradient in zip(slices(model), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_two_optimizers_write_back_their_own_layers() -> None:
    model = build_model()
    convert(model, CONFIG)
    (first, one), (second, other) = slice_layers(model)[:2]
    for _, layer in slice_layers(model):
        layer.slice.grad = torch.ones_like(layer.slice)
    before = snapshot(model)
    torch.optim.SGD([one.slice], lr=0.1).step()
    assert not torch.equal(one.weight, before[f"{first}.weight"])
    assert torch.equal(other.weight, before[f"{second}.weight"])


def test_a_restored_model_is_not_written_to_by_an_old_optimizer() -> None:
    model = build_model()
    base = snapshot(model)
    convert(model, CONFIG)
    optimizer = torch.optim.SGD(slices(model), lr=0.1)
    loss_of(model).backward()
    restore(model)
    optimizer.step()
    assert_same_state(model, base)


# Dynamo itself makes an instance of every traced autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_current_after_each_step() -> None:
    eager = build_model(num_hidden_layers=1)
    convert(eager, CONFIG)
    compiled = copy.deepcopy(eager)
    frames = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend=backend)
    optimizers = [torch.optim.AdamW(slices(model), lr=1e-2) for model in (eager, compiled)]
    for seed in range(3):
        ids = tokens(seed)
        losses = [eager(ids, labels=ids).loss, call(ids, labels=ids).loss]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_current(compiled)
    assert frames == 1  # one graph, and no recompilation after a step
    for (_, one), (_, other) in zip(slice_layers(eager), slice_layers(call), strict=True):
        torch.testing.assert_close(other.slice, one.slice, rtol=1e-4, atol=1e-5)
