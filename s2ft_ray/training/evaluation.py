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
from s2ft_ray.training.objective import CrossEntropy, Objective, Preference, idle_loss
from s2ft_ray.training.parallel import Workers, reshard


@dataclass(frozen=True)
class EvalResult:
    """Means over the target tokens of the held-out rows; of preferences, over the pairs."""

    loss: float
    perplexity: float
    """0 for preferences."""
    token_accuracy: float
    """Of preferences: in which share of the pairs the first answer gained on the other."""
    num_targets: int


@dataclass
class Standing:
    """The best evaluation so far, and how many came since: part of a run's state."""

    loss: float = math.inf
    step: int = 0
    num_worse: int = 0
    """Evaluations since the best one."""

    def add(self, loss: float, step: int) -> bool:
        """Count an evaluation; return whether it is the best so far."""
        is_best = loss < self.loss
        if is_best:
            self.loss, self.step, self.num_worse = loss, step, 0
        else:
            self.num_worse += 1
        return is_best


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[MicroBatch | None],
    workers: Workers,
    objective: Objective = CrossEntropy(),  # noqa: B008 - frozen
) -> EvalResult:
    """Score this worker's `batches`; None is a pass that only keeps step with the others."""
    model.eval()
    loss_sum, correct, targets = 0.0, 0, 0
    of_pairs = isinstance(objective, Preference)
    for batch, reference in zip(batches, objective.refer(model, batches), strict=True):
        if batch is None:
            idle_loss(model, workers.device)
        else:
            loss, right = objective.loss(model, batch.to(workers.device), reference)
            loss_sum += float(loss)
            correct += int(right)
            targets += len(batch.labels) // 2 if of_pairs else batch.num_targets
    model.train()
    reshard(model)
    loss_all, correct_all, targets_all = workers.sum([loss_sum, float(correct), float(targets)])
    mean = loss_all / targets_all
    return EvalResult(
        loss=mean,
        # exp overflows a float64 above 709
        perplexity=0.0 if of_pairs else math.exp(min(mean, 700.0)),
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
    """Answer each prompt greedily; all workers do the same work and get the same answers.

    An answer ends with the model's context at the latest.
    """
    assert isinstance(model, GenerationMixin)
    context = model.config.max_position_embeddings
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=workers.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(max_new_tokens, context - ids.shape[1])),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    model.train()
    reshard(model)
    return answers
