"""Every supported family, from random weights: gradients, adapters, generation, and their parts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import (
    ALL,
    ARCHITECTURES,
    WITHOUT_GATE,
    assert_same_state,
    build_model,
    projections_of,
    snapshot,
    tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method import (
    Adapter,
    BaseFiles,
    S2FTConfig,
    base_fingerprint,
    base_fingerprint_of_files,
    check_packing,
    convert,
    convert_like,
    count_trainable,
    extract_adapter,
    restore,
    slice_layers,
    supported_architectures,
)
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.method.weights import find_weight, gather


def config_of(family: str, **changes: Any) -> S2FTConfig:
    budgets = {p: 0.3 if p in "qkvo" else 0.2 for p in projections_of(family)}
    return S2FTConfig(**{"budgets": budgets, **changes})


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(steps):
        ids = tokens(seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def full_gradients(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of whole weights, as Linear's [out, in] or [experts, out, in]."""
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    gradients = {}
    for name in names:
        weight = find_weight(model, name)
        assert weight is not None
        gradient = weight.parameter.grad
        assert gradient is not None
        gradients[name] = gradient.T if weight.is_transposed else gradient
    return gradients


def test_every_supported_architecture_is_tested() -> None:
    assert sorted(ARCHITECTURES) == supported_architectures()


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["gathered", "permuted"])
def test_a_converted_model_is_the_plain_one_and_its_gradients_are_entries_of_the_full(
    family: str, layout: str
) -> None:
    plain = build_model(family)
    model = copy.deepcopy(plain)
    convert(model, config_of(family, layout=layout))
    expected = full_gradients(plain, [name for name, _ in slice_layers(model)])
    ids = tokens()
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    for name, layer in slice_layers(model):
        gradient = layer.slice.grad.T if layer.is_transposed else layer.slice.grad
        held = layer.indices if layer.original is None else layer.original
        whole = gather(expected[name], -1 if layer.side == "in" else -2, held)
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-6, msg=name)
        assert float(gradient.norm()) > 0
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "gathered"), (torch.bfloat16, "permuted")]
)
def test_an_adapter_goes_round_and_the_base_comes_back_bitwise(
    family: str, dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    model = build_model(family).to(dtype)
    base, identity = snapshot(model), base_fingerprint(model)
    names = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    selection = convert(model, config_of(family, layout=layout))
    assert_same_state(model, base)
    train(model)
    adapter, trained = extract_adapter(model), snapshot(model)
    assert base_fingerprint(model) == adapter.base.fingerprint == identity
    with torch.no_grad():
        logits = model(tokens()).logits
    restore(model)
    assert_same_state(model, base)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == names

    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.fingerprint == adapter.fingerprint
    assert {n: p.transposed for n, p in loaded.slices.items()} == {
        n: p.transposed for n, p in adapter.slices.items()
    }
    loaded.switch_into(model)
    assert base_fingerprint(model) == identity
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=tolerance, atol=tolerance, msg=name)
    with torch.no_grad():
        tolerance = 1e-3 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(model(tokens()).logits, logits, rtol=0, atol=tolerance)
    loaded.switch_out(model)
    assert_same_state(model, base)

    assert convert_like(model, loaded) == selection
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=tolerance, atol=tolerance, msg=name)
    restore(model)
    assert_same_state(model, base)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_trained_model_generates_as_the_plain_one_with_its_weights(family: str) -> None:
    model = build_model(family)
    convert(model, config_of(family))
    train(model)
    plain = build_model(family, seed=3)
    plain.load_state_dict(model.state_dict(), strict=True)
    ids = tokens(shape=(2, 6))
    both = [
        it.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for it in (model, plain)
    ]
    assert both[0].shape == (2, 11)
    assert torch.equal(*both)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_copy_and_a_loaded_state_carry_on(family: str) -> None:
    model = build_model(family)
    convert(model, config_of(family, layout="permuted"))
    other = copy.deepcopy(model)
    train(other)
    model.load_state_dict(snapshot(other), strict=True)
    assert extract_adapter(model).fingerprint == extract_adapter(other).fingerprint
    restore(other)
    restore(model)
    assert_same_state(model, snapshot(other))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_counts_need_no_model_and_avoided_units_are_disjoint(family: str, allocation: str) -> None:
    model = build_model(family)
    config = config_of(family, allocation=allocation)
    first = convert(model, config)
    assert count_trainable(model.config, config) == first.num_trainable
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert first.num_trainable == trainable
    adapter = extract_adapter(model)
    restore(model)
    second = convert(model, S2FTConfig(budgets={"o": 0.1, "up": 0.2, "down": 0.2}), avoid=[adapter])
    decoder_units = vars(first)
    for kind in ("channels", "expert_channels", "shared_channels"):
        for layer, units in vars(second)[kind].items():
            taken = decoder_units[kind].get(layer, [])
            pairs = (
                zip(units, taken, strict=True) if kind == "expert_channels" else [(units, taken)]
            )
            assert all(set(mine).isdisjoint(theirs) for mine, theirs in pairs)
    for layer, heads in second.heads.items():
        assert set(heads).isdisjoint(first.heads.get(layer, []))


@pytest.mark.parametrize("family", WITHOUT_GATE)
def test_a_family_without_a_gate_says_what_it_has(family: str) -> None:
    model = build_model(family)
    wanted = S2FTConfig(budgets={"gate": 0.1, "down": 0.1})
    message = rf"method.budgets.gate: a {family} model has no gate; .* are q k v o up down"
    with pytest.raises(ConfigError, match=message):
        convert(model, wanted)
    with pytest.raises(ConfigError, match=message):
        count_trainable(model.config, wanted)
    assert not slice_layers(model)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_parts_of_a_fused_weight_cover_it_once(family: str) -> None:
    model = build_model(family)
    decoder = Decoder(model)
    for name, weight in decoder.weights.items():
        found = torch.cat(
            [
                coupling.parts[projection].to_indices(
                    torch.arange(coupling.parts[projection].num_units)
                )
                for coupling, projection in decoder.members(name)
            ]
        )
        coupling, projection = decoder.members(name)[0]
        size = weight.view().shape[-1 if coupling.parts[projection].side == "in" else -2]
        assert torch.equal(found.sort().values, torch.arange(size)), name


def zero_unit(decoder: Decoder, layer: int, structure: str, unit: int) -> None:
    """Zero what a unit writes: its columns of o or down."""
    coupling = decoder.geometry.couplings[layer, structure]  # type: ignore[index]
    part = coupling.parts["o" if structure == "heads" else "down"]
    columns = part.to_indices(torch.tensor([unit]))
    decoder.weights[part.module].view()[..., columns] = 0


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_a_unit_is_the_same_one_in_all_its_projections(family: str) -> None:
    """Without its columns of o or down, the rows of a unit make no difference, others' do."""
    model = build_model(family, num_hidden_layers=2 if "moe" in family else 1, n_layer=1)
    decoder, base = Decoder(model), snapshot(model)
    for key, coupling in decoder.geometry.couplings.items():
        layer, structure = key
        last = "o" if structure == "heads" else "down"
        for projection, part in coupling.parts.items():
            if projection == last:
                continue
            model.load_state_dict(base)
            group = coupling.num_units // part.num_units  # query heads of a key/value head
            for unit in range(group, 2 * group):
                zero_unit(decoder, layer, structure, unit)
            before = model(tokens()).logits
            rows = part.to_indices(torch.tensor([1]))
            view = decoder.weights[part.module].view()
            kept = view.clone()
            view[..., rows, :] += 1
            if family != "olmo2" or projection == "v":  # its norms see all heads at once
                torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-4)
            view.copy_(kept)
            view[..., part.to_indices(torch.tensor([0])), :] += 1
            assert (model(tokens()).logits - before).abs().max() > 1e-3, (key, projection)


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_packed_rows_are_apart_or_packing_is_refused(family: str) -> None:
    model = build_model(family)
    rows = [tokens(1, (1, 7)), tokens(2, (1, 5))]
    positions = [torch.arange(row.shape[1])[None] for row in rows]
    plain = {"attention_mask": None, "use_cache": False}  # as the training loop calls it
    apart = torch.cat(
        [model(r, position_ids=p, **plain).logits for r, p in zip(rows, positions, strict=True)], 1
    )
    packed = model(torch.cat(rows, 1), position_ids=torch.cat(positions, 1), **plain).logits
    if float((packed - apart).abs().max()) < 1e-4:
        check_packing(model.config)
    else:
        with pytest.raises(ConfigError, match=f"data.packing: a {family} model builds"):
            check_packing(model.config)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_files_are_read_under_the_models_names(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    model.save_pretrained(tmp_path)
    assert base_fingerprint_of_files(tmp_path) == base_fingerprint(model)
    files = BaseFiles(tmp_path)
    parameters = dict(model.named_parameters())
    assert files.names == sorted(parameters)
    for name in files.names:
        assert torch.equal(files.read(name), parameters[name]), name
    with pytest.raises(AdapterError, match="holds no nothing"):
        files.read("nothing")


def test_files_without_prefix_and_with_masks_are_the_same_base(tmp_path: Path) -> None:
    model = build_model("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(state, path)
    assert base_fingerprint_of_files(tmp_path) == base_fingerprint(model)


def test_files_that_lack_an_experts_matrix_are_refused(tmp_path: Path) -> None:
    model = build_model("mixtral")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(state, path)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.experts\.gate_up_proj lacks the mat"):
        base_fingerprint_of_files(tmp_path)


def test_experts_train_slices_of_their_own() -> None:
    model = build_model("mixtral")
    selection = convert(model, S2FTConfig(budgets={"down": 0.1, "gate": 0.05}))
    down = selection.modules["model.layers.0.mlp.experts.down_proj"]
    assert (len(down.indices), down.count) == (4, 9)
    assert len({tuple(row) for row in selection.expert_channels[0]}) == 4
    assert selection.to_json()["modules"]["model.layers.1.mlp.experts.down_proj"]["count"] == 9
    part = extract_adapter(model).slices["model.layers.0.mlp.experts.down_proj"]
    assert (list(part.indices.shape), list(part.delta.shape)) == ([4, 9], [4, 64, 9])
    assert part.size == 88
    part = extract_adapter(model).slices["model.layers.0.mlp.experts.gate_up_proj"]
    assert (part.side, list(part.delta.shape)) == ("out", [4, 4, 64])


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zero() -> None:
    model = build_model("mixtral")
    convert(model, S2FTConfig(budgets={"down": 0.1}))
    model(tokens(shape=(1, 1)), labels=None).logits.sum().backward()
    (_, layer), *_ = slice_layers(model)
    norms = layer.slice.grad.flatten(1).norm(dim=1)
    assert sorted((norms > 0).tolist()) == [False, False, True, True]  # two experts a token


def test_converted_experts_without_gradients_run_as_before() -> None:
    model = build_model("qwen3_moe")
    expected = model(tokens()).logits
    convert(model, config_of("qwen3_moe"))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_stored_in_another_way_are_refused() -> None:
    model = build_model("mixtral")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.\w+ is a MixtralExperts"):
        convert(model, config_of("mixtral"))
    assert not slice_layers(model)


def test_a_model_whose_weights_its_config_denies_is_refused() -> None:
    model = build_model("phi3")
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = nn.Linear(64, 80, bias=False)
    with pytest.raises(
        ConfigError, match=r"qkv_proj has the shape \[80, 64\], its config says \[96, 64\]"
    ):
        convert(model, config_of("phi3"))


def test_the_budgets_of_a_fused_module_are_rows_of_it() -> None:
    model = build_model("phi3")
    selection = convert(model, S2FTConfig(budgets={"v": 0.5, "up": 0.1, "gate": 0.1}))
    (kv_head,) = selection.kv_heads[0]
    start = 64 + 16 + 8 * kv_head  # rows of q, then of k, then of v
    rows = selection.modules["model.layers.0.self_attn.qkv_proj"].indices
    assert rows == tuple(range(start, start + 8))
    channels = selection.channels[0]
    rows = selection.modules["model.layers.0.mlp.gate_up_proj"].indices
    assert rows == (*channels, *(88 + channel for channel in channels))


def test_all_is_what_a_family_of_seven_projections_has() -> None:
    assert Decoder(build_model("llama")).geometry.projections == list(ALL)
