"""Merged checkpoints, from a loaded model and from the base's files."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from method_models import (
    ALL,
    ARCHITECTURES,
    FAMILIES,
    assert_same_state,
    build_model,
    projections_of,
    snapshot,
    tokens,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft_ray.bases import load_base_model, resolve_base
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    S2FTConfig,
    base_fingerprint_of_files,
    convert,
    extract_adapter,
    restore,
    slice_layers,
    switched_fingerprints,
)


def train_adapter(model: Any, **config: Any) -> Adapter:
    convert(model, S2FTConfig(**{"budgets": dict.fromkeys(ALL, 0.4), **config}))
    generator = torch.Generator().manual_seed(0)
    for _, layer in slice_layers(model):
        layer.slice.data += 0.1 * torch.randn(layer.slice.shape, generator=generator)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_merged_export_is_a_plain_checkpoint_of_the_switched_model(
    family: str, tmp_path: Path
) -> None:
    model = build_model(family)
    base = snapshot(model)
    adapter = train_adapter(model, budgets=dict.fromkeys(projections_of(family), 0.4))
    adapter.export_merged(model, tmp_path)
    assert_same_state(model, base)
    merged = type(model).from_pretrained(tmp_path).eval()
    adapter.switch_into(model)
    with torch.no_grad():
        assert torch.equal(merged(tokens()).logits, model(tokens()).logits)
    assert_same_state(merged, snapshot(model))


def test_an_export_that_fails_switches_the_adapter_out(tmp_path: Path) -> None:
    model = build_model()
    base = snapshot(model)
    adapter = train_adapter(model)

    def fail(_path: Path, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    model.save_pretrained = fail
    with pytest.raises(OSError, match="No space left"):
        adapter.export_merged(model, tmp_path)
    del model.save_pretrained
    assert_same_state(model, base)
    assert switched_fingerprints(model) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_files_gives_the_switched_models_weights(
    family: str, shard_size: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build_model(family).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    adapter = train_adapter(model)
    adapter.export_merged(tmp_path / "base", tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    assert {path.name for path in (tmp_path / "merged").iterdir()} == set(before)
    adapter.switch_into(model)
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=dtype)
    assert_same_state(merged, snapshot(model))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES.keys() - FAMILIES.keys()))
def test_files_of_any_architecture_are_merged_into(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    model.save_pretrained(tmp_path / "base")
    adapter = train_adapter(model, budgets=dict.fromkeys(projections_of(family), 0.4))
    adapter.export_merged(tmp_path / "base", tmp_path / "merged")
    adapter.switch_into(model)
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert_same_state(merged, snapshot(model))


def test_files_of_less_precision_than_the_model_are_not_merged_into(tmp_path: Path) -> None:
    model = load_base_model(ModelConfig())  # fp32, from files in bf16
    adapter = train_adapter(model, budgets={"o": 0.25, "down": 0.05})
    with pytest.raises(AdapterError, match=r"stores torch.bfloat16 and .* loads torch.float32"):
        adapter.export_merged(resolve_base("s2ft://tiny"), tmp_path / "merged")
    adapter.export_merged(model, tmp_path / "merged")
    adapter.switch_into(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_state(merged, snapshot(model))


def test_the_tokenizer_comes_along_with_files(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("s2ft://tiny"), tmp_path / "base")
    model = load_base_model(ModelConfig(name_or_path=str(tmp_path / "base"), dtype="bfloat16"))
    model.save_pretrained(tmp_path / "base")
    adapter = train_adapter(model)
    adapter.export_merged(tmp_path / "base", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert base_fingerprint_of_files(tmp_path / "merged") != adapter.base.fingerprint


def test_weights_of_other_formats_stay_behind(tmp_path: Path) -> None:
    model = build_model()
    base = tmp_path / "base"
    model.save_pretrained(base)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (base / name).write_text("{}")
    (base / "tokenizer.model").write_text("words")
    train_adapter(model).export_merged(base, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert names == expected


def rename_tensors(base: Path) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    safetensors.torch.save_file(renamed, base / "model.safetensors")


def quantize(base: Path) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, base / "model.safetensors")


def other_base(base: Path) -> None:
    build_model(seed=1).save_pretrained(base)


def smaller_base(base: Path) -> None:
    build_model(intermediate_size=44, hidden_size=32).save_pretrained(base)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other values": (other_base, "the base differs"),
    "other shapes": (smaller_base, r"down_proj: delta is \[64, 35\], the weight \[32, 44\]"),
    "other names": (rename_tensors, "no float weight of this name.*load the model"),
    "quantized": (quantize, "down_proj: .* no float weight of this name"),
    "no weights": (lambda base: os.remove(base / "model.safetensors"), "no readable safetensors"),
    "cut": (lambda base: os.truncate(base / "model.safetensors", 999), "no readable safetensors"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_files_that_arent_the_adapters_base_are_refused(change: str, tmp_path: Path) -> None:
    model = build_model()
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = train_adapter(model)
    break_it, message = FOREIGN[change]
    break_it(base)
    with pytest.raises(AdapterError, match=message):
        adapter.export_merged(base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_not_merged_into(tmp_path: Path) -> None:
    model = build_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="is not empty; name a new folder"):
        train_adapter(model).export_merged(tmp_path, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_merge_that_is_cut_short_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    model.save_pretrained(tmp_path / "base")
    adapter = train_adapter(model)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s2ft_ray.method.merged_export._add_delta", fail)
    with pytest.raises(OSError, match="No space left"):
        adapter.export_merged(tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()


def peak_growth(action: Callable[[], Any]) -> int:
    """Bytes by which the process's memory grew at most while `action` ran."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are reset through Linux's /proc"
)
@pytest.mark.parametrize("way", ["model", "files"])
def test_a_merge_never_holds_a_second_copy_of_the_model(way: str, tmp_path: Path) -> None:
    model = build_model(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=8192
    )
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    adapter = train_adapter(model, budgets={"o": 0.02, "down": 0.02})
    model.save_pretrained(tmp_path / "base", max_shard_size="40MB")
    adapter.export_merged(model, tmp_path / "warm")  # what the first save imports and allocates
    base = model if way == "model" else tmp_path / "base"
    growth = peak_growth(lambda: adapter.export_merged(base, tmp_path / "merged"))
    # The largest tensor is 0.16 of it.
    assert growth < 0.25 * size, f"{growth / 2**20:.1f} of {size / 2**20:.1f} MiB"
    document = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert document["hidden_size"] == 512
