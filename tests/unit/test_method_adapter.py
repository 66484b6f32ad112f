"""Adapters on disk: round trip, identity, and every kind of damage."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from method_models import FAMILIES, build_model
from torch import Tensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    BaseInfo,
    S2FTConfig,
    base_fingerprint,
    base_fingerprint_of_files,
    convert,
    extract_adapter,
    slice_layers,
)

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
DOWN, QUERY = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"


def build_adapter(**changes: Any) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    slices = {
        DOWN: AdapterSlice(
            "in",
            torch.tensor([0, 3, 9], dtype=torch.int32),
            torch.randn(5, 3, generator=generator),
            size=11,
        ),
        QUERY: AdapterSlice(
            "out", torch.tensor([2, 4], dtype=torch.int32), torch.randn(2, 5, generator=generator)
        ),
    }
    values = {
        "slices": slices,
        "base": BaseInfo("acme/base", "abc123", "0" * 64),
        "config": S2FTConfig(budgets={"q": 0.1, "down": 0.2}, seed=3),
        "training": {"steps": 3, "loss": 0.25},
    }
    return Adapter(**{**values, **changes})


def test_a_saved_adapter_comes_back_whole(tmp_path: Path) -> None:
    adapter = build_adapter()
    adapter.save(tmp_path / "new" / "folder")
    loaded = Adapter.load(tmp_path / "new" / "folder")
    assert loaded.fingerprint == adapter.fingerprint
    assert (loaded.base, loaded.config) == (adapter.base, adapter.config)
    assert loaded.training == adapter.training
    assert list(loaded.slices) == list(adapter.slices)
    for name, part in adapter.slices.items():
        assert (loaded.slices[name].side, loaded.slices[name].size) == (part.side, part.size)
        assert torch.equal(loaded.slices[name].indices, part.indices)
        assert torch.equal(loaded.slices[name].delta, part.delta)


def test_the_files_are_what_the_contract_says(tmp_path: Path) -> None:
    build_adapter().save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, TENSORS_NAME]
    document = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert document["peft_type"] == "S2FT"
    assert document["format_version"] == 1
    assert document["base"] == {
        "name": "acme/base",
        "revision": "abc123",
        "fingerprint": "0" * 64,
    }
    assert document["modules"][DOWN] == {"side": "in", "count": 3, "size": 11}
    assert document["modules"][QUERY] == {"side": "out", "count": 2, "size": None}
    assert document["config"]["budgets"] == {"q": 0.1, "down": 0.2}
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_NAME)
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        f"{DOWN}.indices": (torch.int32, [3]),
        f"{DOWN}.delta": (torch.float32, [5, 3]),
        f"{QUERY}.indices": (torch.int32, [2]),
        f"{QUERY}.delta": (torch.float32, [2, 5]),
    }


def test_an_extracted_adapter_has_the_trained_difference() -> None:
    model = build_model("qwen2").to(torch.bfloat16)
    convert(model, S2FTConfig(budgets={"v": 0.5, "down": 0.1}))
    layers = slice_layers(model)
    for _, layer in layers:
        layer.slice.data += 0.125
    adapter = extract_adapter(model)
    assert list(adapter.slices) == [name for name, _ in layers]
    for name, layer in layers:
        part = adapter.slices[name]
        assert part.indices.dtype == torch.int32
        assert part.indices.tolist() == layer.indices.tolist()
        assert part.delta.dtype == torch.float32
        torch.testing.assert_close(part.delta, torch.full_like(part.delta, 0.125))
    layers[0][1].slice.data += 1  # an adapter is a value: training on changes nothing in it
    assert float(adapter.slices[layers[0][0]].delta.max()) < 0.2
    assert adapter.num_parameters == sum(layer.slice.numel() for _, layer in layers)


def change_delta(adapter: Adapter) -> Adapter:
    part = adapter.slices[DOWN]
    delta = part.delta.clone()
    delta[0, 0] = torch.nextafter(delta[0, 0], torch.tensor(9.0))
    return with_slice(adapter, dataclasses.replace(part, delta=delta))


def with_slice(adapter: Adapter, part: AdapterSlice) -> Adapter:
    return dataclasses.replace(adapter, slices={**adapter.slices, DOWN: part})


def test_the_fingerprint_is_of_slices_and_base_alone() -> None:
    adapter = build_adapter()
    same = [
        build_adapter(training={}),
        build_adapter(config=S2FTConfig()),
        build_adapter(base=BaseInfo("a copy", None, "0" * 64)),
        build_adapter(slices=dict(reversed(adapter.slices.items()))),
    ]
    assert {other.fingerprint for other in same} == {adapter.fingerprint}
    part = adapter.slices[DOWN]
    moved = torch.tensor([0, 3, 8], dtype=torch.int32)
    others = [
        change_delta(adapter),
        with_slice(adapter, dataclasses.replace(part, indices=moved)),
        with_slice(adapter, AdapterSlice("out", part.indices, part.delta)),
        build_adapter(base=BaseInfo("acme/base", "abc123", "1" * 64)),
        build_adapter(slices={"other": part, QUERY: adapter.slices[QUERY]}),
        build_adapter(slices={QUERY: adapter.slices[QUERY]}),
    ]
    assert len({adapter.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_the_fingerprint_is_the_same_in_every_release() -> None:
    part = AdapterSlice("in", torch.tensor([1, 2], dtype=torch.int32), torch.tensor([[0.5, -1.0]]))
    assert build_adapter(slices={"m": part}).fingerprint == (
        "dc116dce20b0c90bbfd5fc39f76464d0dcc57a7f8347945d72252586cb4cc907"
    )


def test_saving_again_replaces_the_adapter_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    build_adapter().save(tmp_path)
    other = change_delta(build_adapter())
    other.save(tmp_path)
    assert Adapter.load(tmp_path).fingerprint == other.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG_NAME, TENSORS_NAME]


def test_a_save_that_fails_keeps_the_old_adapter_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_adapter()
    old.save(tmp_path)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        change_delta(old).save(tmp_path)
    assert Adapter.load(tmp_path).fingerprint == old.fingerprint
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, TENSORS_NAME]


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / CONFIG_NAME).read_text())
        change(document)
        (folder / CONFIG_NAME).write_text(json.dumps(document))

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TENSORS_NAME)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / TENSORS_NAME)

    return damage


def put(key: str, value: Tensor) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({key: value}))


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def nan_delta() -> Tensor:
    return torch.full((5, 3), 1.0).index_fill_(1, torch.tensor([1]), float("nan"))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: os.remove(f / CONFIG_NAME), f"{CONFIG_NAME}: can't be read: No such"),
    "no tensors": (lambda f: os.remove(f / TENSORS_NAME), f"{TENSORS_NAME}: can't be read"),
    "half a config": (truncate(CONFIG_NAME, 100), "no valid JSON"),
    "half the tensors": (truncate(TENSORS_NAME, 300), "truncated, or no safetensors"),
    "empty tensors": (truncate(TENSORS_NAME, 0), "truncated, or no safetensors"),
    "a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), "holds list, not an object"),
    "binary config": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe"), "no valid JSON"),
    "lora": (edit_config(lambda d: d.update(peft_type="LORA")), "peft_type is 'LORA'"),
    "foreign": (lambda f: (f / CONFIG_NAME).write_text("{}"), "peft_type is None"),
    "version": (edit_config(lambda d: d.update(format_version=2)), "format_version is 2; .* 1"),
    "no base": (edit_config(lambda d: d.pop("base")), "base is not"),
    "base hash": (edit_config(lambda d: d["base"].update(fingerprint="xy")), "base is not"),
    "no method": (edit_config(lambda d: d.pop("config")), "config is not an object"),
    "bad method": (
        edit_config(lambda d: d["config"].update(budgets={"z": 1})),
        r"config: budgets\.z",
    ),
    "no modules": (edit_config(lambda d: d.update(modules={})), "at least one module"),
    "bad side": (edit_config(lambda d: d["modules"][DOWN].update(side="up")), "side: in | out"),
    "bad size": (edit_config(lambda d: d["modules"][DOWN].update(size=2)), "size: count or more"),
    "low size": (edit_config(lambda d: d["modules"][DOWN].update(size=9)), "a weight of 9"),
    "bad training": (edit_config(lambda d: d.update(training=[])), "training is not an object"),
    "extra module": (
        edit_config(lambda d: d["modules"].update(x={"side": "in", "count": 1})),
        "x.delta is missing",
    ),
    "missing module": (edit_config(lambda d: d["modules"].pop(DOWN)), "belongs to no module"),
    "no delta": (edit_tensors(lambda t: t.pop(f"{DOWN}.delta")), f"{DOWN}.delta is missing"),
    "foreign tensor": (put("lora_A", torch.ones(1)), "lora_A belongs to no module"),
    "unordered": (put(f"{DOWN}.indices", int32(3, 0, 9)), "not ascending"),
    "twice": (put(f"{DOWN}.indices", int32(0, 3, 3)), "not ascending"),
    "negative": (put(f"{DOWN}.indices", int32(-1, 3, 9)), "not ascending from 0"),
    "int64": (put(f"{DOWN}.indices", torch.tensor([0, 3, 9])), "is torch.int64, not int32"),
    "fewer": (put(f"{DOWN}.indices", int32(0, 3)), r"has shape \[2\], .* \[3\]"),
    "wrong shape": (put(f"{DOWN}.delta", torch.ones(3, 5)), r"\[3, 5\], .* \[out, 3\]"),
    "one dimension": (put(f"{QUERY}.delta", torch.ones(10)), r"\[10\], .* \[2, in\]"),
    "half precision": (put(f"{DOWN}.delta", torch.ones(5, 3).half()), "float16, not float32"),
    "nan": (put(f"{DOWN}.delta", nan_delta()), "holds NaN or infinity"),
    "other values": (put(f"{DOWN}.delta", torch.ones(5, 3)), "one of them was changed"),
    "other base": (
        edit_config(lambda d: d["base"].update(fingerprint="1" * 64)),
        "one of them was changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_saying_what_and_where(damage: str, tmp_path: Path) -> None:
    build_adapter().save(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(AdapterError, match=message) as caught:
        Adapter.load(tmp_path)
    assert all(str(tmp_path) in fault for fault in caught.value.faults)


def test_every_fault_of_the_tensors_is_told_at_once(tmp_path: Path) -> None:
    build_adapter().save(tmp_path)
    put(f"{DOWN}.delta", nan_delta())(tmp_path)
    put(f"{QUERY}.indices", int32(4, 2))(tmp_path)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(tmp_path)
    assert len(caught.value.faults) == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere.*No such file"):
        Adapter.load(tmp_path / "nowhere")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_a_base_is_the_same_from_memory_and_files_in_fp32_and_bf16(
    family: str, shard_size: str, tmp_path: Path
) -> None:
    model = build_model(family)
    expected = base_fingerprint(model)
    model.save_pretrained(tmp_path / "fp32", max_shard_size=shard_size)
    assert len(list((tmp_path / "fp32").glob("*.safetensors"))) > (shard_size == "40KB")
    assert base_fingerprint_of_files(tmp_path / "fp32") == expected
    for dtype in (torch.float32, torch.bfloat16):
        loaded = type(model).from_pretrained(tmp_path / "fp32", dtype=dtype)
        assert base_fingerprint(loaded) == expected
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert base_fingerprint_of_files(tmp_path / "bf16") == expected


def test_another_base_has_another_fingerprint() -> None:
    model = build_model()
    found = {base_fingerprint(model), base_fingerprint(build_model(seed=1))}
    found.add(base_fingerprint(build_model(vocab_size=62)))
    with torch.no_grad():
        model.model.norm.weight[0] += 0.1
    assert len({*found, base_fingerprint(model)}) == 4


def test_a_folder_without_a_checkpoint_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no readable safetensors checkpoint"):
        base_fingerprint_of_files(tmp_path)
    build_model().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(AdapterError, match="no readable safetensors checkpoint"):
        base_fingerprint_of_files(tmp_path)
