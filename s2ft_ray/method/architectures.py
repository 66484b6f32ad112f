"""Which model families can be converted, and where each keeps its projections.

A family is one entry of the table at the end, keyed by its configuration's model_type. What an
entry says is checked against each model by `Decoder`, so that a wrong one is an error, and no
model is converted by a guess.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from s2ft_ray.config import Projection
from s2ft_ray.errors import ConfigError

Structure = Literal["heads", "channels", "expert_channels", "shared_channels"]
"""What a layer's projections are coupled through: attention heads, the channels of a dense
feed-forward block, of each routed expert, or of the expert that every token passes."""


def _everywhere(_hf_config: Any, _layer: int) -> bool:
    return True


@dataclass(frozen=True)
class FeedForward:
    """One block of coupled channels. Paths are relative to the layer, like attention's."""

    projections: Mapping[Projection, str]
    structure: Structure = "channels"
    size: str = "intermediate_size"
    """The configuration's name for the number of channels; None there means 4 x hidden_size."""
    num_experts: str | None = None
    """The configuration's name for the number of experts; their projections are 3-D parameters."""
    exists: Callable[[Any, int], bool] = _everywhere
    """Whether a layer of a configuration has the block."""
    files: Mapping[Projection, str] = field(default_factory=dict)
    """Where checkpoints keep each expert's own matrix; ``{}`` stands for its number."""


@dataclass(frozen=True)
class Files:
    """How the names in a family's checkpoints differ from the loaded model's."""

    prefix: str = ""
    """What some checkpoints leave out of every name but lm_head's."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names, and what they are in the model."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of names that are no parameters: buffers that older versions saved."""

    def model_name(self, name: str) -> str:
        """Return a tensor's name with the renamed parts replaced."""
        for old, new in self.renamed.items():
            name = name.replace(old, new)
        return name


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its projections.

    Projections that name one module are fused in it: first all rows of the one that comes first
    in the mapping, then the next one's; or, `interleaved`, the rows of each head in that order.
    """

    layers: str
    """The path of the list of decoder layers in the model."""
    attention: Mapping[Projection, str]
    feed_forward: tuple[FeedForward, ...]
    interleaved: bool = False
    norms: Mapping[Projection, str] = field(default_factory=dict)
    """Norms as wide as the projection that they follow. One of head_dim is none of these."""
    masks_by_position: bool = True
    """Whether its attention mask follows position_ids: what keeps packed rows apart."""
    learns_positions: bool = False
    """Whether each position has a trained embedding: past the last one nothing can be computed."""
    files: Files = Files()


def _is_sparse(hf_config: Any, layer: int) -> bool:
    """Tell which layers of Qwen's mixtures have experts."""
    step: int = hf_config.decoder_sparse_step
    return (
        layer not in (hf_config.mlp_only_layers or ())
        and hf_config.num_experts > 0
        and (layer + 1) % step == 0
    )


def _is_dense(hf_config: Any, layer: int) -> bool:
    return not _is_sparse(hf_config, layer)


_ATTENTION: dict[Projection, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_GATED: dict[Projection, str] = {
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
_EXPERTS: dict[Projection, str] = {
    "gate": "mlp.experts.gate_up_proj",
    "up": "mlp.experts.gate_up_proj",
    "down": "mlp.experts.down_proj",
}
_SHARED: dict[Projection, str] = {
    "up": "mlp.shared_expert.up_proj",
    "gate": "mlp.shared_expert.gate_proj",
    "down": "mlp.shared_expert.down_proj",
}
_QWEN_DENSE = FeedForward(_GATED, exists=_is_dense)
_QWEN_EXPERTS = FeedForward(
    _EXPERTS,
    "expert_channels",
    "moe_intermediate_size",
    "num_experts",
    exists=_is_sparse,
    files={
        "gate": "mlp.experts.{}.gate_proj",
        "up": "mlp.experts.{}.up_proj",
        "down": "mlp.experts.{}.down_proj",
    },
)
_QWEN_SHARED = FeedForward(
    _SHARED, "shared_channels", "shared_expert_intermediate_size", exists=_is_sparse
)
_LLAMA = Architecture("model.layers", _ATTENTION, (FeedForward(_GATED),))

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": Architecture(
        "model.layers",
        _ATTENTION,
        (FeedForward(_GATED),),
        norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"},
    ),
    "phi3": Architecture(
        "model.layers",
        {
            "q": "self_attn.qkv_proj",
            "k": "self_attn.qkv_proj",
            "v": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
        },
        (
            FeedForward(
                {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
            ),
        ),
    ),
    "gpt2": Architecture(
        "transformer.h",
        {"q": "attn.c_attn", "k": "attn.c_attn", "v": "attn.c_attn", "o": "attn.c_proj"},
        (FeedForward({"up": "mlp.c_fc", "down": "mlp.c_proj"}, size="n_inner"),),
        learns_positions=True,
        files=Files(prefix="transformer.", ignored=(".attn.bias", ".attn.masked_bias")),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        {
            "q": "attention.query_key_value",
            "k": "attention.query_key_value",
            "v": "attention.query_key_value",
            "o": "attention.dense",
        },
        (FeedForward({"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}),),
        interleaved=True,
        files=Files(
            renamed={"embed_out.": "lm_head."},
            ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
        ),
    ),
    "opt": Architecture(
        "model.decoder.layers",
        {**_ATTENTION, "o": "self_attn.out_proj"},
        (FeedForward({"up": "fc1", "down": "fc2"}, size="ffn_dim"),),
        masks_by_position=False,
        learns_positions=True,
        files=Files(prefix="model."),
    ),
    "mixtral": Architecture(
        "model.layers",
        _ATTENTION,
        (
            FeedForward(
                _EXPERTS,
                "expert_channels",
                num_experts="num_local_experts",
                files={
                    "gate": "mlp.experts.{}.w1",
                    "up": "mlp.experts.{}.w3",
                    "down": "mlp.experts.{}.w2",
                },
            ),
        ),
        files=Files(renamed={".block_sparse_moe.": ".mlp."}),
    ),
    "qwen2_moe": Architecture(
        "model.layers", _ATTENTION, (_QWEN_DENSE, _QWEN_EXPERTS, _QWEN_SHARED)
    ),
    "qwen3_moe": Architecture("model.layers", _ATTENTION, (_QWEN_DENSE, _QWEN_EXPERTS)),
}
"""Keyed by the Hugging Face configuration's model_type."""


def supported_architectures() -> list[str]:
    """Return the Hugging Face model types that `convert` takes."""
    return sorted(ARCHITECTURES)


def check_supported(hf_config: Any) -> None:
    """Raise ConfigError, naming the supported model types, unless `hf_config`'s is one of them."""
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model: architecture {model_type!r} is not supported; supported are "
            + ", ".join(supported_architectures())
        )


def check_packing(hf_config: Any) -> None:
    """Raise ConfigError where the rows of a packed sequence would attend to each other."""
    check_supported(hf_config)
    if not ARCHITECTURES[hf_config.model_type].masks_by_position:
        raise ConfigError(
            f"data.packing: a {hf_config.model_type} model builds its attention mask without"
            " position_ids, so packed rows would see each other; set data.packing to false"
        )


def num_positions(hf_config: Any) -> int | None:
    """Return how many positions a base has embeddings for; None where it computes them."""
    architecture = ARCHITECTURES.get(hf_config.model_type)
    if architecture is None or not architecture.learns_positions:
        return None
    return int(hf_config.max_position_embeddings)
