"""A base that is sharded is read in parts: the same values, and never whole in a worker."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from gloo import GlooPool
from transformers import AutoModelForCausalLM

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.method import Adapter, convert, slice_layers
from s2ft_ray.training.parallel import Layout, Workers, shard_model

MIB = 2**20
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def save_in_files(folder: Path, size: str, **config: Any) -> Path:
    """Save a base as several files, its embeddings tied."""
    runs.save_base(folder, tie_word_embeddings=True, **config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def anonymous_mib() -> float:
    """Memory of this process that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def load_and_measure(base: Path, mapped: bool) -> dict[str, float]:
    """Load, convert and shard; return the peak of this worker above its start, and the sizes."""
    workers = Workers.join(torch.device("cpu"))
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_mib())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_base_model(ModelConfig(name_or_path=str(base)), mapped=mapped)
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


def test_a_worker_never_holds_more_than_its_part(four: GlooPool, tmp_path: Path) -> None:
    base = save_in_files(tmp_path / "base", "20MB", vocab_size=8192, **WIDE)
    for rank in four.run(load_and_measure, base, True):
        assert rank["whole"] > 80
        assert rank["shard"] < 0.3 * rank["whole"]
        assert rank["peak"] < 1.3 * rank["shard"] + rank["largest"]


def hidden_values(base: Path) -> tuple[bool, bool, float]:
    """Compare a mapped model with a plain one: parameters, buffers and ties; then logits."""
    config = ModelConfig(name_or_path=str(base))
    plain, mapped = load_base_model(config), load_base_model(config, mapped=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        difference = (plain(input_ids=ids).logits - mapped(input_ids=ids).logits).abs().max()
    state = plain.state_dict()
    equal = all(torch.equal(value, state[name]) for name, value in mapped.state_dict().items())
    buffers = dict(plain.named_buffers())
    equal &= all(torch.equal(value, buffers[name]) for name, value in mapped.named_buffers())
    tied = mapped.get_input_embeddings().weight is mapped.get_output_embeddings().weight
    return equal and len(state) == len(mapped.state_dict()), tied, float(difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_base_is_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_in_files(tmp_path, "15KB", dtype=dtype)
    assert hidden_values(base) == (True, True, 0.0)


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


def test_another_dtype_than_the_files_is_loaded_whole(tmp_path: Path) -> None:
    base = save_in_files(tmp_path, "15KB")
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype="bfloat16"), mapped=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    convert(model, S2FTConfig())
    assert slice_layers(model)
