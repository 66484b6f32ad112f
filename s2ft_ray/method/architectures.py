"""Which model families can be converted, and where each keeps its seven projections.

Invariant: a `Decoder` that exists fits its model: every projection is a Linear whose weight has
the shape that the configuration's heads and channels say. A new family is one entry in the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from s2ft_ray.config import Projection
from s2ft_ray.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """Module paths: the list of decoder layers in the model, the projections in a layer."""

    layers: str
    projections: Mapping[Projection, str]


_LLAMA = Architecture(
    layers="model.layers",
    projections={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
    },
)

# Keyed by the Hugging Face configuration's model_type.
_ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


@dataclass(frozen=True)
class Geometry:
    """The sizes that selection needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    hidden_size: int

    @classmethod
    def of(cls, hf_config: Any) -> "Geometry":
        """Read the sizes from a Hugging Face configuration; ConfigError if it isn't supported."""
        check_supported(hf_config)
        num_heads = hf_config.num_attention_heads
        return cls(
            num_layers=hf_config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=hf_config.num_key_value_heads or num_heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
            intermediate_size=hf_config.intermediate_size,
            hidden_size=hf_config.hidden_size,
        )


def supported_architectures() -> list[str]:
    """Return the Hugging Face model types that `convert` takes."""
    return sorted(_ARCHITECTURES)


def check_supported(hf_config: Any) -> None:
    """Raise ConfigError, naming the supported model types, unless `hf_config`'s is one of them."""
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"model: architecture {model_type!r} is not supported; supported are "
            + ", ".join(supported_architectures())
        )


class Decoder:
    """A supported model seen as layers x projections."""

    def __init__(self, model: nn.Module) -> None:
        """Find the projections of `model`; ConfigError where it isn't what its config says."""
        hf_config: Any = getattr(model, "config", None)
        self.geometry = Geometry.of(hf_config)
        self._architecture = _ARCHITECTURES[hf_config.model_type]
        self._linears = {
            key: self._find_linear(model, *key)
            for layer in range(self.geometry.num_layers)
            for key in ((layer, projection) for projection in self._architecture.projections)
        }
        self._keys = {self.name(*key): key for key in self._linears}

    def name(self, layer: int, projection: Projection) -> str:
        """Return the module's name in the model."""
        return f"{self._architecture.layers}.{layer}.{self._architecture.projections[projection]}"

    def linear(self, layer: int, projection: Projection) -> nn.Linear:
        """Return the module itself."""
        return self._linears[layer, projection]

    def locate(self, name: str) -> tuple[int, Projection] | None:
        """Return the layer and projection of a module's name, None where it is neither."""
        return self._keys.get(name)

    def _find_linear(self, model: nn.Module, layer: int, projection: Projection) -> nn.Linear:
        name = self.name(layer, projection)
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ConfigError(
                f"model: {type(model).__name__} has no module {name};"
                " convert takes the causal LM of a supported architecture"
            ) from None
        if not isinstance(linear, nn.Linear):
            raise ConfigError(f"model: {name} is a {type(linear).__name__}, not a Linear")
        expected = self._num_units(projection)
        found = linear.in_features if projection in ("o", "down") else linear.out_features
        if found != expected:
            raise ConfigError(
                f"model: {name} has {found} heads' or channels' entries, its config says {expected}"
            )
        return linear

    def _num_units(self, projection: Projection) -> int:
        geometry = self.geometry
        if projection in ("up", "gate", "down"):
            return geometry.intermediate_size
        num_heads = geometry.num_heads if projection in ("q", "o") else geometry.num_kv_heads
        return num_heads * geometry.head_dim
