"""Adapters in and out of a plain model, and merged checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import ALL, FAMILIES, assert_same_state, build_model, snapshot, tokens
from torch import nn

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    BaseInfo,
    S2FTConfig,
    base_fingerprint,
    choose,
    convert,
    extract_adapter,
    restore,
    slice_layers,
    switched_fingerprints,
)
from s2ft_ray.method import switching as switching_module


def train_adapter(model: Any, seed: int, share: float = 0.4) -> tuple[Adapter, Any]:
    """Convert, change, extract, restore: the adapter and the changed model's logits."""
    convert(model, S2FTConfig(budgets=dict.fromkeys(ALL, share), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for _, layer in slice_layers(model):
        layer.slice.data += 0.1 * torch.randn(layer.slice.shape, generator=generator)
        layer.write_back()
    with torch.no_grad():
        logits = model(tokens()).logits
    adapter = extract_adapter(model)
    restore(model)
    return adapter, logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switched_model_is_the_trained_one_and_out_it_is_the_base(
    family: str, dtype: torch.dtype
) -> None:
    model = build_model(family).to(dtype)
    base, attributes = snapshot(model), set(vars(model))
    adapter, logits = train_adapter(model, seed=0)
    adapter.switch_into(model)
    assert switched_fingerprints(model) == [adapter.fingerprint]
    with torch.no_grad():
        switched = model(tokens()).logits
    # base + (slice - base) rounds where slice doesn't: equal to one bf16, a few fp32 steps.
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(switched, logits, rtol=tolerance, atol=tolerance)
    adapter.switch_out(model)
    assert_same_state(model, base)
    assert set(vars(model)) == attributes


def test_adapters_stack_and_come_out_in_reverse_order() -> None:
    model = build_model()
    base = snapshot(model)
    first, _ = train_adapter(model, seed=0, share=0.6)
    second, _ = train_adapter(model, seed=1, share=0.6)
    first.switch_into(model)
    with_first = snapshot(model)
    second.switch_into(model)
    expected = {name: value.clone() for name, value in base.items()}
    for adapter in (first, second):
        for name, part in adapter.slices.items():
            expected[f"{name}.weight"].index_add_(part.dim, part.indices.long(), part.delta)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    with pytest.raises(AdapterError, match="not the last one in; take"):
        first.switch_out(model)
    second.switch_out(model)
    assert_same_state(model, with_first)
    first.switch_out(model)
    assert_same_state(model, base)


def test_an_adapter_that_is_not_in_cant_come_out() -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    with pytest.raises(AdapterError, match="is not in this model"):
        adapter.switch_out(model)
    adapter.switch_into(model)
    adapter.switch_out(model)
    with pytest.raises(AdapterError, match="is not in this model"):
        adapter.switch_out(model)


def test_the_same_adapter_cant_go_in_twice() -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    adapter.switch_into(model)
    with pytest.raises(AdapterError, match="is in this model already"):
        adapter.switch_into(model)
    assert switched_fingerprints(model) == [adapter.fingerprint]


def test_a_loaded_copy_takes_the_adapter_out(tmp_path: Path) -> None:
    model = build_model()
    base = snapshot(model)
    adapter, _ = train_adapter(model, seed=0)
    adapter.save(tmp_path)
    adapter.switch_into(model)
    Adapter.load(tmp_path).switch_out(model)
    assert_same_state(model, base)


def test_a_switched_models_base_fingerprint_is_the_plain_bases() -> None:
    model = build_model()
    expected = base_fingerprint(model)
    first, _ = train_adapter(model, seed=0, share=1.0)
    second, _ = train_adapter(model, seed=1, share=1.0)
    first.switch_into(model)
    second.switch_into(model)
    assert base_fingerprint(model) == expected


def test_switching_and_converting_exclude_each_other() -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    adapter.switch_into(model)
    for call in (convert, choose):
        with pytest.raises(ConfigError, match="switched into the model; switch_out"):
            call(model, S2FTConfig())
    adapter.switch_out(model)
    convert(model, S2FTConfig())
    with pytest.raises(AdapterError, match=r"converted; restore\(model\)"):
        adapter.switch_into(model)


def refused(model: Any, adapter: Adapter) -> AdapterError:
    """The error of switching in, which leaves the model as it was."""
    before, attributes = snapshot(model), set(vars(model))
    with pytest.raises(AdapterError) as caught:
        adapter.switch_into(model)
    assert_same_state(model, before)
    assert set(vars(model)) == attributes
    return caught.value


def test_another_base_is_refused_saying_what_differs() -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    other = build_model(seed=1)
    message = str(refused(other, adapter))
    assert adapter.base.fingerprint[:12] in message
    assert base_fingerprint(other)[:12] in message


def test_a_base_of_another_size_is_refused_by_module_and_shape() -> None:
    adapter, _ = train_adapter(build_model(), seed=0)
    error = refused(build_model(hidden_size=32, intermediate_size=44), adapter)
    down = adapter.slices["model.layers.0.mlp.down_proj"].delta.shape
    expected = f"layers.0.mlp.down_proj: delta is {list(down)}, the weight [32, 44]"
    assert any(expected in fault for fault in error.faults)
    error = refused(build_model(num_hidden_layers=1), adapter)
    assert len(error.faults) == 7
    assert "model.layers.1.self_attn.q_proj: the adapter has it" in error.faults[0]


def with_slices(adapter: Adapter, slices: dict[str, AdapterSlice]) -> Adapter:
    return dataclasses.replace(adapter, slices=slices)


def test_an_adapter_that_binds_to_nothing_or_to_no_matrix_is_refused() -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    part = adapter.slices["model.layers.0.mlp.down_proj"]
    assert "nothing to bind" in str(refused(model, with_slices(adapter, {})))
    for name, message in (
        ("nowhere", "the adapter has it, LlamaForCausalLM doesn't"),
        ("model.norm", "its weight is no matrix"),
        ("model.layers", "the adapter has it"),
        ("", "the adapter has it"),
    ):
        mixed = {**adapter.slices, name: part}
        assert message in str(refused(model, with_slices(adapter, mixed)))
    far = dataclasses.replace(part, indices=part.indices + 88)
    mixed = {**adapter.slices, "model.layers.0.mlp.down_proj": far}
    assert "is outside the weight [64, 88]" in str(refused(model, with_slices(adapter, mixed)))


@pytest.mark.parametrize("failing", [1, 2, 9, 40])
def test_a_switch_that_fails_half_way_changes_nothing(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    adapter, _ = train_adapter(model, seed=0)
    before, attributes = snapshot(model), set(vars(model))
    calls = 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        switching_put(*args)
        if calls == failing:
            raise KeyboardInterrupt

    switching_put = switching_module.put
    monkeypatch.setattr(switching_module, "put", interrupt)
    monkeypatch.setattr(switching_module, "_CACHED_ENTRIES", 256)  # several pieces of a weight
    with pytest.raises(KeyboardInterrupt):
        adapter.switch_into(model)
    assert calls > failing  # what was written was taken back
    monkeypatch.undo()
    assert_same_state(model, before)
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("moment", ["before it is remembered", "after"])
def test_a_switch_interrupted_at_its_end_changes_nothing(
    num_before: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    adapters = [train_adapter(model, seed)[0] for seed in (0, 1)]
    for adapter in adapters[:num_before]:
        adapter.switch_into(model)
    before, stack = snapshot(model), switched_fingerprints(model)
    is_due = True

    def interrupt(module: nn.Module, name: str, value: Any) -> None:
        nonlocal is_due
        if name == switching_module._STACK and is_due:
            is_due = False
            if moment == "after":
                nn.Module.__setattr__(module, name, value)
            raise KeyboardInterrupt
        nn.Module.__setattr__(module, name, value)

    monkeypatch.setattr(type(model), "__setattr__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapters[1].switch_into(model)
    monkeypatch.undo()
    assert_same_state(model, before)
    assert switched_fingerprints(model) == stack
    adapters[1].switch_into(model)


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is stored as [F, D]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    side=st.sampled_from(["in", "out"]),
    stored=st.sampled_from(["linear", "conv1d", "experts"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cached=st.integers(1, 30),
    data=st.data(),
)
def test_a_switch_adds_the_rounded_delta_at_its_indices_alone_and_goes_out_bitwise(
    sizes: tuple[int, int], side: Any, stored: str, dtype: torch.dtype, cached: int, data: Any
) -> None:
    dim, experts = (-1, -2)[side == "out"], (2,) if stored == "experts" else ()
    count = data.draw(st.integers(1, sizes[dim]))
    rows = [
        sorted(data.draw(st.permutations(range(sizes[dim])))[:count])
        for _ in range(len(experts) + 1)
    ]
    indices = torch.tensor(rows if experts else rows[0], dtype=torch.int32)
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(*experts, *sizes, generator=generator).to(dtype)
    shape = (*experts, sizes[0], count) if side == "in" else (*experts, count, sizes[1])
    delta = torch.randn(shape, generator=generator)
    model = nn.Module()
    if stored == "experts":
        model.m = nn.Parameter(weight.clone())
    else:
        model.m = Conv1D(weight.T.clone()) if stored == "conv1d" else nn.Linear(1, 1, bias=False)
        if stored == "linear":
            model.m.weight = nn.Parameter(weight.clone())
    part = AdapterSlice(side, indices, delta, sizes[dim], stored == "conv1d")
    adapter = Adapter({"m": part}, BaseInfo(None, None, base_fingerprint(model)), S2FTConfig())
    whole = indices.long().unsqueeze(-2 if side == "in" else -1).expand(shape)
    added = weight.float().gather(dim, whole) + delta
    expected = weight.scatter(dim, whole, added.to(dtype))
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switching_module, "_CACHED_ENTRIES", cached)
        adapter.switch_into(model)
    (found,) = model.state_dict().values()
    assert torch.equal(found.T if stored == "conv1d" else found, expected)
    adapter.switch_out(model)
    assert_same_state(model, before)
