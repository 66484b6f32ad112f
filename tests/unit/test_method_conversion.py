"""Conversion and its way back; a converted model's state, copies, moves and refusals."""

import copy
import dataclasses
import gc
import io
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from method_models import ALL, FAMILIES, assert_same_state, build_model, snapshot, tokens
from torch import nn
from transformers import Gemma3Config

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method import (
    S2FTConfig,
    S2FTLinear,
    Selection,
    base_fingerprint,
    check_supported,
    choose,
    convert,
    convert_like,
    convert_with,
    extract_adapter,
    restore,
    slice_layers,
    supported_architectures,
)
from s2ft_ray.method.slices import _slices

CONFIG = S2FTConfig(budgets=dict.fromkeys(ALL, 0.3))


def train(model: Any, steps: int = 2, lr: float = 1e-2) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for seed in range(steps):
        ids = tokens(seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_current(model: nn.Module) -> None:
    for name, layer in slice_layers(model):
        held = layer.weight.index_select(layer.dim, layer.indices)
        assert torch.equal(held, layer.slice.detach().to(layer.weight.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_gives_the_base_bitwise_and_leaves_no_trace(
    family: str, dtype: torch.dtype
) -> None:
    model = build_model(family).to(dtype)
    model.get_input_embeddings().weight.requires_grad_(False)
    base = snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    convert(model, CONFIG)
    train(model)
    assert any(not torch.equal(value, base[k]) for k, value in model.state_dict().items())
    restore(model)
    assert_same_state(model, base)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == names
    convert(model, CONFIG)  # and it can be converted again


def test_the_slices_alone_are_trainable_and_fp32() -> None:
    model = build_model("qwen2").to(torch.bfloat16)
    selection = convert(model, CONFIG)
    trainable = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.slice": torch.float32 for name in selection.modules}
    for _, layer in slice_layers(model):
        assert layer.base_slice.dtype == torch.bfloat16
        assert layer.indices.dtype == torch.int64


def test_tied_embeddings_stay_tied() -> None:
    model = build_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    convert(model, CONFIG)
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_is_the_plain_models_with_current_values(family: str) -> None:
    model = build_model(family)
    base = snapshot(model)
    convert(model, CONFIG)
    assert_same_state(model, base)
    train(model)
    plain = build_model(family, seed=5)
    plain.load_state_dict(model.state_dict(), strict=True)
    ids = tokens()
    assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_refreshes_the_slices_and_keeps_the_base(assign: bool) -> None:
    model = build_model()
    convert(model, CONFIG)
    bases = [layer.base_slice.clone() for _, layer in slice_layers(model)]
    trained = copy.deepcopy(model)
    train(trained)
    loaded = model.load_state_dict(snapshot(trained), strict=True, assign=assign)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert_current(model)
    for (_, layer), base in zip(slice_layers(model), bases, strict=True):
        assert torch.equal(layer.base_slice, base)
        assert not layer.weight.requires_grad
    assert extract_adapter(model).fingerprint == extract_adapter(trained).fingerprint
    train(model)
    assert_current(model)


def test_loading_other_keys_leaves_the_slices_alone() -> None:
    model = build_model().to(torch.bfloat16)
    convert(model, CONFIG)
    train(model)
    before = [layer.slice.detach().clone() for _, layer in slice_layers(model)]
    norm = {"model.norm.weight": model.model.norm.weight.detach().clone()}
    model.load_state_dict(norm, strict=False)
    for (_, layer), value in zip(slice_layers(model), before, strict=True):
        assert torch.equal(layer.slice, value)  # bf16 weights would have rounded it


def test_strict_loading_still_misses_what_is_missing() -> None:
    model = build_model()
    convert(model, CONFIG)
    state = snapshot(model)
    del state["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.0.mlp.down_proj.weight\"\.\s*$"):
        model.load_state_dict(state)


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_trains_restores_and_extracts_by_itself(duplicate: Any) -> None:
    model = build_model()
    base = snapshot(model)
    convert(model, CONFIG)
    other = duplicate(model)
    train(other)
    assert_current(other)
    assert_same_state(model, base)
    assert extract_adapter(other).fingerprint != extract_adapter(model).fingerprint
    restore(other)
    assert_same_state(other, base)


def test_changing_the_dtype_keeps_the_slices_fp32_and_the_base_exact() -> None:
    model = build_model()
    convert(model, CONFIG)
    train(model)
    before = extract_adapter(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.to(torch.bfloat16)
    for _, layer in slice_layers(model):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.slice.dtype == layer.base_slice.dtype == torch.float32
        assert layer.indices.dtype == torch.int64
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(parameters, after, strict=True))
    assert extract_adapter(model).fingerprint == before.fingerprint
    train(model)
    assert_current(model)


def test_moving_the_model_moves_every_part_of_a_layer() -> None:
    layer = S2FTLinear.take_over(nn.Linear(8, 6), "in", [1, 5]).to("meta", torch.bfloat16)
    parts = (layer.weight, layer.slice, layer.indices, layer.base_slice)
    assert {part.device.type for part in parts} == {"meta"}
    assert layer.indices.dtype == torch.int64
    assert layer.slice.dtype == torch.float32


def test_a_converted_model_that_nobody_holds_is_freed() -> None:
    model = build_model()
    convert(model, CONFIG)
    train(model)
    layer = weakref.ref(slice_layers(model)[0][1])
    del model
    gc.collect()
    assert layer() is None


def test_converting_twice_is_refused() -> None:
    model = build_model()
    convert(model, CONFIG)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"converted already; restore\(model\) first"):
        convert(model, CONFIG)
    assert_same_state(model, before)


def test_what_is_not_converted_has_nothing_to_extract_or_restore() -> None:
    for call in (extract_adapter, restore):
        with pytest.raises(ConfigError, match="not converted"):
            call(build_model())


def test_an_unsupported_architecture_is_named_beside_the_supported() -> None:
    model = build_model()
    model.config.model_type = "bloom"
    with pytest.raises(ConfigError, match=r"'bloom' is not supported; .* llama, mistral, "):
        convert(model, CONFIG)
    with pytest.raises(ConfigError, match="None is not supported"):
        check_supported(object())
    with pytest.raises(ConfigError, match=r"'gemma3' is not supported; .* gemma3_text"):
        check_supported(Gemma3Config())  # the multimodal checkpoints'
    assert {"llama", "phi3", "gpt2", "mixtral"} <= set(supported_architectures())


def test_a_model_without_the_decoder_layers_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LlamaModel has no module model\.layers\.0"):
        convert(build_model().model, CONFIG)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_that_computes_something_else_is_refused_before_anything_changes() -> None:
    model = build_model()
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Doubled(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj is a Doubled"):
        convert(model, CONFIG)
    assert not slice_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_on_meta_is_refused() -> None:
    with pytest.raises(ConfigError, match="on meta"):
        convert(build_model().to("meta"), CONFIG)


def test_hooks_on_a_projection_survive_conversion() -> None:
    model = build_model()
    calls: list[int] = []
    projection = model.model.layers[0].mlp.down_proj
    projection.register_forward_hook(lambda *_: calls.append(1))
    convert(model, CONFIG)
    model(tokens())
    restore(model)
    model(tokens())
    assert calls == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_like_continues_an_adapter(dtype: torch.dtype) -> None:
    model = build_model("qwen3").to(dtype)
    base = snapshot(model)
    selection = convert(model, CONFIG)
    train(model)
    trained, parent = snapshot(model), extract_adapter(model)
    restore(model)

    assert convert_like(model, parent) == selection
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=2**-8, atol=1e-6)
    child = extract_adapter(model)
    for name, part in child.slices.items():
        torch.testing.assert_close(part.delta, parent.slices[name].delta, rtol=1e-5, atol=1e-6)
    assert child.base == parent.base
    assert child.config == parent.config
    train(model)
    assert_current(model)
    restore(model)
    assert_same_state(model, base)


def refuse_selection(model: Any, selection: Selection, config: S2FTConfig = CONFIG) -> str:
    """What convert_with says, having changed nothing."""
    before, attributes = snapshot(model), set(vars(model))
    with pytest.raises(ConfigError) as error:
        convert_with(model, config, selection)
    assert_same_state(model, before)
    assert set(vars(model)) == attributes
    assert not slice_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(error.value)


@pytest.mark.parametrize("layout", ["gathered", "permuted"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_wider_models_selection_is_refused_before_anything_changes(
    family: str, layout: Any
) -> None:
    wider = {"intermediate_size": 176, "moe_intermediate_size": 48}
    selection = convert(build_model(family, **wider), CONFIG)
    config = CONFIG.model_copy(update={"layout": layout})
    model = build_model(family)
    message = refuse_selection(model, selection, config)
    assert re.search(r"layers\.0\.mlp\.down_proj: index 1\d\d is outside of \[64, 88\]", message)
    convert(model, config)


def test_indices_that_no_model_has_are_refused() -> None:
    model = build_model("qwen2_moe")
    selection = choose(model, CONFIG)
    dense, experts = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.down_proj"
    rows = selection.modules[experts].indices
    for name, indices, fault in (
        (dense, (3, 1), "do not ascend"),
        (dense, (1, 1), "do not ascend"),
        (dense, (), "do not ascend"),
        (dense, (-1, 1), "index -1 is outside"),
        (dense, rows, "are of 4 experts; this model has 0"),
        (experts, rows[:3], "are of 3 experts; this model has 4"),
        (experts, rows[0], "are of 0 experts; this model has 4"),
        (experts, (*rows[:3], (1,)), "are of 4 experts, each of which must have as many"),
    ):
        changed = dataclasses.replace(selection.modules[name], indices=indices)
        modules = {**selection.modules, name: changed}
        message = refuse_selection(model, dataclasses.replace(selection, modules=modules))
        assert name in message
        assert fault in message
    assert convert_with(model, CONFIG, selection) == selection


def test_slices_are_written_back_in_the_same_order_whatever_they_come_from() -> None:
    def order(model: nn.Module) -> list[str]:
        names = {id(layer): name for name, layer in slice_layers(model)}
        return [names[key] for key in _slices if key in names]

    model = build_model("qwen2_moe")
    convert(model, CONFIG)
    expected, adapter = order(model), extract_adapter(model)
    restore(model)
    shuffled = dict(reversed(adapter.slices.items()))
    convert_like(model, dataclasses.replace(adapter, slices=shuffled))
    assert order(model) == expected
    assert len(expected) == len(adapter.slices)


def test_convert_like_refuses_another_base() -> None:
    model = build_model()
    convert(model, CONFIG)
    parent = extract_adapter(model)
    other = build_model(seed=1)
    with pytest.raises(AdapterError, match="the base differs"):
        convert_like(other, parent)
    assert not slice_layers(other)


def test_the_base_fingerprint_is_the_plain_bases_all_along() -> None:
    model = build_model()
    expected = base_fingerprint(model)
    convert(model, S2FTConfig(budgets=dict.fromkeys(ALL, 1.0)))
    assert base_fingerprint(model) == expected
    train(model)
    assert base_fingerprint(model) == expected
    assert extract_adapter(model).base.fingerprint == expected
    trained = build_model()
    trained.load_state_dict(model.state_dict())
    assert base_fingerprint(trained) != expected
