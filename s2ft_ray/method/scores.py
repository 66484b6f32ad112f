"""One score for each query head and channel; the lowest are selected.

    random      drawn from (seed, layer, structure)
    weight      the norm of all weights that a unit couples
    activation  the norm of a unit's activations on calibration data
    product     weight times activation
    gradient    the norm of the loss's gradient by all weights that a unit couples

Invariant: scores depend on the seed, or on the plain weights and the calibration data, alone:
never on layout, sharding, world size, budgets or the global random state.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from s2ft_ray.config import Projection, S2FTConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.method.calibration import (
    Batch,
    SharedCalibration,
    activation_norms,
    gradient_norms,
)
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.method.geometry import Coupling, CouplingKey, Geometry

Scores = dict[CouplingKey, Tensor]
"""By (layer, structure): float64 [num_units], or [num_experts, num_units]."""
_PIECE_ENTRIES = 2**22  # 32 MiB in fp64
_LOOK_AT_DATA = ("activation", "product", "gradient")


def score_units(
    config: S2FTConfig,
    model: nn.Module,
    decoder: Decoder,
    calibration: Iterable[Batch] | SharedCalibration | None = None,
) -> Scores:
    """Score every head and channel as the configuration's selection and subset say.

    ConfigError where the selection looks at data and there is none, or the other way round.
    """
    check_calibration(config, calibration is not None)
    if config.selection == "random":
        return random_scores(config.seed, decoder.geometry)
    norms = _norms(config, model, decoder, calibration)
    sign = 1 if config.subset == "small" else -1
    return {key: sign * norm for key, norm in norms.items()}


def looks_at_data(config: S2FTConfig) -> bool:
    """Tell whether the selection needs calibration data."""
    return config.selection in _LOOK_AT_DATA


def check_calibration(config: S2FTConfig, is_given: bool) -> None:
    """Raise ConfigError unless calibration data is given exactly where the selection needs it."""
    needed = looks_at_data(config)
    if is_given and not needed:
        raise ConfigError(
            f"calibration: the selection {config.selection!r} looks at no data; leave it out"
        )
    if needed and not is_given:
        raise ConfigError(
            f"calibration: the selection {config.selection!r} looks at data; give batches of it, as"
            " the model takes them: convert(model, config, calibration=[{'input_ids': ...}, ...])"
        )


def _norms(
    config: S2FTConfig,
    model: nn.Module,
    decoder: Decoder,
    calibration: Iterable[Batch] | SharedCalibration | None,
) -> Scores:
    if calibration is None:
        return _weight_norms(decoder)
    if config.selection == "gradient":
        return gradient_norms(model, decoder, calibration)
    activations = activation_norms(model, decoder, calibration)
    if config.selection == "activation":
        return activations
    return {key: norm * activations[key] for key, norm in _weight_norms(decoder).items()}


def random_scores(seed: int, geometry: Geometry) -> Scores:
    """Draw scores that are the same on every machine."""
    scores: Scores = {}
    for (layer, structure), coupling in geometry.couplings.items():
        digest = hashlib.sha256(f"{seed}/{layer}/{structure}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        experts = () if coupling.num_experts is None else (coupling.num_experts,)
        shape = (*experts, coupling.num_units)
        scores[layer, structure] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return scores


def _weight_norms(decoder: Decoder) -> Scores:
    """Return the norm of all weights that a head (q k v o) or channel (up gate down) couples.

    Under grouped-query attention a query head's norm includes its group's k and v.
    """
    scores: Scores = {}
    for key, coupling in decoder.geometry.couplings.items():
        squares = torch.zeros(())
        for projection in coupling.parts:
            found = _squares(decoder, coupling, projection)
            if found.shape[-1] != coupling.num_units:  # key/value heads
                found = found.repeat_interleave(coupling.group_size)
            squares = squares + found
        scores[key] = squares.sqrt()
    return scores


def _squares(decoder: Decoder, coupling: Coupling, projection: Projection) -> Tensor:
    """Return the squared norm of what each unit has in the projection: [U] or [E, U]."""
    part = coupling.parts[projection]
    weight = decoder.weights[part.module].view()
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    across = -2 if part.side == "in" else -1
    # In pieces of its rows: torch makes a copy in fp64 of what it reduces, 4 times a bf16 weight.
    num_rows = max(1, _PIECE_ENTRIES * weight.shape[-2] // weight.numel())
    squares = [
        torch.linalg.vector_norm(piece, dim=across, dtype=torch.float64).square()
        for piece in torch.split(weight, num_rows, dim=-2)
    ]
    found = torch.cat(squares, dim=-1) if across == -1 else torch.stack(squares).sum(0)
    return part.sum_units(found.cpu())
