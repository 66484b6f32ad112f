"""The training step: batch, forward, backward, clip, step. No Ray in here.

The loss is the sum over target tokens divided by their count over all workers and
micro-batches, so that accumulation and world size change nothing but rounding.

Dimensions: B rows of a micro-batch, T tokens, P positions that predict a target, V vocabulary.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from s2ft_ray.config import OptimConfig
from s2ft_ray.data import IGNORE_INDEX, MicroBatch, Step
from s2ft_ray.errors import JobError
from s2ft_ray.training.optimizer import learning_rate
from s2ft_ray.training.parallel import Workers, set_gradient_sync


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all workers."""

    step: int
    """Counted from 1: the number of steps done."""
    loss: float
    """Mean over target tokens, before the step."""
    grad_norm: float
    """Before clipping."""
    lr: float
    num_tokens: int
    """Without padding."""
    num_targets: int
    seconds: float


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    *,
    number: int,
    num_steps: int,
    config: OptimConfig,
    workers: Workers,
) -> StepResult:
    """Do optimizer step `number` (from 0) of `num_steps` on this worker's part of the batch.

    Raises JobError on every worker when the loss or the gradient is not finite anywhere; the
    slices are then as before the step.
    """
    started = time.perf_counter()
    lr = learning_rate(config, number, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    local_loss = torch.zeros((), dtype=torch.float64, device=workers.device)
    last = len(step.micro_batches) - 1
    for index, batch in enumerate(step.micro_batches):
        set_gradient_sync(model, index == last)
        loss_sum, _ = target_loss(model, batch.to(workers.device))
        torch.autograd.backward(loss_sum / step.num_targets)
        local_loss += loss_sum.detach()
    set_gradient_sync(model, True)
    grad_norm = _clip(model, config.max_grad_norm)
    tokens = sum(batch.num_tokens for batch in step.micro_batches)
    loss_sum_all, tokens_all = workers.sum([float(local_loss), float(tokens)])
    if not (math.isfinite(loss_sum_all) and math.isfinite(grad_norm)):
        raise _divergence(step, number, float(local_loss), grad_norm)
    optimizer.step()  # the converted layers write their slices back in its post-step hook
    return StepResult(
        step=number + 1,
        loss=loss_sum_all / step.num_targets,
        grad_norm=grad_norm,
        lr=lr,
        num_tokens=int(tokens_all),
        num_targets=step.num_targets,
        seconds=time.perf_counter() - started,
    )


def target_loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy over the batch's targets and how many it got right.

    Logits are computed only where some row predicts a target: with completions of a third of
    the tokens, the output projection is a third of the work and of the memory.
    """
    targets = batch.labels[:, 1:]  # [B, T - 1]: position t predicts token t + 1
    kept = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)  # [P]
    logits = model(**batch.model_inputs(), logits_to_keep=kept).logits.float()  # [B, P, V]
    targets = targets[:, kept]
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return loss, correct


def _clip(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to `max_norm`; return the norm before, the same on every worker."""
    slices = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(slices, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _divergence(step: Step, number: int, local_loss: float, grad_norm: float) -> JobError:
    """Name the rows of the step: those of the workers whose loss is not finite, else all."""
    mine = (math.isfinite(local_loss), sorted(step.lines))
    parts: list[tuple[bool, list[int]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    suspects = [part for part in parts if not part[0]] or parts
    lines = sorted({line for _, part in suspects for line in part})
    shown = ", ".join(map(str, lines[:20])) + (f" and {len(lines) - 20} more" if lines[20:] else "")
    return JobError(
        f"step {number + 1}: the loss or its gradient is not finite (gradient norm {grad_norm});"
        f" rows of that batch: lines {shown}; lower optim.lr, or look at those rows"
    )
