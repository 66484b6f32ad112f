"""Micro-batches: rows of tokens as the tensors of one forward pass.

B micro-batch rows (packed sequences under packing), T tokens of the longest of them.

Invariant: ``labels[b, t]`` is the token at t itself where it is a target, else IGNORE_INDEX; a
loop compares ``labels[:, 1:]`` with ``logits[:, :-1]``. The first token of every sample is never
a target: nothing comes before it, or, packed, another sample does.

``attention_mask`` is None. Padding is on the right, where causal attention can't see it, and
the attention kernels are faster without a mask. Packed samples are kept apart by ``position_ids``
that restart at 0: transformers builds the block-diagonal mask from them, but only when there is
no attention mask and no cache, so a packed batch must go through ``model_inputs()``, or the
model be called with ``use_cache=False``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """One encoded row: its tokens, which of them are targets, and its line in the file."""

    input_ids: Sequence[int]
    target_mask: Sequence[bool]
    line: int
    weight: float = 1.0
    is_rejected: bool = False
    """The second answer of a pair."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass; all tensors int64 ``[B, T]``."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    num_targets: int
    """Targets of this micro-batch."""
    num_tokens: int
    """Tokens without padding."""
    weights: Tensor | None = None
    """float32 [B, T]: of each token's loss; None: 1."""
    place: int = 0
    """In the run's stream of micro-batches, whatever the world size."""
    attention_mask: None = None

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments with which a model computes this batch's logits."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "use_cache": False,
        }

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on `device`."""
        weights = self.weights
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            weights=weights if weights is None else weights.to(device),
        )


def build_micro_batch(
    sequences: Sequence[Sequence[Sample]], pad_id: int, place: int = 0
) -> MicroBatch:
    """Lay each sequence of samples end to end, padded on the right to the longest."""
    lengths = [sum(len(sample.input_ids) for sample in sequence) for sequence in sequences]
    shape = (len(sequences), max(lengths))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    position_ids = torch.arange(shape[1]).expand(shape).clone()
    is_weighted = any(sample.weight != 1.0 for sequence in sequences for sample in sequence)
    weights = torch.ones(shape) if is_weighted else None
    for row, sequence in enumerate(sequences):
        start = 0
        for sample in sequence:
            stop = start + len(sample.input_ids)
            ids = torch.tensor(sample.input_ids, dtype=torch.int64)
            is_target = torch.tensor(sample.target_mask, dtype=torch.bool)
            is_target[0] = False
            input_ids[row, start:stop] = ids
            labels[row, start:stop] = ids.where(is_target, IGNORE_INDEX)
            if weights is not None:
                weights[row, start:stop] = sample.weight
            position_ids[row, start:] = torch.arange(shape[1] - start)
            start = stop
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        num_targets=int((labels != IGNORE_INDEX).sum()),
        num_tokens=sum(lengths),
        weights=weights,
        place=place,
    )
