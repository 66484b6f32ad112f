"""The training step: batch, forward, backward, clip, step. No Ray in here.

The loss is a sum over target tokens (or pairs of preferences) divided by their count over all
workers and micro-batches, so that accumulation and world size change nothing but rounding.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from s2ft_ray.config import OptimConfig
from s2ft_ray.data import Step
from s2ft_ray.errors import Diverged
from s2ft_ray.training.objective import CrossEntropy, EmbeddingNoise, Objective, idle_loss
from s2ft_ray.training.optimizer import learning_rate
from s2ft_ray.training.parallel import Workers, set_gradient_sync
from s2ft_ray.training.speed import PhaseClock


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all workers."""

    step: int
    """Counted from 1: the number of steps done."""
    loss: float
    """Mean over target tokens (pairs of preferences), before the step."""
    grad_norm: float
    """Before clipping."""
    lr: float
    num_tokens: int
    """Without padding."""
    num_targets: int
    num_correct: int
    """Targets, or pairs of preferences, that the model got right before the step."""
    seconds: float
    is_stop_requested: bool
    """Whether some worker was asked to stop: the same answer on every worker."""
    phases: dict[str, float]
    """Seconds of this worker, by phase (see ``speed``)."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    *,
    number: int,
    num_steps: int,
    config: OptimConfig,
    workers: Workers,
    is_stop_requested: Callable[[], bool] = lambda: False,
    objective: Objective = CrossEntropy(),  # noqa: B008 - frozen
    noise: EmbeddingNoise | None = None,
) -> StepResult:
    """Do optimizer step `number` (from 0) of `num_steps` on this worker's part of the batch.

    `is_stop_requested` is asked once; the workers agree on it in the collective that adds up
    their losses. A worker whose micro-batches have run out (None) goes through one token.

    Raises Diverged on every worker when the loss or the gradient is not finite anywhere; the
    slices are then as before the step.
    """
    started, clock = time.perf_counter(), PhaseClock(workers.device)
    lr = learning_rate(config, number, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    local_loss = torch.zeros((), dtype=torch.float64, device=workers.device)
    last = len(step.micro_batches) - 1
    correct = 0
    references = objective.refer(model, step.micro_batches)
    for index, batch in enumerate(step.micro_batches):
        set_gradient_sync(model, index == last)
        if batch is None:
            torch.autograd.backward(idle_loss(model, workers.device))
            clock.lap("backward")
            continue
        if noise:
            noise.begin(batch)
        loss_sum, right = objective.loss(model, batch.to(workers.device), references[index])
        clock.lap("forward")
        torch.autograd.backward(loss_sum / step.normalizer)
        clock.lap("backward")
        correct += int(right)
        local_loss += loss_sum.detach()
    set_gradient_sync(model, True)
    grad_norm = _clip(model, config.max_grad_norm)
    clock.lap("clip")
    tokens = sum(batch.num_tokens for batch in step.micro_batches if batch)
    loss_sum_all, tokens_all, correct_all, stops = workers.sum(
        [float(local_loss), float(tokens), float(correct), float(is_stop_requested())]
    )
    clock.lap("agree")
    if not (math.isfinite(loss_sum_all) and math.isfinite(grad_norm)):
        raise _divergence(step, number, float(local_loss), grad_norm)
    # Hooks of one optimizer run before those of all, in which the layers write their slices back.
    mark = optimizer.register_step_post_hook(lambda *_: clock.lap("optimizer"))
    optimizer.step()
    mark.remove()
    clock.lap("write_back")
    phases = clock.seconds()  # waits for what a GPU still does of the step
    return StepResult(
        step=number + 1,
        loss=loss_sum_all / step.normalizer,
        num_correct=int(correct_all),
        grad_norm=grad_norm,
        lr=lr,
        num_tokens=int(tokens_all),
        num_targets=step.num_targets,
        seconds=time.perf_counter() - started,
        is_stop_requested=stops > 0,
        phases=phases,
    )


def _clip(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to `max_norm`; return the norm before, the same on every worker."""
    slices = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(slices, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _divergence(step: Step, number: int, local_loss: float, grad_norm: float) -> Diverged:
    """Name the rows of the step: those of the workers whose loss is not finite, else all."""
    rows = [(file, line) for file, line in zip(step.files, step.lines, strict=True)]
    mine = (math.isfinite(local_loss), rows)
    parts: list[tuple[bool, list[tuple[int, int]]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    suspects = [part for part in parts if not part[0]] or parts
    lines = sorted({row for _, part in suspects for row in part})
    one_file = all(file == 0 for file, _ in lines)
    names = [str(line) if one_file else f"{line} of file {file + 1}" for file, line in lines]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
    return Diverged(
        f"step {number + 1}: the loss or its gradient is not finite (gradient norm {grad_norm});"
        f" rows of that batch: lines {shown}; lower optim.lr, or look at those rows"
    )
