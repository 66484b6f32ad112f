"""AdamW over the slices, and its learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from s2ft_ray.config import OptimConfig


def build_optimizer(slices: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable slices alone (fp32, fused)."""
    return torch.optim.AdamW(
        slices,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `num_steps`.

    It rises over ``warmup_steps`` steps to ``lr``, then stays, or falls to 0 at `num_steps`
    on a line or half a cosine.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        return config.lr * (1.0 - share)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))
