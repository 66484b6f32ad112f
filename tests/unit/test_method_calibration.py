"""Selection by what heads and channels do on data: against the plain definition of each norm."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import (
    ARCHITECTURES,
    BATCHES,
    assert_same_state,
    build_model,
    make_batch,
    projections_of,
    snapshot,
)

from s2ft_ray.errors import ConfigError
from s2ft_ray.method import S2FTConfig, convert, extract_adapter, restore
from s2ft_ray.method.calibration import activation_norms, gradient_norms
from s2ft_ray.method.decoder import Decoder

BOTH = {"o": 0.25, "down": 0.1}


def last_weights(model: Any) -> dict[tuple[int, str], tuple[Any, Any]]:
    """By dense coupling: the part and the weight whose input its units' activations are."""
    decoder = Decoder(model)
    found = {}
    for key, coupling in decoder.geometry.couplings.items():
        part = coupling.parts["o" if coupling.structure == "heads" else "down"]
        if coupling.num_experts is None:
            found[key] = (part, decoder.weights[part.module])
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_activations_are_the_norms_of_what_meets_o_and_down(family: str) -> None:
    model = build_model(family)
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    hooks = [
        weight.module.register_forward_hook(
            lambda _m, args, _y, key=key: inputs.setdefault(key, []).append(args[0])
        )
        for key, (_, weight) in last_weights(model).items()
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    norms = activation_norms(model, Decoder(model), BATCHES)
    for key, (part, _) in last_weights(model).items():
        total = torch.zeros(part.num_units, dtype=torch.float64)
        for batch, x in zip(BATCHES, inputs[key], strict=True):
            x = x.reshape(*batch["input_ids"].shape, part.num_units, part.unit_size)
            total += x[batch["attention_mask"].bool()].double().square().sum((0, 2))
        torch.testing.assert_close(norms[key], total.sqrt(), rtol=1e-5, atol=1e-8)
        assert norms[key].dtype == torch.float64


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_gradients_are_those_of_all_weights_that_a_unit_couples(family: str) -> None:
    model = build_model(family)
    decoder = Decoder(model)
    norms = gradient_norms(model, decoder, BATCHES)
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = {key: torch.zeros_like(value) for key, value in norms.items()}
    for batch in BATCHES:
        model.zero_grad()
        model(**batch).loss.backward()
        for key, coupling in decoder.geometry.couplings.items():
            for part in coupling.parts.values():
                weight = decoder.weights[part.module]
                grad = weight.parameter.grad.double()
                grad = grad.T if weight.is_transposed else grad
                units = part.sum_units(grad.square().sum(-2 if part.side == "in" else -1))
                if units.shape[-1] != coupling.num_units:
                    units = units.repeat_interleave(coupling.group_size)
                expected[key] += units
    for key, value in norms.items():
        torch.testing.assert_close(value, expected[key].sqrt(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_expert_counts_the_tokens_that_are_routed_to_it(family: str) -> None:
    model = build_model(family)
    norms = activation_norms(model, Decoder(model), BATCHES)
    (key,) = [key for key in norms if key == (1, "expert_channels")]
    whole = norms[key]
    assert whole.dim() == 2
    assert bool((whole.sum(1) > 0).any())
    # What is routed isn't changed by rows of other batches, or by padding.
    padded = [make_batch(0, pad_id=pad_id) for pad_id in (0, 7)]
    first, second = (activation_norms(model, Decoder(model), [batch])[key] for batch in padded)
    assert torch.equal(first, second)


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
@pytest.mark.parametrize("subset", ["small", "large"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_selection_takes_its_end_of_the_norms(
    selection: str, subset: str, allocation: str
) -> None:
    model = build_model("qwen2")
    decoder = Decoder(model)
    measure = gradient_norms if selection == "gradient" else activation_norms
    norms = measure(model, decoder, BATCHES)
    if selection == "product":
        for (layer, structure), norm in norms.items():
            block = model.model.layers[layer]
            if structure == "channels":
                parts = (block.mlp.up_proj, block.mlp.gate_proj, block.mlp.down_proj.weight.T)
                squares = sum(
                    getattr(p, "weight", p).detach().double().square().sum(1) for p in parts
                )
                norm *= squares.sqrt()
    config = S2FTConfig(
        budgets={"down": 0.1}, selection=selection, subset=subset, allocation=allocation
    )
    chosen = convert(model, config, calibration=BATCHES).channels
    sign = 1 if subset == "small" else -1
    ranked = {layer: sign * norms[layer, "channels"] for layer in (0, 1)}
    if allocation == "uniform":
        expected = {
            layer: sorted(scores.argsort()[:9].tolist()) for layer, scores in ranked.items()
        }
    else:
        order = torch.cat([ranked[0], ranked[1]]).argsort()[:18]
        expected = {
            layer: sorted(
                (order[(order >= 88 * layer) & (order < 88 * (layer + 1))] - 88 * layer).tolist()
            )
            for layer in (0, 1)
        }
    assert chosen == {layer: units for layer, units in expected.items() if units}


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen2_moe"])
def test_measuring_leaves_the_model_as_it_was(selection: str, family: str) -> None:
    model = build_model(family).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, state = snapshot(model), torch.get_rng_state()
    config = S2FTConfig(budgets=dict.fromkeys(projections_of(family), 0.2), selection=selection)
    first = convert(model, config, calibration=BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    restore(model)
    assert_same_state(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert convert(model, config, calibration=BATCHES) == first


def test_a_measured_selection_avoids_other_adapters_and_knows_no_seed() -> None:
    model = build_model()
    options = {"budgets": BOTH, "selection": "activation"}
    first = convert(model, S2FTConfig(**options), calibration=BATCHES)
    adapter = extract_adapter(model)
    restore(model)
    assert convert(model, S2FTConfig(seed=7, **options), calibration=BATCHES) == first
    restore(model)
    second = convert(model, S2FTConfig(**options), calibration=BATCHES, avoid=[adapter])
    for layer in (0, 1):
        assert not set(first.channels[layer]) & set(second.channels[layer])
        assert not set(first.heads[layer]) & set(second.heads[layer])


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_model()


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 8), min_size=2, max_size=5), cut=st.integers(1, 4))
def test_activations_are_the_same_in_any_batches(llama: Any, lengths: list[int], cut: int) -> None:
    model = llama
    decoder = Decoder(model)
    whole = make_batch(0, tuple(lengths))
    pieces = [
        {key: value[rows] for key, value in whole.items()}
        for rows in (slice(0, cut), slice(cut, None))
        if len(whole["input_ids"][rows])
    ]
    together = activation_norms(model, decoder, [whole])
    for key, value in activation_norms(model, decoder, pieces).items():
        torch.testing.assert_close(value, together[key], rtol=1e-4, atol=1e-6)


def test_no_two_gradients_of_weights_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(num_hidden_layers=4)
    sizes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2}
    alive: list[Any] = []
    most = 0

    def count(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        of_weight = grad.T @ x
        assert tuple(of_weight.shape) in sizes
        alive.append(weakref.ref(of_weight))
        most = max(most, sum(ref() is not None for ref in alive))
        return of_weight

    monkeypatch.setattr("s2ft_ray.method.calibration._weight_gradient", count)
    gradient_norms(model, Decoder(model), BATCHES)
    assert len(alive) == 3 * 4 * 7
    assert most == 1


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "random": ({}, BATCHES, "'random' looks at no data; leave it out"),
    "none": ({"selection": "activation"}, None, "'activation' looks at data; give batches"),
    "empty": ({"selection": "activation"}, [], "holds no batch"),
    "infinite": (
        {"selection": "activation"},
        [{"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3)}],
        "are not finite",
    ),
    "tensor": ({"selection": "product"}, [torch.ones(2, 3)], "batch 0 is no mapping"),
    "labels": (
        {"selection": "gradient"},
        [BATCHES[0], {"input_ids": torch.ones(1, 3, dtype=torch.int64)}],
        "batch 1 has no labels",
    ),
    "masked": (
        {"selection": "gradient"},
        [{**BATCHES[0], "labels": torch.full((3, 9), -100)}],
        "batch 0 has no labels, or all of them masked",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_calibration_that_cant_be_used_is_refused_and_changes_nothing(case: str) -> None:
    options, calibration, message = BAD[case]
    model = build_model().train()
    if case == "infinite":
        torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, 1e38)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        convert(model, S2FTConfig(**options), calibration=calibration)
    assert_same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_hooks_are_gone_after_a_forward_that_fails() -> None:
    model = build_model()
    broken: Callable[..., Any] = model.lm_head.forward

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model.lm_head.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        convert(model, S2FTConfig(selection="gradient"), calibration=BATCHES)
    model.lm_head.forward = broken
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
