"""Bases in several files, and whether a model lies in them."""

from pathlib import Path
from typing import Any

import runs
import torch
from transformers import AutoModelForCausalLM

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


def is_mapped(model: torch.nn.Module) -> bool:
    """Say whether most of a model's bytes lie in mapped files."""
    files = [
        it.split()[0]
        for it in Path("/proc/self/maps").read_text().splitlines()
        if it.endswith(".safetensors")
    ]
    spans = [tuple(int(end, 16) for end in it.split("-")) for it in files]
    parameters = list(model.parameters())
    inside = [p for p in parameters if any(low <= p.data_ptr() < high for low, high in spans)]
    return sum(p.numel() for p in inside) > 0.9 * sum(p.numel() for p in parameters)
