"""What a run minimizes: the targets' cross-entropy, or preferences between two answers (DPO).

An objective sums a loss over a micro-batch; the loop divides by ``Step.normalizer``, so that
accumulation and world size change nothing but rounding.

DPO needs the model as it was when the run began. There is no second copy of it: only the slices
have changed, so they are exchanged for their first values, a forward pass is made, and the
trained ones come back bit for bit.

Dimensions: B rows of a micro-batch, T tokens, P positions that predict a target, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from s2ft_ray.data import IGNORE_INDEX, MicroBatch
from s2ft_ray.method import slice_layers, write_back
from s2ft_ray.training.parallel import reshard


class Objective(Protocol):
    """A loss over micro-batches."""

    def refer(
        self, model: nn.Module, batches: Sequence[MicroBatch | None]
    ) -> Sequence[Tensor | None]:
        """Return what the loss of each batch has to know of the model at the run's start.

        All workers call this together, with as many batches.
        """

    def loss(
        self, model: nn.Module, batch: MicroBatch, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss, and how many targets (pairs) the model gets right."""


@dataclass(frozen=True)
class CrossEntropy:
    """Predict the target tokens."""

    label_smoothing: float = 0.0

    def refer(
        self, model: nn.Module, batches: Sequence[MicroBatch | None]
    ) -> Sequence[Tensor | None]:
        del model
        return [None] * len(batches)

    def loss(
        self, model: nn.Module, batch: MicroBatch, reference: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy, each row's times its weight, and the right tokens.

        Logits are computed only where some row predicts a target: with completions of a third of
        the tokens, the output projection is a third of the work and of the memory.
        """
        del reference
        logits, targets, kept = _predict(model, batch)
        if batch.weights is None:
            loss = F.cross_entropy(
                logits.flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
        else:
            each = F.cross_entropy(
                logits.flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            loss = (each * batch.weights[:, 1:][:, kept].flatten()).sum()
        return loss, (logits.detach().argmax(dim=-1) == targets).sum()


class Preference:
    """Prefer the first answer of each pair to the second more than the run's start did.

    Source: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7.
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        """Remember the slices as they are now: this worker's shard of them.

        The base's dropout is switched off: it would tell the two passes apart where nothing else
        does, as if the run had trained.
        """
        self._beta = beta
        _switch_off_dropout(model)
        self._first = [_local(layer.slice).clone() for _, layer in slice_layers(model)]

    def refer(
        self, model: nn.Module, batches: Sequence[MicroBatch | None]
    ) -> Sequence[Tensor | None]:
        device = next(model.parameters()).device
        references: list[Tensor | None] = []
        with torch.no_grad(), self._first_slices(model):
            for batch in batches:
                if batch is None:
                    idle_loss(model, device)
                    references.append(None)
                else:
                    references.append(_log_probabilities(model, batch.to(device)))
        return references

    def loss(
        self, model: nn.Module, batch: MicroBatch, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss, and in how many pairs the first answer gained on the other."""
        assert reference is not None
        gains = _log_probabilities(model, batch) - reference  # [B]
        chosen, rejected = gains.view(-1, 2).unbind(dim=1)
        margins = self._beta * (chosen - rejected)
        return -F.logsigmoid(margins).sum(), (margins.detach() > 0).sum()

    @contextmanager
    def _first_slices(self, model: nn.Module) -> Iterator[None]:
        layers = [layer for _, layer in slice_layers(model)]
        trained = [_local(layer.slice).clone() for layer in layers]
        self._put(model, self._first)
        try:
            yield
        finally:
            self._put(model, trained)

    @staticmethod
    def _put(model: nn.Module, values: list[Tensor]) -> None:
        """Give every layer these slices; a collective where they are sharded."""
        reshard(model)  # what is gathered would go on with the old values
        layers = [layer for _, layer in slice_layers(model)]
        for layer, value in zip(layers, values, strict=True):
            _local(layer.slice).copy_(value)
        write_back(layers)


class EmbeddingNoise:
    """Uniform noise on the input embeddings while training (NEFTune).

    The noise is a function of the run's seed and the micro-batch's place in its data, so that a
    resumed or resized run has the same. Source: Jain et al., arXiv 2310.05914.
    """

    def __init__(self, model: nn.Module, alpha: float, seed: int) -> None:
        self._alpha, self._seed, self._place = alpha, seed, 0
        model.get_input_embeddings().register_forward_hook(self._add)  # type: ignore[operator]

    def begin(self, batch: MicroBatch) -> None:
        """Take the noise of `batch` in the next forward pass."""
        self._place = batch.place

    def _add(self, module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        generator = torch.Generator(output.device)
        generator.manual_seed((self._seed * 1_000_003 + self._place) % 2**63)
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        _, tokens, width = output.shape
        scale: float = self._alpha / (tokens * width) ** 0.5
        return output + (noise * scale).to(output.dtype)


def target_loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy over the batch's targets and how many it got right."""
    return CrossEntropy().loss(model, batch)


def idle_loss(model: nn.Module, device: torch.device) -> Tensor:
    """Return a loss without gradient, for a worker that only keeps step with the others."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    logits: Tensor = model(input_ids=token, use_cache=False).logits
    nothing: Tensor = logits.float().sum() * 0.0
    return nothing


def _predict(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [B, P, V] and targets [B, P] at the P positions [P] of some row's target."""
    targets = batch.labels[:, 1:]  # [B, T - 1]: position t predicts token t + 1
    kept = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
    logits: Tensor = model(**batch.model_inputs(), logits_to_keep=kept).logits.float()
    return logits, targets[:, kept], kept


def _log_probabilities(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the log-probability of each row's targets: [B]."""
    logits, targets, _ = _predict(model, batch)
    losses: Tensor = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view(targets.shape).sum(dim=1)


def _switch_off_dropout(model: nn.Module) -> None:
    """Take the modules', and the rates that models keep as numbers for their functions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    local: Tensor = detached.to_local() if isinstance(detached, DTensor) else detached
    return local
