"""A base that is sharded is read in parts: the same values, and never whole in a worker."""

import ctypes
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from gloo import GlooPool
from mapped_bases import WIDE, is_mapped, save_in_files
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.method import Adapter, convert, slice_layers
from s2ft_ray.training.parallel import Layout, Workers, shard_model

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h
SMALL = {"num_hidden_layers": 1, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def anonymous_mib() -> float:
    """Memory of this process that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def load_and_measure(base: Path, small: Path, dtype: str, home: Path) -> dict[str, float]:
    """Load, convert and shard; return the peak of this worker above its start, and the sizes.

    A `small` base of the same kind goes the same way before: what the code takes isn't counted.
    """
    os.environ["S2FT_HOME"] = str(home)
    # what is freed goes back to the system, however large the blocks were that went before
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    workers = Workers.join(torch.device("cpu"))
    torch.ones(4096, 64).bfloat16()  # what torch takes for itself with the first conversion
    load_base_model(ModelConfig(name_or_path=str(small), dtype=dtype), mapped=True)
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_mib())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype=dtype), mapped=True)
    sizes = {p: p.numel() * p.element_size() for p in model.parameters()}
    convert(model, S2FTConfig(budgets={"o": 0.125, "down": 0.02}))
    shard_model(model, workers, Layout.of("full", workers.world_size, 1))
    done.set()
    thread.join()
    held = [p.to_local() for p in model.parameters()]  # type: ignore[operator]
    return {
        "peak": peak[0] - before,
        "shard": sum(t.numel() * t.element_size() for t in held) / MIB,
        "whole": sum(sizes.values()) / MIB,
        "largest": max(sizes.values()) / MIB,
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_worker_never_holds_more_than_its_part(
    four: GlooPool, tmp_path: Path, dtype: str
) -> None:
    base = save_in_files(tmp_path / "base", "20MB", vocab_size=8192, **WIDE)
    small = save_in_files(tmp_path / "small", "300KB", vocab_size=512, **{**WIDE, **SMALL})
    for rank in four.run(load_and_measure, base, small, dtype, tmp_path / "home"):
        assert rank["whole"] > (80 if dtype == "auto" else 40)
        assert rank["shard"] < 0.3 * rank["whole"]
        assert rank["peak"] < 1.3 * rank["shard"] + rank["largest"]


def test_nor_where_the_files_have_other_names(four: GlooPool, tmp_path: Path) -> None:
    base, small = tmp_path / "base", tmp_path / "small"
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 10,
        "num_local_experts": 4,
        "head_dim": 32,
    }
    runs.save_base(base, kind=MixtralConfig, **sizes)
    runs.save_base(small, kind=MixtralConfig, **{**sizes, **SMALL})
    for rank in four.run(load_and_measure, base, small, "auto", tmp_path / "home"):
        assert rank["whole"] > 60
        assert rank["shard"] < 0.3 * rank["whole"]
        assert rank["peak"] < 1.3 * rank["shard"] + rank["largest"]
    assert not list((tmp_path / "home").glob("cache/bases/.*.partial"))


def compare(base: Path, dtype: str) -> tuple[bool, bool, float]:
    """Compare a mapped model with a plain one: parameters, buffers and ties; then logits."""
    config = ModelConfig(name_or_path=str(base), dtype=dtype)
    plain, mapped = load_base_model(config), load_base_model(config, mapped=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        difference = (plain(input_ids=ids).logits - mapped(input_ids=ids).logits).abs().max()
    state = plain.state_dict()
    equal = all(torch.equal(value, state[name]) for name, value in mapped.state_dict().items())
    dtypes = {name: value.dtype for name, value in state.items()}
    equal &= dtypes == {name: value.dtype for name, value in mapped.state_dict().items()}
    buffers = dict(plain.named_buffers())
    equal &= all(torch.equal(value, buffers[name]) for name, value in mapped.named_buffers())
    tied = mapped.get_input_embeddings().weight is mapped.get_output_embeddings().weight
    return equal and len(state) == len(mapped.state_dict()), tied, float(difference)


# Each computes something as it is made, that no file has.
COMPUTED: dict[str, tuple[type, dict[str, Any]]] = {
    "gemma": (GemmaConfig, {"head_dim": 12}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 12, "sliding_window": 8}),
    "gpt2": (GPT2Config, {"n_embd": 48, "n_inner": 88, "n_layer": 2, "n_head": 4}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "llama3": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn": (
        Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "dynamic": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
}


def save_computing(folder: Path, family: str) -> Path:
    """Save a small model of `family`, of random weights."""
    kind, changes = COMPUTED[family]
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    values = {**sizes, **changes}  # some names are one family's own: n_layer
    config = kind(**{k: v for k, v in values.items() if hasattr(kind, k)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", COMPUTED)
def test_what_a_model_computes_as_it_is_made_is_the_same(
    tmp_path: Path, family: str, dtype: str
) -> None:
    base = save_computing(tmp_path / "base", family)
    equal, _, difference = compare(base, dtype)
    assert equal
    assert difference == 0.0
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype=dtype), mapped=True)
    assert is_mapped(model)
    assert any(buffer.numel() > 0 for buffer in model.buffers()) or family == "gpt2"


def compare_sharded(base: Path, home: Path) -> tuple[bool, float]:
    """Compare a mapped model that is converted and sharded with a plain one: buffers, logits."""
    os.environ["S2FT_HOME"] = str(home)
    config = ModelConfig(name_or_path=str(base), dtype="bfloat16")
    plain, mapped = load_base_model(config), load_base_model(config, mapped=True)
    convert(mapped, S2FTConfig(budgets={"o": 0.25, "down": 0.1}))
    workers = Workers.join(torch.device("cpu"))
    shard_model(mapped, workers, Layout.of("full", workers.world_size, 1))
    buffers = dict(mapped.named_buffers())
    equal = all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        difference = (plain(input_ids=ids).logits - mapped(input_ids=ids).logits).abs().max()
    return equal, float(difference)


def test_and_it_stays_so_as_the_model_is_sharded(two: GlooPool, tmp_path: Path, home: Path) -> None:
    for family in COMPUTED:
        base = save_computing(tmp_path / family, family)
        for equal, difference in two.run(compare_sharded, base, home):
            assert equal, family
            assert difference <= 0.02, family  # channels are summed in another order


def rewritten(home: Path) -> list[Path]:
    return sorted(home.glob("cache/bases/*/*.safetensors"))


@pytest.mark.parametrize(
    ("files", "dtype"),
    [
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.float16, "bfloat16"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float32"),
    ],
)
def test_a_mapped_base_is_the_base(
    tmp_path: Path, home: Path, files: torch.dtype, dtype: str
) -> None:
    base = save_in_files(tmp_path / "base", "15KB", dtype=files)
    assert compare(base, dtype) == (True, True, 0.0)
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype=dtype), mapped=True)
    assert is_mapped(model)
    assert bool(rewritten(home)) == (dtype != "auto")
    convert(model, S2FTConfig())
    assert slice_layers(model)


def test_names_that_are_not_the_models_are_read_through_a_copy(tmp_path: Path, home: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as file:
        assert any("experts.3.w1" in name for name in file.keys())  # noqa: SIM118 - no mapping
    assert compare(tmp_path / "base", "auto") == (True, False, 0.0)
    written = rewritten(home)
    model = load_base_model(ModelConfig(name_or_path=str(tmp_path / "base")), mapped=True)
    assert is_mapped(model)
    assert rewritten(home) == written


def test_a_copy_is_made_once_and_anew_for_other_files(tmp_path: Path, home: Path) -> None:
    base = save_in_files(tmp_path / "base", "15KB")
    config = ModelConfig(name_or_path=str(base), dtype="bfloat16")
    load_base_model(config, mapped=True)
    first = {path: path.stat().st_mtime_ns for path in rewritten(home)}
    load_base_model(config, mapped=True)
    assert {path: path.stat().st_mtime_ns for path in rewritten(home)} == first
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(base, max_shard_size="15KB")
    assert compare(base, "bfloat16") == (True, True, 0.0)


def test_an_entry_that_lacks_a_file_is_made_again(tmp_path: Path, home: Path) -> None:
    base = save_in_files(tmp_path / "base", "15KB")
    load_base_model(ModelConfig(name_or_path=str(base), dtype="bfloat16"), mapped=True)
    rewritten(home)[3].unlink()
    assert compare(base, "bfloat16") == (True, True, 0.0)


def no_room(monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    del home
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    return "has 0.00 GiB free for"


def filled_meanwhile(monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    del home

    def save(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("s2ft_ray.bases.rewritten.save_file", save)
    return "No space left on device"


def no_folder(monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    del monkeypatch
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "bases").write_text("no folder")
    return "File exists"


@pytest.mark.parametrize("lack", [no_room, filled_meanwhile, no_folder])
def test_without_room_for_a_copy_the_base_is_loaded_whole(
    lack: Callable[[pytest.MonkeyPatch, Path], str],
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = save_in_files(tmp_path / "base", "15KB")
    told = lack(monkeypatch, home)
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype="bfloat16"), mapped=True)
    assert not is_mapped(model)
    assert "can't be kept as this run needs it" in caplog.text
    assert told in caplog.text
    assert not [path for path in home.glob("cache/bases/.*") if path.name.endswith("partial")]


def test_two_tensors_of_tied_names_stay_two(tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert compare(base, "auto")[0]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert compare(base, "auto")[0]
    assert is_mapped(load_base_model(ModelConfig(name_or_path=str(base)), mapped=True))


def test_one_file_counts_more_than_an_index_that_was_left(tmp_path: Path) -> None:
    base = save_in_files(tmp_path / "base", "15KB")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    save_file(
        {
            name: it.contiguous()
            for name, it in model.state_dict().items()
            if name != "lm_head.weight"
        },
        base / "model.safetensors",
        {"format": "pt"},
    )
    assert compare(base, "auto") == (True, True, 0.0)


def test_training_leaves_the_files_alone_and_gives_the_same_adapter(
    two: GlooPool, tmp_path: Path
) -> None:
    base = save_in_files(tmp_path / "base", "15KB")
    files = {path: path.read_bytes() for path in base.iterdir()}
    made = []
    for mode in ("replicate", "full"):
        run = runs.make_run(tmp_path / mode, base, parallel={"num_workers": 2, "sharding": mode})
        two.run(runs.train, run.path)
        made.append(Adapter.load(run.adapter).fingerprint)
    assert made[0] == made[1]
    assert {path: path.read_bytes() for path in base.iterdir()} == files
