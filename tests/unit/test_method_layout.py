"""The permuted layout against the gathered one, over random shapes, selections and dtypes."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import ALL, assert_same_state, build_model, projections_of, snapshot, tokens
from torch import nn

from s2ft_ray.errors import ConfigError
from s2ft_ray.method import (
    Adapter,
    S2FTConfig,
    S2FTLinear,
    base_fingerprint,
    convert,
    convert_like,
    extract_adapter,
    fuse,
    restore,
    slice_layers,
)
from s2ft_ray.method.layout import permuted_parameters
from s2ft_ray.method.selection import KINDS as KINDS_OF_UNITS

# The kinds of coupled weights: biases, a full-width norm, fused, transposed and interleaved
# weights, two matrices, experts of two kinds.
KINDS = ("qwen2", "olmo2", "phi3", "gpt2", "gpt_neox", "opt", "qwen2_moe")


def train(model: Any, steps: int = 3) -> list[float]:
    """SGD: unlike Adam's, its steps don't turn a rounding of a tiny gradient into a step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for seed in range(steps):
        ids = tokens(seed)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_close(adapter: Adapter, other: Adapter, tolerance: float) -> None:
    assert adapter.base == other.base
    assert adapter.slices.keys() == other.slices.keys()
    for name, part in adapter.slices.items():
        twin = other.slices[name]
        assert (part.side, part.size, part.transposed) == (twin.side, twin.size, twin.transposed)
        assert torch.equal(part.indices, twin.indices), name
        torch.testing.assert_close(part.delta, twin.delta, rtol=0, atol=tolerance, msg=name)


Case = tuple[str, dict[str, Any], S2FTConfig, S2FTConfig | None, torch.dtype]
"""Family, its sizes, what is selected, what an adapter to avoid holds, and the dtype."""


@st.composite
def cases(draw: Any) -> Case:
    family = draw(st.sampled_from(KINDS))
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if family in ("gpt2", "gpt_neox", "opt"):
        group = 1
    # Experts without slices run by grouped_mm, which takes rows of whole 16 bytes.
    head_dim = 8 if family == "qwen2_moe" else draw(st.sampled_from([2, 4]))
    heads, width = kv * group, draw(st.integers(3, 20))
    sizes = {
        "hidden_size": heads * head_dim,
        "n_embd": heads * head_dim,
        "num_attention_heads": heads,
        "n_head": heads,
        "num_key_value_heads": kv,
        "intermediate_size": width,
        "n_inner": width,
        "ffn_dim": width,
        "moe_intermediate_size": 8 * draw(st.integers(1, 2)),
        "word_embed_proj_dim": heads * head_dim,
    }
    known = st.sampled_from(projections_of(family))
    budgets = draw(st.dictionaries(known, st.floats(0.01, 1.0), min_size=1))
    config = S2FTConfig(
        budgets=budgets,
        selection=draw(st.sampled_from(["random", "weight"])),
        allocation=draw(st.sampled_from(["uniform", "global"])),
        layers=draw(st.sampled_from([None, [0], [1], [1, 0]])),
        seed=draw(st.integers(0, 99)),
    )
    held = draw(st.none() | st.dictionaries(known, st.floats(0.01, 0.4), min_size=1))
    avoided = held and S2FTConfig(budgets=held, seed=draw(st.integers(0, 99)))
    return family, sizes, config, avoided, draw(st.sampled_from([torch.float32, torch.bfloat16]))


def adapters_of(model: Any, config: S2FTConfig | None) -> list[Adapter]:
    """An adapter that holds what `config` selects; none for None."""
    if config is None:
        return []
    convert(model, config)
    adapter = extract_adapter(model)
    restore(model)
    return [adapter]


@settings(max_examples=25, deadline=None)
@given(cases())
def test_both_layouts_select_train_and_extract_the_same(
    case: Case,
) -> None:
    family, sizes, config, avoided, dtype = case
    gathered = build_model(family, **sizes).to(dtype)
    permuted = copy.deepcopy(gathered)
    base, identity = snapshot(gathered), base_fingerprint(gathered)
    plain = gathered(tokens()).logits.detach()
    other = config.model_copy(update={"layout": "permuted"})
    avoid = adapters_of(gathered, avoided)
    try:
        selection = convert(gathered, config, avoid=avoid)
    except ConfigError as error:  # too little is left
        assert avoid
        with pytest.raises(ConfigError, match=re.escape(str(error))):
            convert(permuted, other, avoid=avoid)
        assert_same_state(permuted, base)
        return
    assert convert(permuted, other, avoid=avoid) == selection
    assert {layer for kind in KINDS_OF_UNITS for layer in getattr(selection, kind)} <= {
        *(config.layers or range(2))
    }
    for part in avoid:
        for name, taken in part.slices.items():
            if name in selection.modules:
                mine = torch.tensor(selection.modules[name].indices)
                both = torch.cat([mine, taken.indices], dim=-1).sort(dim=-1).values
                assert bool((both.diff(dim=-1) > 0).all()), name
    assert_same_state(permuted, base)
    assert base_fingerprint(permuted) == identity
    exact = dtype == torch.float32
    torch.testing.assert_close(
        permuted(tokens()).logits, plain, rtol=0, atol=1e-4 if exact else 0.3
    )
    losses, expected = train(permuted), train(gathered)
    assert losses == pytest.approx(expected, abs=1e-4 if exact else 0.2)
    if exact:
        assert_close(extract_adapter(permuted), extract_adapter(gathered), 1e-4)
    assert base_fingerprint(permuted) == identity
    restore(permuted)
    assert_same_state(permuted, base)


@pytest.mark.parametrize("family", ["llama", *KINDS])
def test_a_permuted_model_generates_what_its_plain_one_does(family: str) -> None:
    def generate(model: Any, **options: Any) -> torch.Tensor:
        ids = tokens(shape=(2, 5))
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            pad_token_id=0,
            **options,
        )

    model, plain = build_model(family), build_model(family)
    budgets = dict.fromkeys(projections_of(family), 0.3)
    convert(model, S2FTConfig(budgets=budgets, layout="permuted"))
    assert list(permuted_parameters(model))
    base = generate(plain)
    assert torch.equal(generate(model), base)
    train(model, steps=20)
    plain.load_state_dict(model.state_dict())
    trained = generate(plain)
    assert not torch.equal(trained, base)
    assert torch.equal(generate(model), trained)
    assert torch.equal(generate(model, use_cache=False), trained)


def test_what_is_trained_lies_in_one_piece() -> None:
    model = build_model("olmo2", num_key_value_heads=8)
    config = S2FTConfig(
        budgets=dict.fromkeys(ALL, 0.3) | {"o": 0.6, "gate": 0.1}, layout="permuted"
    )
    convert(model, config)
    for name, layer in slice_layers(model):
        assert layer.span == range(len(layer.indices)), name
        order = layer.original.tolist()
        assert order != sorted(order) or len(order) < 3 or "self_attn" in name or "gate" in name
    names = {name for name, _ in permuted_parameters(model)}
    attention = "model.layers.0.self_attn."
    assert {f"{attention}{p}.weight" for p in ("q_proj", "o_proj", "q_norm", "k_norm")} <= names
    assert {n.rpartition(".")[2] for n in names} == {"weight"}


def test_biases_move_with_their_rows_and_output_biases_stay() -> None:
    model = build_model("opt")
    convert(model, S2FTConfig(budgets={"o": 0.25, "down": 0.1}, layout="permuted"))
    names = {name.removeprefix("model.decoder.layers.1.") for name, _ in permuted_parameters(model)}
    assert {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "fc1.bias", "fc2.weight"} <= names
    assert not {"self_attn.out_proj.bias", "fc2.bias"} & names


def test_under_gqa_groups_move_whole_and_what_would_split_one_stays_gathered() -> None:
    spans, moved = set(), 0
    for seed in range(30):
        model = build_model("llama")  # 8 query heads in 2 groups
        selection = convert(
            model, S2FTConfig(budgets={"o": 0.4}, seed=seed, layers=[0], layout="permuted")
        )
        ((_, layer),) = slice_layers(model)
        if len({head // 4 for head in selection.heads[0]}) == 1:
            assert layer.span == range(24)
        spans.add(layer.span)
        for name, order in permuted_parameters(model):
            moved += 1
            if name.endswith("k_proj.weight"):
                assert order.original.view(2, 8).sort(dim=1).values.diff().eq(1).all()
    assert {None, range(24)} <= spans
    assert moved


def test_key_value_heads_take_their_query_heads_along() -> None:
    model = build_model("llama")
    selection = convert(model, S2FTConfig(budgets={"v": 0.5}, layout="permuted", seed=3))
    orders = dict(permuted_parameters(model))
    for layer, (kv_head,) in selection.kv_heads.items():
        assert slice_layers(model)[layer][1].span == range(8)
        if kv_head == 1:
            heads = orders[f"model.layers.{layer}.self_attn.q_proj.weight"].original[::8] // 8
            assert heads.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_a_permuted_model_goes_on_from_an_adapter_of_a_gathered_one() -> None:
    model = build_model("gpt_neox")
    config = {"budgets": dict.fromkeys(projections_of("gpt_neox"), 0.3)}
    selection = convert(model, S2FTConfig(**config))
    train(model)
    trained, parent = snapshot(model), extract_adapter(model)
    restore(model)
    permuted = Adapter(parent.slices, parent.base, S2FTConfig(**config, layout="permuted"))
    assert convert_like(model, permuted) == selection
    assert any(layer.span for _, layer in slice_layers(model))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-5, atol=1e-6)
    assert_close(extract_adapter(model), parent, 1e-6)


def test_an_adapter_whose_budgets_share_no_order_is_gathered_where_it_must_be() -> None:
    model = build_model("llama")
    parts = []
    for seed, budgets in enumerate([{"up": 0.2, "o": 0.25}, {"down": 0.2, "v": 0.5}]):
        convert(model, S2FTConfig(budgets=budgets, seed=seed))
        train(model)
        parts.append(extract_adapter(model))
        restore(model)
    both = fuse(parts)
    base = snapshot(model)
    convert_like(model, Adapter(both.slices, both.base, S2FTConfig(layout="permuted")))
    assert_close(extract_adapter(model), both, 1e-6)
    restore(model)
    assert_same_state(model, base)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_permuted_model_is_one(duplicate: Any) -> None:
    model = build_model("qwen2")
    base = snapshot(model)
    convert(model, S2FTConfig(layout="permuted"))
    other = duplicate(model)
    train(other)
    assert_same_state(model, base)
    model.load_state_dict(other.state_dict(), strict=True)
    assert extract_adapter(model).fingerprint == extract_adapter(other).fingerprint
    for it in (model, other):
        restore(it)
        assert_same_state(it, base)
        assert not [name for name, _ in permuted_parameters(it)]


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_loads_into_a_permuted_model(assign: bool) -> None:
    model, plain = build_model("opt"), build_model("opt", seed=4)
    convert(model, S2FTConfig(layout="permuted"))
    model.load_state_dict(snapshot(plain), strict=True, assign=assign)
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)
    assert_same_state(model, snapshot(plain))


def test_a_state_of_another_shape_is_refused_as_ever() -> None:
    model = build_model()
    convert(model, S2FTConfig(layout="permuted"))
    state = snapshot(model)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = torch.cat([state[name], state[name]])
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.up_proj"):
        model.load_state_dict(state)


def test_contiguous_columns_are_kept_as_a_copy() -> None:
    layer = S2FTLinear.take_over(nn.Linear(8, 6), "in", [2, 3, 4])
    assert layer.span == range(2, 5)
    x = torch.randn(5, 8)
    y = layer(x)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (5, 3)]
    assert len(kept) == 1
    assert kept[0].untyped_storage().nbytes() == 5 * 3 * 4
