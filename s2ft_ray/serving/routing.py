"""Which tokens of a batch belong to which adapter, as the indices that each layer needs.

A batch is requests one after the other, so a request's tokens are one range. Long ranges (prompts)
are multiplied with a slice of the pool. Single tokens (decoding) of all adapters go together: on
the input side through one weighted sum of pool rows, on the output side through one dot product
with each pool row, and where adapters that lie evenly in the pool have enough tokens, through one
batched product. On a GPU a kernel of our own finds the rows of single tokens by itself. While the
same requests decode, the last plans hold; for another batch one plan is made for all modules whose
rows lie alike in the adapters, and moved to each.

Dimensions: T tokens of the batch, D out, F in, S selected entries over the single tokens;
G adapters of one product, M tokens of each, K selected of each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2ft_ray.method.parts import Side
from s2ft_ray.serving.device_slots import DeviceSlots, Slot, SlotPart

_NEVER = 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes at which another kernel becomes faster, for one kind of device."""

    long: int
    """From so many tokens of one adapter on, a product with a slice of the pool beats rows."""
    fewest: dict[tuple[Side, int], int]
    """From so many single tokens of one adapter on, they make a batched product: by side and
    bytes of a value; 2 where nothing is said."""
    shortest_run: int
    """Single tokens of fewer adapters are no batched product: its calls cost what it saves."""
    fewest_in_all: int = 1
    """Nor are fewer tokens of all its adapters together."""
    has_kernel: bool = False
    """Whether single tokens are left to a kernel that takes ranges of pool rows."""


# One core, 2048 wide, 64 selected, bf16: 8 tokens take 49 us either way, 16 take 88 as sums and 61
# as a product; in fp32 the product leads from 8 on (69 and 47).
# Output side, 32 adapters of 2 tokens, bf16: 0.36 ms as a batched product, 0.84 as dots; fp32: 1.19
# and 0.74, and of 8 tokens each 0.39 and 0.69. Input side, 8 adapters of 8, bf16: 0.34 as a
# product, 0.50 as sums; of 2 tokens 1.01 and 0.34.
_CPU = Limits(8, {("out", 2): 2, ("out", 4): 4, ("in", 2): 8, ("in", 4): 8}, 8)
# On CPUs without AVX-512, 100 adapters of one token in fp32: as products 2.7 ms on both sides, as
# sums 3.4, as dots 3.5. In bf16 such a CPU has no product of its own: 10 adapters of 7 tokens take
# 30 ms as products on the input side and 0.9 as sums.
_CPU_AVX2 = Limits(8, {("out", 2): 2, ("out", 4): 1, ("in", 2): _NEVER, ("in", 4): 1}, 8)
# 64 rows each, 4096 wide, bf16, an H200, launched by Python: 64 adapters of a token take 57 us as
# products on the input side and 49 on the output side, 33 and 32 by the kernel; 1,000 take 153 and
# 135, by the kernel 228 and 151, because it reads a row in pieces. Of 8 adapters with 8 tokens
# each, 54 and 46 as products, 30 and 31 by the kernel.
_ALWAYS: dict[tuple[Side, int], int] = {("in", 2): 1, ("in", 4): 1, ("out", 2): 1, ("out", 4): 1}
_CUDA = Limits(64, _ALWAYS, shortest_run=1, fewest_in_all=256, has_kernel=True)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one adapter, and the pool rows of one module for it."""

    start: int
    stop: int
    part: SlotPart


@dataclass(frozen=True, slots=True)
class Gather:
    """The single tokens of an input-side module."""

    tokens: Tensor
    """int64 [N]: the tokens, ascending."""
    inputs: Tensor
    """int64 [S]: places in the flattened input [T * F]."""
    rows: Tensor
    """int64 [S]: rows of the pool."""
    bounds: Tensor
    """int64 [N + 1]: where each token's part of `rows` begins, and the end of the last."""


@dataclass(frozen=True, slots=True)
class Dots:
    """The single tokens of an output-side module."""

    tokens: Tensor
    """int64 [S]: the token of each entry."""
    rows: Tensor
    """int64 [S]: rows of the pool."""
    outputs: Tensor
    """int64 [S]: places in the flattened output [T * D]."""


@dataclass(frozen=True, slots=True)
class PoolRanges:
    """The single tokens of a module of either side, each with the pool rows that are its."""

    side: Side
    tokens: Tensor
    """int64 [N]"""
    starts: Tensor
    """int64 [N]: the first row of each token's adapter."""
    counts: Tensor
    """int64 [N]: how many rows it has."""
    largest: int
    """The largest of the counts."""


@dataclass(frozen=True, slots=True)
class Block:
    """As many tokens of each of some adapters of one size."""

    side: Side
    start: int
    """The first adapter's first row of the pool."""
    stride: int
    """Rows from one adapter to the next."""
    shape: tuple[int, int, int]
    """G, M, K"""
    tokens: Tensor
    """int64 [G * M]"""
    entries: Tensor
    """int64 [G * M * K]: places in the flattened input [T * F] or, on that side, output [T * D]."""

    def moved(self, by: int, places: Tensor) -> "Block":
        """Return the block of a module whose rows lie `by` rows behind: see `ModulePlan.moved`."""
        groups, num_tokens, count = self.shape
        start = self.start + by
        own = places.as_strided((groups, 1, count), (self.stride, count, 1), start)
        entries = self.entries.view(groups, num_tokens, 1) + own
        return replace(self, start=start, entries=entries.flatten())


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What one module has to do for this batch."""

    spans: tuple[Span, ...]
    """Ranges that are multiplied."""
    gather: Gather | None
    """Single tokens of the input side."""
    dots: Dots | None
    """Single tokens of the output side."""
    ranges: tuple[PoolRanges, ...]
    """Single tokens of either side, where a kernel takes them so."""
    blocks: tuple[Block, ...]
    """Tokens of which an adapter has several."""

    def moved(self, by: int, places: Tensor) -> "ModulePlan":
        """Return the plan of a module whose rows lie `by` rows behind.

        This one's `inputs`, `outputs` and `entries` are where the tokens begin; `places` [R], of
        the pool's rows, are added to them.
        """
        spans = tuple(
            Span(it.start, it.stop, replace(it.part, start=it.part.start + by)) for it in self.spans
        )
        gather, dots = self.gather, self.dots
        if gather is not None:
            rows = gather.rows + by
            inputs = places.index_select(0, rows).add_(gather.inputs)
            gather = Gather(gather.tokens, inputs, rows, gather.bounds)
        if dots is not None:
            rows = dots.rows + by
            dots = Dots(dots.tokens, rows, places.index_select(0, rows).add_(dots.outputs))
        ranges = tuple(replace(it, starts=it.starts + by) for it in self.ranges)
        blocks = tuple(it.moved(by, places) for it in self.blocks)
        return ModulePlan(spans, gather, dots, ranges, blocks)


class Routing:
    """The batch's tokens by slot. Built once a composition, asked by every layer."""

    def __init__(self, ranges: Sequence[tuple[Slot, int, int]], slots: DeviceSlots) -> None:
        """Take (slot, first token, end) of each request that has an adapter."""
        self._ranges = ranges
        self._slots = slots
        self._limits = _limits(slots.rows)
        self._layouts = list(dict.fromkeys(slot.layout for slot, _, _ in ranges))
        self._alike: dict[tuple[int, int, tuple[SlotPart | None, ...]], ModulePlan] = {}
        self._plans: dict[str, ModulePlan | None] = {}

    def plan(self, module: str, in_features: int, out_features: int) -> ModulePlan | None:
        """Return what `module` [D, F] has to do; None where no adapter of the batch changes it."""
        if module not in self._plans:
            self._plans[module] = self._build(module, in_features, out_features)
        return self._plans[module]

    def _build(self, module: str, in_features: int, out_features: int) -> ModulePlan | None:
        parts = [layout.parts.get(module) for layout in self._layouts]
        first = min((part.start for part in parts if part is not None), default=None)
        if first is None:
            return None
        behind = tuple(part and replace(part, start=part.start - first) for part in parts)
        alike = (in_features, out_features, behind)
        if alike not in self._alike:
            self._alike[alike] = self._build_alike(*alike)
        return self._alike[alike].moved(first, self._slots.places)

    def _build_alike(
        self, in_features: int, out_features: int, parts: Sequence[SlotPart | None]
    ) -> ModulePlan:
        """Build the plan of a module from its part of each layout, without the places."""
        spans: list[Span] = []
        of_part: dict[SlotPart, list[int]] = defaultdict(list)
        part_of = dict(zip(self._layouts, parts, strict=True))
        for slot, start, stop in self._ranges:
            own_part = part_of[slot.layout]
            if own_part is None:
                continue
            part = replace(own_part, start=slot.start + own_part.start)
            if stop - start >= self._limits.long and self._fewest(part.side) < _NEVER:
                spans.append(Span(start, stop, part))
            else:
                of_part[part] += range(start, stop)
        gather, dots, ranges, blocks = None, None, list[PoolRanges](), list[Block]()
        sides: tuple[tuple[Side, int], ...] = (("in", in_features), ("out", out_features))
        for side, width in sides:
            own = {part: tokens for part, tokens in of_part.items() if part.side == side}
            singles, runs = _split(own, self._fewest(side), self._limits)
            blocks += [self._block(run, width) for run in runs]
            if singles and self._limits.has_kernel:
                ranges.append(self._pool_ranges(side, singles))
            elif singles and side == "in":
                gather = self._gather(singles, width)
            elif singles:
                dots = self._dots(singles, width)
        return ModulePlan(tuple(spans), gather, dots, tuple(ranges), tuple(blocks))

    def _fewest(self, side: Side) -> int:
        return self._limits.fewest.get((side, self._slots.rows.itemsize), 2)

    def _block(self, run: "_Run", width: int) -> Block:
        """Build a block; `width` is F on the input side, D on the output side."""
        parts, lists = zip(*run, strict=True)
        start, count = parts[0].start, parts[0].count
        stride = parts[1].start - start if len(parts) > 1 else count
        shape = (len(parts), len(lists[0]), count)
        (tokens,) = self._send(np.array(lists).ravel())
        return Block(parts[0].side, start, stride, shape, tokens, entries=tokens * width)

    def _gather(self, singles: "_Singles", in_features: int) -> Gather:
        tokens, rows, counts = _rows_of(sorted(singles, key=lambda single: single[0]))
        bounds = np.concatenate(([0], counts.cumsum()))
        inputs = np.repeat(tokens * in_features, counts)
        return Gather(*self._send(tokens, inputs, rows, bounds))

    def _dots(self, singles: "_Singles", out_features: int) -> Dots:
        tokens, rows, counts = _rows_of(singles)
        of_rows = np.repeat(tokens, counts)
        return Dots(*self._send(of_rows, rows, of_rows * out_features))

    def _pool_ranges(self, side: Side, singles: "_Singles") -> PoolRanges:
        sizes = [part.count for _, part in singles]
        tokens, starts, counts = self._send(
            np.array([token for token, _ in singles]),
            np.array([part.start for _, part in singles]),
            np.array(sizes),
        )
        return PoolRanges(side, tokens, starts, counts, largest=max(sizes))

    def _send(self, *arrays: NDArray[np.int64]) -> list[Tensor]:
        """Bring arrays to the device: in one copy, behind which nobody waits for the device."""
        device = self._slots.places.device
        packed = torch.from_numpy(np.concatenate(arrays))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        return list(torch.split(packed, [len(array) for array in arrays]))


def _rows_of(
    singles: "_Singles",
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens [N], their pool rows one token after the other [S], and counts [N]."""
    tokens = np.array([token for token, _ in singles], dtype=np.int64)
    starts = np.array([part.start for _, part in singles], dtype=np.int64)
    counts = np.array([part.count for _, part in singles], dtype=np.int64)
    # row j of a token's part is starts + j, where j counts from the token's offset
    rows = np.repeat(starts - counts.cumsum() + counts, counts)
    rows += np.arange(len(rows))
    return tokens, rows, counts


def _limits(pool: Tensor) -> Limits:
    if pool.is_cuda:
        return _CUDA
    return _CPU if "AVX2" not in torch.backends.cpu.get_cpu_capability() else _CPU_AVX2


_Singles = list[tuple[int, SlotPart]]
_Run = list[tuple[SlotPart, list[int]]]


def _split(
    of_part: dict[SlotPart, list[int]], fewest: int, limits: Limits
) -> tuple[_Singles, list[_Run]]:
    """Split adapters and their tokens into runs of one size, one distance, one number of tokens.

    The tokens of an adapter that has less than `fewest` are left single, and so are those of runs
    that the limits call too short.
    """
    singles: _Singles = []
    several: _Run = []
    for part, tokens in of_part.items():
        if len(tokens) < fewest:
            singles += [(token, part) for token in tokens]
        else:
            several.append((part, tokens))
    several.sort(key=lambda it: (it[0].count, len(it[1]), it[0].start))
    runs: list[_Run] = []
    for part, tokens in several:
        if runs and _continues(runs[-1], part, len(tokens)):
            runs[-1].append((part, tokens))
        else:
            runs.append([(part, tokens)])
    blocks: list[_Run] = []
    for run in runs:
        each = len(run[0][1])
        is_short = each == 1 and len(run) < limits.shortest_run
        if is_short or each * len(run) < limits.fewest_in_all:
            singles += [(token, part) for part, tokens in run for token in tokens]
        else:
            blocks.append(run)
    return singles, blocks


def _continues(run: _Run, part: SlotPart, num_tokens: int) -> bool:
    last, tokens = run[-1]
    step = part.start - last.start
    is_even = len(run) == 1 or step == last.start - run[-2][0].start
    return last.count == part.count and len(tokens) == num_tokens and step > 0 and is_even
