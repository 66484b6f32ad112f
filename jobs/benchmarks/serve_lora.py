"""LoRA of q k v up down on the engine's own seam, each of its two products on its fastest kernel.

Dimensions: G adapters of a batch, M tokens of each, F in, D out, R rank.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stopwatch import Call, Series
from s2ft_ray.method import Adapter
from s2ft_ray.serving.batched_layers import _sum_rows
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routing import Gather, Routing

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Kernel = Callable[[Tensor, Tensor], Tensor]
"""(weights [G, P, Q], x [G, M, Q]) -> x weightsᵀ [G, M, P]."""


def _bmm(weights: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x, weights.transpose(1, 2))


def _bmm_weights_first(weights: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)


def _grouped(weights: Tensor, x: Tensor) -> Tensor:
    groups, count, _ = x.shape
    ends = _ends(groups, count, x.device)
    product = nn.functional.grouped_mm(x.flatten(0, 1), weights.transpose(1, 2), offs=ends)
    return product.view(groups, count, -1)


def _loop(weights: Tensor, x: Tensor) -> Tensor:
    return torch.stack([own @ weight.T for weight, own in zip(weights, x, strict=True)])


def _bag(weights: Tensor, x: Tensor) -> Tensor:
    """For weights that lie as [G, Q, P]: a weighted sum of rows for each token."""
    groups, count, inner = x.shape
    rows = weights.transpose(1, 2).reshape(groups * inner, -1)
    places, _, bounds = _entries(groups, count, inner, x.device)
    sums = nn.functional.embedding_bag(
        places, rows, bounds[:-1], mode="sum", per_sample_weights=x.flatten()
    )
    return sums.view(groups, count, -1)


def _sparse(weights: Tensor, x: Tensor) -> Tensor:
    """As `_bag`, by the kernel that S2FT's single tokens take."""
    groups, count, inner = x.shape
    rows = weights.transpose(1, 2).reshape(groups * inner, -1)
    places, _, bounds = _entries(groups, count, inner, x.device)
    gather = Gather(bounds[:-1], places, places, bounds)
    return _sum_rows(rows, x.flatten(), gather).view(groups, count, -1)


def _dots(weights: Tensor, x: Tensor) -> Tensor:
    """A dot product for each token and row of its adapter's weights."""
    groups, count, inner = x.shape
    num_rows = weights.shape[1]
    places, tokens, _ = _entries(groups, count, num_rows, x.device)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.reshape(groups * count, inner),
        weights.reshape(groups * num_rows, inner),
        places,
        tokens,
        tokens,
        0,  # the mode: a sum
    )
    return products.view(groups, count, num_rows)


@cache
def _ends(groups: int, count: int, device: torch.device) -> Tensor:
    """Return where each group of `count` tokens ends: int32 [G]."""
    return torch.arange(1, groups + 1, dtype=torch.int32, device=device) * count


@cache
def _entries(
    groups: int, count: int, inner: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of G adapters' M tokens its `inner` rows and, as often, the token; bounds.

    They are the same for every call: whoever serves makes them once a batch, not once a layer.
    """
    rows = torch.arange(groups * inner, device=device).view(groups, 1, inner)
    tokens = torch.arange(groups * count, device=device).repeat_interleave(inner)
    bounds = torch.arange(0, tokens.shape[0] + 1, inner, device=device)
    return rows.expand(-1, count, -1).flatten(), tokens, bounds


class Products:
    """The product of a batch of adapters with their tokens, on the kernel that was fastest."""

    def __init__(self, kernels: Sequence[Kernel], replayed: bool = False) -> None:
        """`replayed`: on CUDA the device's time decides, not what Python's launches take."""
        self._kernels = kernels
        self._replayed = replayed
        self._fastest: dict[tuple[int, ...], Kernel] = {}

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return x weightsᵀ [G, M, P]; the first call of a shape tries every kernel."""
        shape = (*weights.shape, *x.shape)
        if shape not in self._fastest:
            self.choose([(weights, x)])
        return self._fastest[shape](weights, x)

    def choose(self, operands: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Try every kernel on (weights, x) of one shape, more of them than a cache holds."""
        weights, x = operands[0]
        if x.is_cuda:
            kernel = _fastest_on_cuda(self._kernels, operands, self._replayed)
        else:
            kernel = _fastest(self._kernels, weights, x)
        self._fastest[*weights.shape, *x.shape] = kernel


class LoraLayers:
    """Stands where the engine has its batched layers, and follows the same routing."""

    def __init__(self, model: nn.Module, keys: Sequence[AdapterKey], rank: int) -> None:
        """Hook the model, with a random LoRA of `rank` for each key."""
        self.routing: Routing | None = None
        self._number = {key: i for i, key in enumerate(keys)}
        self._down, self._up = Products(FIRST), Products(SECOND)
        self._handles = [
            module.register_forward_hook(self._hook(*_factors(module, len(keys), rank)))
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear)
        ]
        self._device = next(model.parameters()).device
        self._groups: tuple[Routing, tuple[Any, ...]] | None = None

    def prepare(self, key: AdapterKey, adapter: Adapter) -> None:
        """There is nothing to do: the hooks are on."""

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, a: Tensor, b: Tensor) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.routing is None:
                return
            x, y = args[0].flatten(0, -2), output.flatten(0, -2)
            spans, numbers, tokens = self._split(self.routing)
            for number, start, stop in spans:
                y[start:stop].addmm_(x[start:stop] @ a[number].T, b[number])
            if numbers:
                whole = len(numbers) == a.shape[0]
                own_a, own_b = (a, b) if whole else (a[numbers], b[numbers])
                inputs = x.index_select(0, tokens).view(len(numbers), -1, x.shape[1])
                products = self._up(own_b.transpose(1, 2), self._down(own_a, inputs))
                y.index_add_(0, tokens, products.flatten(0, 1))

        return add

    def _split(self, routing: Routing) -> tuple[Any, ...]:
        """Return the ranges of prompts, and the single tokens by adapter, as many of each."""
        if self._groups is None or self._groups[0] is not routing:
            spans, of_adapter = [], {}
            for slot, start, stop in routing._ranges:
                number = self._number[slot.key]
                if stop - start > 1:
                    spans.append((number, start, stop))
                else:
                    of_adapter.setdefault(number, []).append(start)
            if len({len(tokens) for tokens in of_adapter.values()}) > 1:  # not while all decode
                spans += [(n, t, t + 1) for n, tokens in of_adapter.items() for t in tokens]
                of_adapter = {}
            numbers = sorted(of_adapter)
            tokens = torch.tensor(
                [token for n in numbers for token in of_adapter[n]], device=self._device
            )
            self._groups = (routing, (spans, numbers, tokens))
        return self._groups[1]


FIRST: tuple[Kernel, ...] = (_dots, _bmm, _bmm_weights_first, _grouped, _loop)
SECOND: tuple[Kernel, ...] = (_bag, _sparse, _bmm, _bmm_weights_first, _grouped, _loop)


def _factors(module: nn.Linear, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [G, R, F] and B, both as rows: [G, R, D]."""
    options: dict[str, Any] = {"dtype": module.weight.dtype, "device": module.weight.device}
    a = torch.randn(count, rank, module.in_features, **options).mul_(0.02)
    return a, torch.randn(count, rank, module.out_features, **options).mul_(0.002)


def _fastest(kernels: Sequence[Kernel], weights: Tensor, x: Tensor) -> Kernel:
    """Return the fastest of some kernels; one that takes thrice another's time isn't repeated."""
    best, fastest = float("inf"), kernels[0]
    for kernel in kernels:
        for attempt in range(4):
            started = time.perf_counter()
            try:
                kernel(weights, x)
            except RuntimeError:  # grouped_mm wants ranks whose rows are multiples of 16 bytes
                break
            seconds = time.perf_counter() - started
            if seconds < best:
                best, fastest = seconds, kernel
            if attempt and seconds > 3 * best:
                break
    return fastest


def _fastest_on_cuda(
    kernels: Sequence[Kernel], operands: Sequence[tuple[Tensor, Tensor]], replayed: bool
) -> Kernel:
    """Return the kernel whose calls take least; one that takes far longer isn't captured."""
    device = operands[0][1].device
    length = max(20, len(operands)) if replayed else 20
    times: dict[Kernel, float] = {}
    for kernel in kernels:
        calls: list[Call] = [partial(kernel, *operands[i % len(operands)]) for i in range(length)]
        try:
            calls[0]()  # what is made at a first call isn't the kernel's time
            if _seconds(calls[:2], device) < 20 * min(times.values(), default=float("inf")):
                times[kernel] = _seconds(calls, device, captured=replayed)
        except RuntimeError:  # grouped_mm takes no fp32 there, and wants rows of whole 16 bytes
            continue
    return min(times, key=lambda kernel: times[kernel])


def _seconds(calls: Sequence[Call], device: torch.device, captured: bool = False) -> float:
    series = Series(calls, device, time.perf_counter, captured)
    return min(series.seconds() for _ in range(5))
