"""Which tokens of a batch belong to which adapter, as the indices that each layer needs.

A batch is requests one after the other, so a request's tokens are one range. Long ranges (prompts)
are multiplied with a slice of the pool. Single tokens (decoding) of all adapters go together: on
the input side through one weighted sum of pool rows, on the output side through one dot product
with each pool row, and where adapters that lie evenly in the pool have enough tokens each, through
one batched product. While the same requests decode, the last plans hold.

Dimensions: T tokens of the batch, D out, F in, S selected entries over the single tokens;
G adapters of one product, M tokens of each, K selected of each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from s2ft_ray.method.parts import Side
from s2ft_ray.serving.device_slots import DeviceSlots, Slot, SlotPart

_NEVER = 2**31
# From so many tokens of one adapter on, a matrix product beats summing rows. One core, 2048 wide,
# 64 selected, bf16: 8 tokens take 49 us either way, 16 take 88 as sums and 61 as a product; in fp32
# the product leads from 8 on (69 and 47).
_LONG = 8
# From so many single tokens of one adapter on, they make a batched product, by side and bytes of a
# value. Output side, 32 adapters of 2 tokens, bf16: 0.36 ms as a product, 0.84 as dots; fp32: 1.19
# and 0.74, and of 8 tokens each 0.39 and 0.69. Input side, 8 adapters of 8, bf16: 0.34 as a
# product, 0.50 as sums; of 2 tokens 1.01 and 0.34.
_FEWEST_TOKENS = {("out", 2): 2, ("out", 4): 4, ("in", 2): 8, ("in", 4): 8}
# On CPUs without AVX-512, 100 adapters of one token in fp32: as products 2.7 ms on both sides, as
# sums 3.4, as dots 3.5. In bf16 such a CPU has no product of its own: 10 adapters of 7 tokens take
# 30 ms as products on the input side and 0.9 as sums.
_FEWEST_TOKENS_AVX2 = {("out", 2): 2, ("out", 4): 1, ("in", 2): _NEVER, ("in", 4): 1}
# Single tokens of fewer adapters than these are no batched product: its calls cost what it saves.
_SHORTEST_RUN = 8


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


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What one module has to do for this batch."""

    spans: tuple[Span, ...]
    """Ranges that are multiplied."""
    gather: Gather | None
    """Single tokens of the input side."""
    dots: Dots | None
    """Single tokens of the output side."""
    blocks: tuple[Block, ...]
    """Tokens of which an adapter has several."""


class Routing:
    """The batch's tokens by slot. Built once a composition, asked by every layer."""

    def __init__(self, ranges: Sequence[tuple[Slot, int, int]], slots: DeviceSlots) -> None:
        """Take (slot, first token, end) of each request that has an adapter."""
        self._ranges = ranges
        self._slots = slots
        self._fewest = _fewest_tokens(slots.rows)
        self._plans: dict[str, ModulePlan | None] = {}

    def plan(self, module: str, in_features: int, out_features: int) -> ModulePlan | None:
        """Return what `module` [D, F] has to do; None where no adapter of the batch changes it."""
        if module not in self._plans:
            self._plans[module] = self._build(module, in_features, out_features)
        return self._plans[module]

    def _build(self, module: str, in_features: int, out_features: int) -> ModulePlan | None:
        spans: list[Span] = []
        of_part: dict[SlotPart, list[int]] = defaultdict(list)
        for slot, start, stop in self._ranges:
            part = slot.parts.get(module)
            if part is None:
                continue
            if stop - start >= _LONG and self._fewest[part.side] < _NEVER:
                spans.append(Span(start, stop, part))
            else:
                of_part[part] += range(start, stop)
        if not (spans or of_part):
            return None
        inputs, dots, blocks = _Singles(), _Singles(), list[Block]()
        sides: tuple[tuple[Side, _Singles, int], ...] = (
            ("in", inputs, in_features),
            ("out", dots, out_features),
        )
        for side, singles, width in sides:
            own = {part: tokens for part, tokens in of_part.items() if part.side == side}
            some, runs = _split(own, self._fewest[side])
            singles += some
            blocks += [self._block(run, width) for run in runs]
        return ModulePlan(
            tuple(spans),
            self._gather(inputs, in_features) if inputs else None,
            self._dots(dots, out_features) if dots else None,
            tuple(blocks),
        )

    def _block(self, run: "_Run", width: int) -> Block:
        """Build a block; `width` is F on the input side, D on the output side."""
        device = self._slots.places.device
        parts, lists = zip(*run, strict=True)
        start, count = parts[0].start, parts[0].count
        stride = parts[1].start - start if len(parts) > 1 else count
        tokens = torch.tensor(lists, device=device)  # [G, M]
        places = self._slots.places.as_strided((len(parts), count), (stride, 1), start)
        entries = tokens[:, :, None] * width + places[:, None, :]
        shape = (len(parts), tokens.shape[1], count)
        return Block(parts[0].side, start, stride, shape, tokens.flatten(), entries.flatten())

    def _gather(self, singles: "_Singles", in_features: int) -> Gather:
        tokens, rows, counts = self._rows_of(sorted(singles, key=lambda single: single[0]))
        inputs = torch.repeat_interleave(tokens * in_features, counts)
        inputs += self._slots.places.index_select(0, rows)
        bounds = nn.functional.pad(counts.cumsum(0), (1, 0))
        return Gather(tokens, inputs, rows, bounds)

    def _dots(self, singles: "_Singles", out_features: int) -> Dots:
        tokens, rows, counts = self._rows_of(singles)
        tokens = torch.repeat_interleave(tokens, counts)
        outputs = tokens * out_features + self._slots.places.index_select(0, rows)
        return Dots(tokens, rows, outputs)

    def _rows_of(self, singles: "_Singles") -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens [N], their pool rows one token after the other [S], and counts [N]."""
        device = self._slots.places.device
        tokens = torch.tensor([token for token, _ in singles], device=device)
        starts = torch.tensor([part.start for _, part in singles], device=device)
        counts = torch.tensor([part.count for _, part in singles], device=device)
        # row j of a token's part is starts + j, where j counts from the token's offset
        rows = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)
        rows += torch.arange(rows.shape[0], device=device)
        return tokens, rows, counts


def _fewest_tokens(pool: Tensor) -> dict[Side, int]:
    """Return from how many tokens of an adapter on its product is batched, by side."""
    is_wide = pool.is_cuda or "AVX2" not in torch.backends.cpu.get_cpu_capability()
    table = _FEWEST_TOKENS if is_wide else _FEWEST_TOKENS_AVX2
    return {side: table.get((side, pool.itemsize), 2) for side in get_args(Side)}


_Singles = list[tuple[int, SlotPart]]
_Run = list[tuple[SlotPart, list[int]]]


def _split(of_part: dict[SlotPart, list[int]], fewest: int) -> tuple[_Singles, list[_Run]]:
    """Split adapters and their tokens into runs of one size, one distance, one number of tokens.

    The tokens of an adapter that has less than `fewest` are left single, and so are short runs of
    adapters of one token.
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
    for run in runs:
        if len(run) < _SHORTEST_RUN and len(run[0][1]) == 1:
            singles += [(tokens[0], part) for part, tokens in run]
    return singles, [run for run in runs if len(run) >= _SHORTEST_RUN or len(run[0][1]) > 1]


def _continues(run: _Run, part: SlotPart, num_tokens: int) -> bool:
    last, tokens = run[-1]
    step = part.start - last.start
    is_even = len(run) == 1 or step == last.start - run[-2][0].start
    return last.count == part.count and len(tokens) == num_tokens and step > 0 and is_even
