"""Adapters as LoRA directories, loaded by the stock PEFT."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import ARCHITECTURES, FAMILIES, build_model, projections_of, snapshot, tokens
from peft import PeftModel

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    BaseInfo,
    S2FTConfig,
    convert,
    extract_adapter,
    restore,
    slice_layers,
)

# What peft 0.21 says of itself on transformers 5.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
MIXED = {"q": 0.25, "v": 0.5, "o": 0.125, "up": 0.2, "down": 0.4}


def train_adapter(model: Any, **config: Any) -> Adapter:
    convert(model, S2FTConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for _, layer in slice_layers(model):
        layer.slice.data += 0.1 * torch.randn(layer.slice.shape, generator=generator)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


def switched_logits(model: Any, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    adapter.switch_into(model)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    adapter.switch_out(model)
    return logits


def peft_logits(model: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    loaded = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(ids).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("uniform_rank", [False, True])
def test_peft_gives_the_switched_models_logits(
    family: str, uniform_rank: bool, tmp_path: Path
) -> None:
    model = build_model(family)
    adapter = train_adapter(model, budgets=MIXED)
    adapter.export_peft(tmp_path, uniform_rank=uniform_rank)
    expected = switched_logits(model, adapter, tokens())
    with torch.no_grad():
        base = model(tokens()).logits
    found = peft_logits(model, tmp_path, tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.1  # the adapter is not nothing


@pytest.mark.parametrize("family", sorted(ARCHITECTURES.keys() - FAMILIES.keys() - set(EXPERTS)))
def test_peft_loads_fused_and_transposed_weights(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    adapter = train_adapter(model, budgets=dict.fromkeys(projections_of(family), 0.3))
    adapter.export_peft(tmp_path)
    expected = switched_logits(model, adapter, tokens())
    found = peft_logits(model, tmp_path, tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# peft 0.21 looks among the modules alone for whom a rank's pattern is; it heeds it all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    "budgets",
    [
        {"o": 0.25, "v": 0.5},
        {"o": 0.25, "down": 0.3},
        {"up": 0.2, "gate": 0.4},
        {"q": 0.25, "up": 0.5, "gate": 0.2, "down": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("uniform_rank", [False, True])
def test_peft_loads_the_parameters_of_experts(
    family: str, budgets: dict[str, float], uniform_rank: bool, tmp_path: Path
) -> None:
    model = build_model(family)
    adapter = train_adapter(model, budgets=budgets)
    adapter.export_peft(tmp_path, uniform_rank=uniform_rank)
    expected = switched_logits(model, adapter, tokens())
    with torch.no_grad():
        base = model(tokens()).logits
    found = peft_logits(model, tmp_path, tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.05


def test_peft_merges_the_export_into_the_weights_of_the_switched_model(tmp_path: Path) -> None:
    model = build_model()
    adapter = train_adapter(model, budgets=MIXED, layers=[1])
    adapter.export_peft(tmp_path)
    adapter.switch_into(model)
    expected = snapshot(model)
    adapter.switch_out(model)
    merged = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_embedded_base_is_loaded_by_peft(tmp_path: Path) -> None:
    model = load_base_model(ModelConfig(dtype="float32"))
    adapter = train_adapter(model, budgets={"o": 0.25, "down": 0.05, "gate": 0.02})
    adapter.export_peft(tmp_path)
    ids = torch.arange(3, 40).view(1, -1)
    expected = switched_logits(model, adapter, ids)
    torch.testing.assert_close(peft_logits(model, tmp_path, ids), expected, rtol=1e-4, atol=1e-4)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == "s2ft://tiny"


def test_a_consumer_that_knows_no_pattern_scales_by_one(tmp_path: Path) -> None:
    adapter = train_adapter(build_model(), budgets=MIXED)
    adapter.export_peft(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    largest = max(len(part.indices) for part in adapter.slices.values())
    assert document["r"] == document["lora_alpha"] == largest
    assert document["rank_pattern"] == document["alpha_pattern"] != {}
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for name, part in adapter.slices.items():
        rank = document["rank_pattern"].get(name, document["r"])
        assert rank == len(part.indices)
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank


def test_one_rank_for_all_needs_no_pattern(tmp_path: Path) -> None:
    adapter = train_adapter(build_model(), budgets=MIXED)
    adapter.export_peft(tmp_path, uniform_rank=True)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["rank_pattern"] == document["alpha_pattern"] == {}
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    ranks = {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()}
    assert ranks == {document["r"]}


def adapter_of(**slices: AdapterSlice) -> Adapter:
    return Adapter(slices, BaseInfo("base", None, "0" * 64), S2FTConfig())


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 12),
    across=st.integers(1, 9),
    side=st.sampled_from(["in", "out"]),
    data=st.data(),
)
def test_the_product_of_the_factors_is_the_delta_at_its_indices(
    tmp_path_factory: pytest.TempPathFactory, size: int, across: int, side: Any, data: Any
) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    shape = (across, len(indices)) if side == "in" else (len(indices), across)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    part = AdapterSlice(side, torch.tensor(indices, dtype=torch.int32), delta, size)
    wide = AdapterSlice("in", torch.arange(13, dtype=torch.int32), torch.ones(2, 13), 13)
    folder = tmp_path_factory.mktemp("lora")
    uniform_rank = data.draw(st.booleans())
    adapter_of(part=part, wide=wide).export_peft(folder, uniform_rank=uniform_rank)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.part.lora_{x}.weight"] for x in "AB")
    expected = torch.zeros((across, size) if side == "in" else (size, across))
    expected.index_copy_(part.dim, part.indices.long(), delta)
    assert torch.equal(b @ a, expected)
    assert a.shape[0] == b.shape[1] == (13 if uniform_rank else len(indices))


def test_a_rank_that_servers_dont_take_is_refused_with_the_way_out(tmp_path: Path) -> None:
    many = torch.arange(513, dtype=torch.int32)
    wide = AdapterSlice("in", many, torch.ones(2, 513), 600)
    fits = AdapterSlice("in", many[:512], torch.ones(2, 512), 600)
    with pytest.raises(AdapterError) as caught:
        adapter_of(wide=wide, fits=fits).export_peft(tmp_path / "lora")
    (fault,) = caught.value.faults
    assert fault.startswith("wide: 513 selected columns are a LoRA of rank 513")
    assert "at most 512" in fault
    assert "export_merged" in fault
    assert not (tmp_path / "lora").exists()
    adapter_of(fits=fits).export_peft(tmp_path / "lora")


def test_an_adapter_without_sizes_or_modules_is_refused(tmp_path: Path) -> None:
    model = build_model()
    adapter = train_adapter(model)
    slices = {name: dataclasses.replace(part, size=None) for name, part in adapter.slices.items()}
    with pytest.raises(AdapterError, match="doesn't say how wide"):
        dataclasses.replace(adapter, slices=slices).export_peft(tmp_path)
    with pytest.raises(AdapterError, match="no modules"):
        adapter_of().export_peft(tmp_path)
    assert not list(tmp_path.iterdir())
