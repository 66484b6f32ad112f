"""The ways of fine-tuning that the training benchmark compares, at equal trainable parameters.

Invariant: every contender starts from a model that was just built, and differs from the others in
what it trains and how; the optimizer, the data and the loss are the same.

The limit trains nothing: gradients flow through all frozen weights to the embeddings' output,
which is the least that any method below the first layer must pay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.two_matmuls import use_two_matmuls
from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import convert

WIDE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NARROW = ["o_proj", "down_proj"]
DROPOUT = 0.05


@dataclass(frozen=True)
class Contender:
    """One way of fine-tuning."""

    name: str
    attach: Callable[[PreTrainedModel, int], nn.Module]
    """Make a fresh model train about so many parameters."""


def contenders(dtype: torch.dtype) -> list[Contender]:
    """Return S2FT first, then what it is compared with.

    peft's own defaults (no dropout, adapters of a bf16 base in fp32, as S2FT's slices are) come
    beside the dropout that LoRA's and DoRA's published recipes for these targets use, and beside
    adapters in bf16. LoRA-FA freezes A, so its ranks are higher at equal trainable parameters.
    """
    everyone = [
        Contender("S2FT o down", lambda model, _: _s2ft(model)),
        Contender("limit: frozen weights", lambda model, _: _limit(model)),
        _lora("LoRA q k v up down", WIDE),
        _lora("LoRA q k v up down, dropout", WIDE, dropout=True),
        _lora("LoRA o down", NARROW),
        _lora("LoRA-FA q k v up down", WIDE, frozen_a=True),
        _lora("DoRA q k v up down", WIDE, dora=True),
        _lora("DoRA q k v up down, dropout", WIDE, dora=True, dropout=True),
        Contender("S2FT o down, permuted", lambda model, _: _s2ft(model, "permuted")),
        Contender("two matmuls o down", lambda model, _: use_two_matmuls(model)),
        Contender("full fine-tuning", lambda model, _: model.requires_grad_(True)),
    ]
    if dtype != torch.float32:
        everyone.insert(4, _lora("LoRA q k v up down, all bf16", WIDE, fp32_adapters=False))
    return everyone


def build_model(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, attn: str, checkpointing: bool
) -> PreTrainedModel:
    """Build a model of random weights, all frozen, in training mode."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).train()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(model: nn.Module, *, is_captured: bool) -> torch.optim.Optimizer | None:
    """Build the same fused AdamW for everybody; None where nothing is trained."""
    trainable = trainable_parameters(model)
    if not trainable:
        return None
    return torch.optim.AdamW(trainable, lr=1e-5, fused=True, capturable=is_captured)


def _s2ft(
    model: PreTrainedModel, layout: Literal["gathered", "permuted"] = "gathered"
) -> nn.Module:
    convert(model, S2FTConfig(layout=layout))
    return model


def _limit(model: PreTrainedModel) -> nn.Module:
    model.enable_input_require_grads()
    return model


def _lora(
    name: str,
    targets: list[str],
    *,
    dora: bool = False,
    dropout: bool = False,
    frozen_a: bool = False,
    fp32_adapters: bool = True,
) -> Contender:
    def attach(model: PreTrainedModel, size: int) -> nn.Module:
        rank = lora_rank(model, size, targets, dora=dora, frozen_a=frozen_a)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=DROPOUT if dropout else 0.0,
            target_modules=targets,
            use_dora=dora,
        )
        adapted = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
        if frozen_a:
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_A" in parameter_name:
                    parameter.requires_grad_(False)
        return adapted

    return Contender(name, attach)


def lora_rank(
    model: nn.Module, size: int, targets: list[str], *, dora: bool, frozen_a: bool = False
) -> int:
    """Return the rank whose number of trainable parameters is nearest to `size`."""
    linears = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
    ]
    outs = sum(linear.out_features for linear in linears)
    per_rank = outs if frozen_a else outs + sum(linear.in_features for linear in linears)
    return max(1, round((size - (outs if dora else 0)) / per_rank))
