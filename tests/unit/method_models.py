"""Tiny random models of each supported family, and what the method's tests compare them by."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12, "tie_word_embeddings": True}),
}
_MOE = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,  # layer 0 is dense, layer 1 has experts
}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    **FAMILIES,
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 12}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 12, "query_pre_attn_scalar": 12}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 12, "sliding_window": 8}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layer_interval": 2}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_embd": 64, "n_inner": 88, "n_layer": 2, "n_head": 8}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 88, "word_embed_proj_dim": 48}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {**_MOE, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_MOE, "head_dim": 12}),
}
"""Every supported one; `FAMILIES` are those that a test of all things takes."""
WITHOUT_GATE = ("gpt2", "gpt_neox", "opt")
ALL = ("q", "k", "v", "o", "up", "gate", "down")
VOCABULARY = 61


def build_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A causal LM of 2 layers, 8 query and 2 KV heads; its biases and norms aren't 0 or 1."""
    config_class, model_class, extra = ARCHITECTURES[family]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    values = {**sizes, **extra, **changes}  # some names are one family's own: n_layer, ffn_dim
    config = config_class(**{k: v for k, v in values.items() if hasattr(config_class, k)})
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(5)  # an initial deviation of 0.02 leaves hardly any gradient
    return model.eval()


def projections_of(family: str) -> tuple[str, ...]:
    return tuple(p for p in ALL if p != "gate" or family not in WITHOUT_GATE)


def tokens(seed: int = 1, shape: tuple[int, int] = (3, 10)) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Keys, order, shapes, dtypes and bits."""
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def make_batch(seed: int, lengths: tuple[int, ...] = (9, 5, 7), pad_id: int = 0) -> dict[str, Any]:
    """Rows padded on the right, with labels for the second half of each."""
    shape = (len(lengths), max(lengths))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    is_target = mask & (torch.arange(shape[1]) >= torch.tensor(lengths).unsqueeze(1) // 2)
    return {
        "input_ids": ids.where(mask, pad_id),
        "attention_mask": mask.long(),
        "labels": ids.where(is_target, -100),
    }


BATCHES = [make_batch(0), make_batch(1, (4, 11)), make_batch(2, (6,))]
