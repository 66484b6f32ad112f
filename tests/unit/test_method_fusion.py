"""Several adapters of one base as one."""

import math
from typing import Any

import pytest
import torch
from method_models import assert_same_state, build_model, snapshot

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    S2FTConfig,
    convert,
    extract_adapter,
    fuse,
    restore,
    slice_layers,
)


def change(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in slice_layers(model):
        layer.slice.data += torch.randn(layer.slice.shape, generator=generator)


def train_adapter(seed: int, base: int = 0, **config: object) -> Adapter:
    model = build_model(seed=base)
    convert(model, S2FTConfig(seed=seed, **config))
    change(model, seed)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


def test_a_fused_adapter_adds_the_weighted_sum_of_the_deltas() -> None:
    first = train_adapter(0, budgets={"o": 0.5, "down": 0.5})
    second = train_adapter(1, budgets={"down": 0.5, "gate": 0.2}, layers=[1])
    model = build_model()
    expected = snapshot(model)
    for adapter, weight in ((first, 0.25), (second, 2.0)):
        for name, part in adapter.slices.items():
            delta = part.delta * weight
            expected[f"{name}.weight"].index_add_(part.dim, part.indices.long(), delta)
    fused = fuse([first, second], weights=[0.25, 2.0])
    fused.switch_into(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    down = "model.layers.1.mlp.down_proj"
    union = {*first.slices[down].indices.tolist(), *second.slices[down].indices.tolist()}
    assert fused.slices[down].indices.tolist() == sorted(union)
    assert fused.slices[down].indices.dtype == torch.int32
    assert fused.training["fused"][1] == {"fingerprint": second.fingerprint, "weight": 2.0}


def dense(part: AdapterSlice) -> torch.Tensor:
    """The delta at its places in a matrix, or in one for each expert."""
    dim, across = (-1, -2) if part.side == "in" else (-2, -1)
    shape = list(part.delta.shape)
    shape[dim] = part.size
    places = part.indices.long().unsqueeze(across).expand(part.delta.shape)
    return torch.zeros(shape).scatter(dim, places, part.delta)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_disjoint_adapters_are_fused_exactly_experts_too(family: str, weights: list[float]) -> None:
    model = build_model(family)
    base, adapters = snapshot(model), []
    for seed, budgets in enumerate([{"o": 0.25, "down": 0.3, "up": 0.2}, {"down": 0.3, "o": 0.5}]):
        convert(model, S2FTConfig(budgets=budgets, seed=seed), avoid=adapters)
        change(model, seed)
        adapters.append(extract_adapter(model))
        restore(model)
    fused = fuse(adapters, weights)
    experts = [name for name, part in fused.slices.items() if part.indices.dim() == 2]
    assert bool(experts) == (family != "llama")
    for name, part in fused.slices.items():
        held = [(it.slices.get(name), weight) for it, weight in zip(adapters, weights, strict=True)]
        parts = [(it, weight) for it, weight in held if it is not None]
        assert part.indices.shape[-1] == sum(it.indices.shape[-1] for it, _ in parts)
        assert torch.equal(dense(part), sum(dense(it) * weight for it, weight in parts)), name
    fused.switch_into(model)
    together = snapshot(model)
    fused.switch_out(model)
    assert_same_state(model, base)
    if weights == [1.0, 1.0]:
        for adapter in adapters:
            adapter.switch_into(model)
        assert_same_state(model, together)


def test_weights_are_equal_shares_by_default_and_one_adapter_is_itself() -> None:
    first = train_adapter(0)
    second = train_adapter(1)
    assert fuse([first, second]).fingerprint == fuse([first, second], [0.5, 0.5]).fingerprint
    assert fuse([first]).fingerprint == first.fingerprint


def test_a_fused_adapter_is_saved_and_loaded(tmp_path: object) -> None:
    fused = fuse([train_adapter(0), train_adapter(1)])
    fused.save(str(tmp_path))
    assert Adapter.load(str(tmp_path)).fingerprint == fused.fingerprint


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [1.0, 1.0, 1.0]])
def test_weights_are_one_finite_number_each(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match="not 2 finite numbers"):
        fuse([train_adapter(0), train_adapter(1)], weights)


def test_other_bases_and_no_adapters_are_refused() -> None:
    with pytest.raises(AdapterError, match="different bases"):
        fuse([train_adapter(0), train_adapter(0, base=1)])
    with pytest.raises(AdapterError, match="no adapter"):
        fuse([])
