"""What heads and channels do on calibration data: the norms of activations and of gradients.

A batch is what a Hugging Face model takes: ``input_ids``, and where there are any
``attention_mask``, ``labels``, ``position_ids``. Statistics are streamed: of a batch only one
number for each unit is kept, in fp64, and a weight's gradient lives no longer than it takes to
reduce it, so that no two of them exist at once.

Invariant: batches are added up in their order, whichever process measured them. The same batches
give the same bits on any number of processes; the model is afterwards as it was before.

Dimensions: B rows, T tokens, N of them counted, D out, F in, E experts, U units.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft_ray.errors import ConfigError
from s2ft_ray.method.decoder import Decoder
from s2ft_ray.method.experts import run_experts
from s2ft_ray.method.geometry import CouplingKey

Batch = Mapping[str, Any]
Norms = dict[CouplingKey, Tensor]
"""By (layer, structure): float64 [U] or [E, U] on the CPU."""
_See = Callable[[str, int | None, Tensor, Tensor, Tensor | None], None]
"""Called with each product: (weight's name, expert, x [.., F], y [.., D], which rows count)."""


@dataclass(frozen=True)
class SharedCalibration:
    """Batches that the processes of a group measure together, each its share of them.

    Every process must be given the same batches, and must call `convert` with them.
    """

    batches: Iterable[Batch]
    group: dist.ProcessGroup | None = None
    """None: the default group."""


def activation_norms(
    model: nn.Module, decoder: Decoder, calibration: Iterable[Batch] | SharedCalibration
) -> Norms:
    """Return the root of the sum over tokens of each unit's squared activations.

    They are what its coupled matrices meet at: the input of o (a head's head_dim entries) or of
    down (a channel's one). Tokens that ``attention_mask`` leaves out don't count; an expert
    counts those routed to it.
    """
    return _measure(model, decoder, calibration, _add_activations)


def gradient_norms(
    model: nn.Module, decoder: Decoder, calibration: Iterable[Batch] | SharedCalibration
) -> Norms:
    """Return the root of the sum over batches of the squared gradient of each unit's weights.

    The loss is the model's own, its mean over a batch's ``labels``; a unit's weights are those of
    every projection that it couples. Under grouped-query attention a query head's include its
    group's k and v.
    """
    return _measure(model, decoder, calibration, _add_gradients)


class _Sums:
    """What one batch adds, by coupling; `flat` holds all of it."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder = decoder
        couplings = decoder.geometry.couplings
        shapes = {key: (it.num_experts or 1, it.num_units) for key, it in couplings.items()}
        sizes = [experts * units for experts, units in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = zip(shapes.items(), torch.split(self.flat, sizes), strict=True)
        self._views = {key: part.view(shape) for (key, shape), part in parts}

    def add(self, name: str, expert: int | None, squares: Tensor) -> None:
        """Add squares, one for each row or column of a weight [K], to the units they belong to."""
        for coupling, projection in self._decoder.members(name):
            units = coupling.parts[projection].sum_units(squares.to(torch.float64))
            if len(units) != coupling.num_units:  # key/value heads
                units = units.repeat_interleave(coupling.group_size)
            self._views[coupling.layer, coupling.structure][expert or 0] += units

    def to_norms(self) -> Norms:
        """Return the roots of the sums."""
        couplings = self._decoder.geometry.couplings
        return {
            key: view.sqrt().cpu() if couplings[key].num_experts else view[0].sqrt().cpu()
            for key, view in self._views.items()
        }


def _measure(
    model: nn.Module,
    decoder: Decoder,
    calibration: Iterable[Batch] | SharedCalibration,
    add: Callable[[nn.Module, Decoder, dict[str, Any], Tensor | None, _Sums], None],
) -> Norms:
    rank, size, group = 0, 1, None
    batches = calibration
    if isinstance(calibration, SharedCalibration):
        batches, group = calibration.batches, calibration.group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
    assert not isinstance(batches, SharedCalibration)
    device = next(model.parameters()).device
    total, number = _Sums(decoder, device), 0
    with _frozen(model):
        for round_ in _rounds(batches, size):
            for offset, batch in enumerate(round_):  # every process sees a fault, and none waits
                _check(batch, number + offset, needs_labels=add is _add_gradients)
            mine = _Sums(decoder, device)
            # Past the last batch a process repeats one: a sharded model's forward is a collective.
            inputs, mask = _inputs(round_[min(rank, len(round_) - 1)], device)
            add(model, decoder, inputs, mask, mine)
            for values in _gather(mine.flat, size, group)[: len(round_)]:
                total.flat += values
            number += len(round_)
    if not number:
        raise ConfigError("calibration: holds no batch; give at least one")
    if not bool(total.flat.isfinite().all()):
        raise ConfigError(
            f"calibration: the activations or gradients of its {number} batches are not finite;"
            " look at the data, or load the model in another dtype"
        )
    return total.to_norms()


def _rounds(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield as many batches as there are processes at a time; fewer at the end."""
    rest = iter(batches)
    while round_ := list(islice(rest, size)):
        yield round_


def _gather(values: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    if size == 1:
        return [values]
    # As objects: NCCL takes no tensor of a model that is still on the CPU.
    gathered: list[Tensor] = [values] * size
    dist.all_gather_object(gathered, values.cpu(), group)
    return [it.to(values.device) for it in gathered]


def _check(batch: Batch, number: int, *, needs_labels: bool) -> None:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise ConfigError(
            f"calibration: batch {number} is no mapping with input_ids; give what the model takes"
        )
    labels = batch.get("labels")
    if needs_labels and not (isinstance(labels, Tensor) and bool((labels[:, 1:] >= 0).any())):
        raise ConfigError(
            f"calibration: batch {number} has no labels, or all of them masked; a selection by"
            " gradient needs some in every batch"
        )


def _inputs(batch: Batch, device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
    """Return the model's arguments on its device, and which of the B * T tokens count."""
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != inputs["input_ids"].shape:
        mask = None  # a 4-D mask tells which tokens see which, not which are there
    return {**inputs, "use_cache": False}, None if mask is None else mask.flatten().bool()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without trainable parameters, and back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _add_activations(
    model: nn.Module, decoder: Decoder, inputs: dict[str, Any], mask: Tensor | None, sums: _Sums
) -> None:
    def see(name: str, expert: int | None, x: Tensor, _y: Tensor, counted: Tensor | None) -> None:
        if decoder.members(name)[0][1] in ("o", "down"):
            squares = _rows(x, counted).float().square()
            sums.add(name, expert, squares.sum(0, dtype=torch.float64))

    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad(), _watching(decoder, see, mask):
        model(**inputs)


def _add_gradients(
    model: nn.Module, decoder: Decoder, inputs: dict[str, Any], mask: Tensor | None, sums: _Sums
) -> None:
    def see(name: str, expert: int | None, x: Tensor, y: Tensor, counted: Tensor | None) -> None:
        hook = partial(reduce, name, expert, x.detach(), counted)
        y.register_hook(hook)  # type: ignore[no-untyped-call]

    def reduce(
        name: str, expert: int | None, x: Tensor, counted: Tensor | None, grad: Tensor
    ) -> None:
        of_weight = _weight_gradient(_rows(grad, counted), _rows(x, counted))
        coupling, projection = decoder.members(name)[0]
        across = 0 if coupling.parts[projection].side == "in" else 1
        sums.add(name, expert, of_weight.square().sum(across, dtype=torch.float64))

    embeddings: Any = model
    with torch.enable_grad(), _watching(decoder, see, mask):
        # No parameter is trainable: what the embeddings give is where backward ends.
        hook = embeddings.get_input_embeddings().register_forward_hook(
            lambda _module, _args, output: output.requires_grad_()
        )
        try:
            torch.autograd.backward(model(**inputs).loss)
        finally:
            hook.remove()


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a Linear's weight: fp32 [D, F]."""
    return grad.float().T @ x.float()


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """Return [B, T, F] or [B * T, F] as the N rows that count."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if counted is None else rows[counted]


@contextmanager
def _watching(decoder: Decoder, see: _See, counted: Tensor | None) -> Iterator[None]:
    """Show `see` every product of the decoder's weights while the model runs."""
    with ExitStack() as stack:
        for name, weight in decoder.weights.items():
            if weight.parameter.dim() == 2:
                hook = partial(_show, see, name, counted)
                stack.callback(weight.module.register_forward_hook(hook).remove)
        experts: dict[nn.Module, dict[str, str]] = {}
        for name, weight in decoder.weights.items():
            if weight.parameter.dim() == 3:
                experts.setdefault(weight.module, {})[weight.parameter_name] = name
        for module, names in experts.items():
            module.forward = partial(_run_experts, module, names, see, counted)
            stack.callback(delattr, module, "forward")
        yield


def _show(
    see: _See,
    name: str,
    counted: Tensor | None,
    _module: nn.Module,
    args: tuple[Tensor, ...],
    y: Tensor,
) -> None:
    see(name, None, args[0], y, counted)


def _run_experts(
    experts: Any,
    names: Mapping[str, str],
    see: _See,
    counted: Tensor | None,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Do what the experts do for the tokens that count; nobody looks at the others' output."""

    def linear(parameter: str, expert: int, x: Tensor) -> Tensor:
        y = F.linear(x, getattr(experts, parameter)[expert])
        see(names[parameter], expert, x, y, None)
        return y

    if counted is None:
        return run_experts(experts, hidden_states, top_k_index, top_k_weights, linear)
    output = torch.zeros_like(hidden_states)
    kept = run_experts(
        experts, hidden_states[counted], top_k_index[counted], top_k_weights[counted], linear
    )
    return output.masked_scatter(counted.unsqueeze(-1), kept)
