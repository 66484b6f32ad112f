"""An adapter as a LoRA directory, exactly: what PEFT, vLLM and SGLang load.

delta W = B A with one-hot rows or columns at the original indices, and alpha = r, so the product
is the delta itself, entry for entry (arXiv 2412.06289, section 3.3).
Invariant: consumers that ignore ``rank_pattern`` and ``alpha_pattern`` still scale by 1.

Fused experts are PEFT's ``target_parameters``, which PEFT alone takes: the factors of a parameter's
experts stacked, A by expert and B by rank. Where two parameters of the same experts have slices,
PEFT wraps them one in the other, the first that the module has innermost.

Dimensions: D out, F in, K selected, R rank, E experts.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft_ray.errors import AdapterError
from s2ft_ray.method.adapter_files import CONFIG_NAME, TENSORS_NAME, replace_files
from s2ft_ray.method.parts import AdapterSlice

if TYPE_CHECKING:
    from s2ft_ray.method.adapter import Adapter

MAX_RANK = 512
"""The largest rank that vLLM and SGLang take."""
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""In the order in which transformers registers them."""
_ONCE_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
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
        key = f"base_model.model.{_wrapped_name(name, adapter)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = lora_a, lora_b
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
        if part.count > MAX_RANK:
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
    """Return lora_A [R, F] and lora_B [D, R] whose product is the delta at its indices.

    Of experts [E R, F] and [D, R E].
    """
    one_hot = torch.zeros(*part.indices.shape, _size(part))  # [.., K, F or D]
    one_hot.scatter_(-1, part.indices.long()[..., None], 1.0)
    first, second = (
        (one_hot, part.delta) if part.side == "in" else (part.delta, one_hot.transpose(-2, -1))
    )
    more = rank - part.count
    lora_a, lora_b = F.pad(first, (0, 0, 0, more)), F.pad(second, (0, more))
    if lora_a.dim() == 3:
        lora_a, lora_b = lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1)
    return lora_a.contiguous(), lora_b.contiguous()


def _size(part: AdapterSlice) -> int:
    assert part.size is not None
    return part.size


def _wrapped_name(name: str, adapter: "Adapter") -> str:
    """Return what PEFT calls the module that holds a slice's factors."""
    if not _is_of_experts(adapter.slices[name]):
        return name
    experts, _, parameter = name.rpartition(".")
    outer = _EXPERT_PARAMETERS[_EXPERT_PARAMETERS.index(parameter) + 1 :]
    return experts + ".base_layer" * sum(f"{experts}.{it}" in adapter.slices for it in outer)


def _is_of_experts(part: AdapterSlice) -> bool:
    """Say whether a slice is of fused experts, each with indices of its own."""
    return part.indices.dim() > 1


def _describe(adapter: "Adapter", ranks: dict[str, int], largest: int) -> dict[str, Any]:
    parameters = _parameters(adapter)
    other = {parameters.get(it, it): rank for it, rank in ranks.items() if rank != largest}
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
        "target_modules": sorted(ranks.keys() - parameters.keys()),
        "target_parameters": sorted(parameters.values()) or None,
        "rank_pattern": other,
        "alpha_pattern": other,
    }


def _parameters(adapter: "Adapter") -> dict[str, str]:
    """Return the slices that PEFT is to take as parameters, with their parameters' names.

    Beside experts the plain feed-forward is among them: PEFT takes modules of those names for the
    experts' own of transformers 4.
    """
    names = {name: name for name, part in adapter.slices.items() if _is_of_experts(part)}
    if names:
        plain = adapter.slices.keys() - names.keys()
        names |= {it: f"{it}.weight" for it in plain if it.rpartition(".")[2] in _ONCE_OF_EXPERTS}
    return names
