"""A base whose files have other names than the model: rewritten by parameters, or loaded whole."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from mapped_bases import is_mapped, save_in_files
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, PreTrainedModel

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def save_renamed(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a base whose files have other names than the model: each expert's matrices apart."""
    sizes = {"num_local_experts": 4, "num_hidden_layers": 2}
    return runs.save_base(folder, dtype, kind=MixtralConfig, **sizes)


@pytest.mark.parametrize("save", [runs.save_base, save_renamed])
@pytest.mark.parametrize("strictly", [False, True])
def test_modules_that_stay_in_fp32_do(
    save: Callable[..., Path], strictly: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_keep_in_fp32_modules_strict" if strictly else "_keep_in_fp32_modules"
    monkeypatch.setattr(PreTrainedModel, name, {"input_layernorm"})
    base = save(tmp_path / "base", torch.float16)
    dtype = "bfloat16" if strictly else "float16"
    config = ModelConfig(name_or_path=str(base), dtype=dtype)
    plain, mapped = load_base_model(config), load_base_model(config, mapped=True)
    state, values = plain.state_dict(), mapped.state_dict()
    assert {name: it.dtype for name, it in values.items()} == {
        n: it.dtype for n, it in state.items()
    }
    assert all(torch.equal(value, state[name]) for name, value in values.items())
    assert mapped.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert mapped.model.layers[0].self_attn.o_proj.weight.dtype == getattr(torch, dtype)
    assert is_mapped(mapped)


def no_room_for_two(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    return "GiB free for"


def filled_by_the_parameters(monkeypatch: pytest.MonkeyPatch) -> str:
    def save(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.integrations.accelerate.save_file", save)
    return "No space left on device"


@pytest.mark.parametrize("lack", [no_room_for_two, filled_by_the_parameters])
def test_without_room_for_two_copies_the_base_is_loaded_whole(
    lack: Callable[[pytest.MonkeyPatch], str],
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = save_renamed(tmp_path / "base")
    told = lack(monkeypatch)
    model = load_base_model(ModelConfig(name_or_path=str(base)), mapped=True)
    assert not is_mapped(model)
    assert told in caplog.text
    assert not list(home.glob("cache/bases/.*.partial"))


def test_a_fault_of_files_with_other_names_is_told_once(tmp_path: Path) -> None:
    base = save_renamed(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights of its architecture") as caught:
        load_base_model(ModelConfig(name_or_path=str(base)), mapped=True)
    assert str(caught.value).count("model.name_or_path") == 1


def test_what_a_killed_worker_left_is_removed_after_a_day(tmp_path: Path, home: Path) -> None:
    left = home / "cache" / "bases" / ".gone.1234.partial"
    fresh = home / "cache" / "bases" / ".other.5678.partial"
    for folder, age_s in ((left, 90_000.0), (fresh, 3600.0)):
        folder.mkdir(parents=True)
        (folder / "0.safetensors").write_text("half")
        os.utime(folder, (time.time() - age_s,) * 2)
    base = save_in_files(tmp_path / "base", "15KB")
    load_base_model(ModelConfig(name_or_path=str(base), dtype="bfloat16"), mapped=True)
    assert not left.exists()
    assert fresh.exists()
