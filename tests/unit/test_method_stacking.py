"""Several adapters at once: fused, or stacked in one model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import assert_same_state, build_model, snapshot

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    BaseInfo,
    S2FTConfig,
    convert,
    extract_adapter,
    fuse,
    restore,
    slice_layers,
    switched_fingerprints,
)
from s2ft_ray.method import switching as switching_module
from s2ft_ray.method.weights import put

BUDGETS = {"o": 0.25, "v": 0.5, "up": 0.2, "down": 0.3}


def train_adapter(model: Any, seed: int, **options: Any) -> Adapter:
    convert(model, S2FTConfig(budgets=BUDGETS, seed=seed), **options)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in slice_layers(model):
        layer.slice.data += 0.1 * torch.randn(layer.slice.shape, generator=generator)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


def test_disjoint_adapters_fuse_without_interference() -> None:
    model = build_model()
    base = snapshot(model)
    first = train_adapter(model, 0)
    second = train_adapter(model, 1, avoid=[first])
    alone = []
    for adapter in (first, second):
        adapter.switch_into(model)
        alone.append(snapshot(model))
        adapter.switch_out(model)
    fuse([first, second], [1.0, 1.0]).switch_into(model)
    fused = snapshot(model)
    for adapter, switched in zip((first, second), alone, strict=True):
        for name, part in adapter.slices.items():
            mine, both = (
                state[f"{name}.weight"].index_select(part.dim, part.indices.long())
                for state in (switched, fused)
            )
            assert torch.equal(mine, both), name
    changed = sum(int((fused[name] != base[name]).sum()) for name in base)
    assert changed == sum(
        int((state[name] != base[name]).sum()) for state in alone for name in base
    )


def slices(draw: Any, size: int, across: int, side: Any, seed: int) -> AdapterSlice:
    indices = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
    shape = (across, len(indices)) if side == "in" else (len(indices), across)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return AdapterSlice(side, torch.tensor(indices, dtype=torch.int32), delta, size)


def spread(part: AdapterSlice) -> torch.Tensor:
    """The delta as a whole matrix."""
    assert part.size is not None
    shape = list(part.delta.shape)
    shape[part.dim] = part.size
    whole = torch.zeros(shape)
    put(whole, part.dim - whole.dim(), part.indices.long(), part.delta)
    return whole


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    across=st.integers(1, 5),
    side=st.sampled_from(["in", "out"]),
    weights=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_fused_delta_is_the_weighted_sum_and_exact_where_one_adapter_alone_is(
    size: int, across: int, side: Any, weights: list[float], data: Any
) -> None:
    parts = [slices(data.draw, size, across, side, seed) for seed in range(len(weights))]
    base = BaseInfo("base", None, "0" * 64)
    adapters = [Adapter({"m": part}, base, S2FTConfig()) for part in parts]
    fused = fuse(adapters, weights).slices["m"]
    assert fused.indices.tolist() == sorted({i for part in parts for i in part.indices.tolist()})
    assert (fused.indices.dtype, fused.delta.dtype, fused.size) == (
        torch.int32,
        torch.float32,
        size,
    )
    expected = sum(spread(p).double() * w for p, w in zip(parts, weights, strict=True))
    torch.testing.assert_close(spread(fused).double(), expected, rtol=1e-5, atol=1e-5)
    for part, weight in zip(parts, weights, strict=True):
        others = {i for other in parts if other is not part for i in other.indices.tolist()}
        alone = [i for i in part.indices.tolist() if i not in others]
        mine, found = (
            whole.index_select(part.dim, torch.tensor(alone, dtype=torch.int64))
            for whole in (spread(part) * weight, spread(fused))
        )
        assert torch.equal(mine, found)


def test_experts_fuse_each_over_the_union_of_its_own_channels() -> None:
    model = build_model("qwen3_moe")
    first, second = (train_adapter(model, seed) for seed in range(2))
    fused = fuse([first, second], [1.0, -0.5])
    for name, part in fused.slices.items():
        expected = torch.zeros(())
        for adapter, weight in ((first, 1.0), (second, -0.5)):
            if name in adapter.slices:
                expected = expected + weight * spread(adapter.slices[name])
        torch.testing.assert_close(spread(part), expected, rtol=1e-6, atol=1e-6)
        assert bool((part.indices.diff() > 0).all())
    alone = snapshot(model)
    fused.switch_into(model)
    fused.switch_out(model)
    assert_same_state(model, alone)


def test_prompts_of_a_fused_adapter_are_rendered_as_all_its_parts_were() -> None:
    model = build_model()
    first, second = (train_adapter(model, seed) for seed in range(2))
    assert fuse([first, second]).training.keys() == {"fused"}
    for adapter in (first, second):
        adapter.training["data"] = {"format": "chat", "chat_template": "{{ 1 }}", "digest": "x"}
    expected = {"format": "chat", "chat_template": "{{ 1 }}"}
    assert fuse([first, second]).training["data"] == expected
    second.training["data"] = {"format": "text", "chat_template": None}
    assert fuse([first, second]).training.keys() == {"fused"}


def test_adapters_of_several_sides_or_shapes_of_a_module_dont_fuse() -> None:
    base = BaseInfo("base", None, "0" * 64)
    index = torch.tensor([1], dtype=torch.int32)
    rows, columns, longer = (
        Adapter({"m": part}, base, S2FTConfig())
        for part in (
            AdapterSlice("out", index, torch.ones(1, 4)),
            AdapterSlice("in", index, torch.ones(4, 1)),
            AdapterSlice("out", index, torch.ones(1, 5)),
        )
    )
    for other in (columns, longer):
        with pytest.raises(AdapterError, match="m: the adapters' sides or shapes differ"):
            fuse([rows, other])


@pytest.fixture(scope="module")
def stack() -> tuple[Any, list[Adapter]]:
    model = build_model()
    return model, [train_adapter(model, seed) for seed in range(3)]


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12))
def test_any_order_of_switches_is_done_or_refused_and_ends_at_the_base(
    stack: tuple[Any, list[Adapter]], steps: list[tuple[bool, int]]
) -> None:
    model, adapters = stack
    base = snapshot(model)
    states = [base]
    inside: list[Adapter] = []
    for goes_in, number in steps:
        adapter = adapters[number]
        possible = adapter not in inside if goes_in else bool(inside) and inside[-1] is adapter
        switch = adapter.switch_into if goes_in else adapter.switch_out
        if not possible:
            with pytest.raises(AdapterError, match=r"already|not in this model|not the last"):
                switch(model)
        else:
            switch(model)
            if goes_in:
                inside.append(adapter)
                states.append(snapshot(model))
            else:
                inside.pop()
                states.pop()
        assert_same_state(model, states[-1])
        assert switched_fingerprints(model) == [adapter.fingerprint for adapter in inside]
    while inside:
        inside.pop().switch_out(model)
    assert_same_state(model, base)


def test_a_switch_out_that_was_interrupted_can_be_done_again(
    stack: tuple[Any, list[Adapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = stack
    base = snapshot(model)
    for adapter in adapters[:2]:
        adapter.switch_into(model)
    write, calls = switching_module._write, 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(switching_module, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapters[1].switch_out(model)
    monkeypatch.undo()
    assert switched_fingerprints(model)[-1] == adapters[1].fingerprint
    for adapter in reversed(adapters[:2]):
        adapter.switch_out(model)
    assert_same_state(model, base)
