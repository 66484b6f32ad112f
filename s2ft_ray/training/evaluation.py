"""Evaluation on the held-out rows, by all workers together, and a few answers to look at.

Invariant: every worker makes the same number of forward passes, because a sharded layer's
forward is a collective: a worker that answers alone hangs all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedTokenizerBase

from s2ft_ray.data import EvalPrompt, MicroBatch
from s2ft_ray.training.loop import target_loss
from s2ft_ray.training.parallel import Workers, reshard


@dataclass(frozen=True)
class EvalResult:
    """Means over the target tokens of the held-out rows."""

    loss: float
    perplexity: float
    token_accuracy: float
    num_targets: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[MicroBatch | None], workers: Workers
) -> EvalResult:
    """Score this worker's `batches`; None is a pass that only keeps step with the others."""
    model.eval()
    loss_sum, correct, targets = 0.0, 0, 0
    for batch in batches:
        if batch is None:
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=workers.device))
        else:
            loss, right = target_loss(model, batch.to(workers.device))
            loss_sum += float(loss)
            correct += int(right)
            targets += batch.num_targets
    model.train()
    reshard(model)
    loss_all, correct_all, targets_all = workers.sum([loss_sum, float(correct), float(targets)])
    mean = loss_all / targets_all
    return EvalResult(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # exp overflows a float64 above 709
        token_accuracy=correct_all / targets_all,
        num_targets=int(targets_all),
    )


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvalPrompt],
    *,
    max_new_tokens: int,
    workers: Workers,
) -> list[str]:
    """Answer each prompt greedily; all workers do the same work and get the same answers."""
    assert isinstance(model, GenerationMixin)
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=workers.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    model.train()
    reshard(model)
    return answers
