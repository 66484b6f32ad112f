"""An adapter as a LoRA directory, exactly: what PEFT, vLLM and SGLang load.

delta W = B A with one-hot rows or columns at the original indices, and alpha = r, so the product
is the delta itself, entry for entry (arXiv 2412.06289, section 3.3).
Invariant: consumers that ignore ``rank_pattern`` and ``alpha_pattern`` still scale by 1.

Dimensions: D out, F in, K selected, R rank.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.adapter_files import CONFIG_NAME, TENSORS_NAME, replace_files
from s2ft_ray.method.parts import AdapterSlice

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

MAX_RANK = 512
"""The largest rank that vLLM and SGLang take."""
_WAY_OUT = "export the merged model (export_merged, s2ft export --format merged)"


def write_peft(adapter: "Adapter", folder: Path, *, uniform_rank: bool) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's form of LoRA.

    Each module has a rank of its own, or with `uniform_rank` the largest of all, padded with
    zeros. Raises AdapterError, one fault a module, for what LoRA can't hold.
    """
    _check(adapter)
    ranks = {name: part.count for name, part in adapter.slices.items()}
    largest = max(ranks.values())
    if uniform_rank:
        ranks = dict.fromkeys(ranks, largest)
    tensors = {}
    for name, part in adapter.slices.items():
        lora_a, lora_b = _factorize(part, ranks[name])
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    text = json.dumps(_describe(adapter, ranks, largest), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_files(
        folder,
        {
            TENSORS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
            CONFIG_NAME: text.encode(),
        },
    )


def _check(adapter: "Adapter") -> None:
    faults = [] if adapter.slices else ["the adapter has no modules: nothing to export"]
    for name, part in adapter.slices.items():
        what = "columns" if part.side == "in" else "rows"
        if part.indices.dim() > 1:
            faults.append(f"{name}: LoRA servers take no adapters of fused experts; {_WAY_OUT}")
        elif part.count > MAX_RANK:
            faults.append(
                f"{name}: {part.count} selected {what} are a LoRA of rank {part.count}, and servers"
                f" take at most {MAX_RANK}; {_WAY_OUT}"
            )
        elif part.size is None:
            faults.append(
                f"{name}: the adapter doesn't say how wide the base's weight is; convert_like(base,"
                " adapter) and extract_adapter(base) give one that does"
            )
    if faults:
        raise AdapterError(*faults)


def _factorize(part: AdapterSlice, rank: int) -> tuple[Tensor, Tensor]:
    """Return lora_A [R, F] and lora_B [D, R] whose product is the delta at its indices."""
    count, size = part.count, part.size
    assert size is not None
    places, units = torch.arange(count), part.indices.long()
    if part.side == "in":
        lora_a, lora_b = torch.zeros(rank, size), torch.zeros(part.delta.shape[0], rank)
        lora_a[places, units] = 1
        lora_b[:, :count] = part.delta
    else:
        lora_a, lora_b = torch.zeros(rank, part.delta.shape[1]), torch.zeros(size, rank)
        lora_a[:count] = part.delta
        lora_b[units, places] = 1
    return lora_a, lora_b


def _describe(adapter: "Adapter", ranks: dict[str, int], largest: int) -> dict[str, Any]:
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(part.transposed for part in adapter.slices.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
    }
