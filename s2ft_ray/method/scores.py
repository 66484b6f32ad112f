"""One score for each query head and channel; the lowest are selected.

Invariant: random scores depend on (seed, layer, structure) alone, and the others on the plain
weights alone: never on layout, sharding, world size, budgets or the global random state.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

from s2ft_ray.config import Projection, S2FTConfig
from s2ft_ray.method.architectures import Decoder, Geometry
from s2ft_ray.method.parts import SIDES

Structure = Literal["heads", "channels"]
Scores = dict[tuple[int, Structure], Tensor]
"""By (layer, structure): float64 [num_heads] or [intermediate_size]."""


def score_units(config: S2FTConfig, decoder: Decoder) -> Scores:
    """Score every head and channel as the configuration's selection and subset say."""
    if config.selection == "random":
        return random_scores(config.seed, decoder.geometry)
    norms = _weight_norms(decoder)
    sign = 1 if config.subset == "small" else -1
    return {key: sign * norm for key, norm in norms.items()}


def random_scores(seed: int, geometry: Geometry) -> Scores:
    """Draw scores that are the same on every machine."""
    counts: dict[Structure, int] = {
        "heads": geometry.num_heads,
        "channels": geometry.intermediate_size,
    }
    scores: Scores = {}
    for layer in range(geometry.num_layers):
        for structure, count in counts.items():
            digest = hashlib.sha256(f"{seed}/{layer}/{structure}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn = torch.rand(count, generator=generator, dtype=torch.float64)
            scores[layer, structure] = drawn
    return scores


def _weight_norms(decoder: Decoder) -> Scores:
    """Return the norm of all weights that a head (q k v o) or channel (up gate down) couples.

    Under grouped-query attention a query head's norm includes its group's k and v.
    """
    geometry = decoder.geometry
    group_size = geometry.num_heads // geometry.num_kv_heads
    scores: Scores = {}
    for layer in range(geometry.num_layers):
        squares = {p: _squares(decoder, layer, p) for p in SIDES}
        heads = (squares["q"] + squares["o"]).view(-1, geometry.head_dim).sum(1)
        kv_heads = (squares["k"] + squares["v"]).view(-1, geometry.head_dim).sum(1)
        channels = squares["up"] + squares["gate"] + squares["down"]
        scores[layer, "heads"] = (heads + kv_heads.repeat_interleave(group_size)).sqrt()
        scores[layer, "channels"] = channels.sqrt()
    return scores


def _squares(decoder: Decoder, layer: int, projection: Projection) -> Tensor:
    """Return the squared norm of each row or column that the projection's slices hold."""
    weight = decoder.linear(layer, projection).weight.detach()
    across = 0 if SIDES[projection] == "in" else 1
    norm: Tensor = torch.linalg.vector_norm(weight, dim=across, dtype=torch.float64)
    return norm.square().cpu()
