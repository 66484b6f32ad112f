"""What single tokens get from their adapters on a GPU: one kernel for all of them, by Triton.

Its launch is what counts while few requests decode: 64 adapters of 64 rows, 4096 wide, in bf16 on
an H200 take 33 us on the input side and 32 on the output side when Python launches them; as batched
products, which are several launches, 57 and 49; embedding_bag takes 69, and has no bf16 for the
output side. Each kernel reads the rows once for each token, summing in fp32.

Dimensions: T tokens of the batch, N of them here, D out, F in, W width of a pool row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2ft_ray.serving.routing import PoolRanges

_FEW_TOKENS = 32
"""Below, the blocks of a sum are narrower, so that all multiprocessors have one."""
# Where they lie changes with the number of tokens: that compiles nothing anew.
_UNALIGNED = ["starts", "counts", "tokens"]


def warm_up(pool: Tensor) -> None:
    """Compile the kernels for a pool's width and dtype, so that no step waits for that."""
    width = pool.shape[1]
    for num_tokens in (1, _FEW_TOKENS):
        x = torch.zeros(num_tokens, width, dtype=pool.dtype, device=pool.device)
        tokens = torch.arange(num_tokens, device=pool.device)
        starts, counts = torch.zeros_like(tokens), torch.ones_like(tokens)
        places = torch.zeros(1, dtype=torch.int64, device=pool.device)
        add_sums(x, x.clone(), pool, places, PoolRanges("in", tokens, starts, counts, 1))
        add_dots(x, x.clone(), pool, places, PoolRanges("out", tokens, starts, counts, 1))


def add_sums(x: Tensor, y: Tensor, pool: Tensor, places: Tensor, ranges: PoolRanges) -> None:
    """Add to tokens the pool rows of their ranges, weighted by their inputs there.

    x: [T, F], y: [T, W], pool: [R, W], places: int64 [R].
    """
    num_tokens, width = ranges.tokens.shape[0], pool.shape[1]
    block_rows, block_width = (32, 128) if num_tokens < _FEW_TOKENS else (16, 512)
    with torch.cuda.device(pool.device):
        _sums[num_tokens, triton.cdiv(width, block_width)](
            x, pool, places, ranges.starts, ranges.counts, ranges.tokens, y,
            x.stride(0), y.stride(0), width, block_rows, block_width, num_warps=4,
        )  # fmt: skip


def add_dots(x: Tensor, y: Tensor, pool: Tensor, places: Tensor, ranges: PoolRanges) -> None:
    """Add to tokens, at their places, their products with the pool rows of their ranges.

    x: [T, W], y: [T, D], pool: [R, W], places: int64 [R].
    """
    num_tokens, block_rows = ranges.tokens.shape[0], 2
    with torch.cuda.device(pool.device):
        _dots[num_tokens, triton.cdiv(ranges.largest, block_rows)](
            x, pool, places, ranges.starts, ranges.counts, ranges.tokens, y,
            x.stride(0), y.stride(0), pool.shape[1], block_rows, 1024, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _sums(
    x, pool, places, starts, counts, tokens, y,
    x_stride, y_stride, width: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One token's values [block_width] of y."""
    n = tl.program_id(0)
    columns = tl.program_id(1) * block_width + tl.arange(0, block_width)
    inside = columns < width
    start, count, token = tl.load(starts + n), tl.load(counts + n), tl.load(tokens + n)
    sums = tl.zeros((block_width,), dtype=tl.float32)
    for first in range(0, count, block_rows):
        rows = first + tl.arange(0, block_rows)
        is_row = rows < count
        place = tl.load(places + start + rows, mask=is_row, other=0)
        weights = tl.load(x + token * x_stride + place, mask=is_row, other=0.0).to(tl.float32)
        values = tl.load(
            pool + (start + rows)[:, None] * width + columns[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        sums += tl.sum(values * weights[:, None], 0)
    at = y + token * y_stride + columns
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (before + sums).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _dots(
    x, pool, places, starts, counts, tokens, y,
    x_stride, y_stride, width: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One token's products with block_rows rows."""
    n = tl.program_id(0)
    rows = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    start, count, token = tl.load(starts + n), tl.load(counts + n), tl.load(tokens + n)
    is_row = rows < count
    products = tl.zeros((block_rows, block_width), dtype=tl.float32)
    for first in range(0, width, block_width):
        columns = first + tl.arange(0, block_width)
        inside = columns < width
        inputs = tl.load(x + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(
            pool + (start + rows)[:, None] * width + columns[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        products += values * inputs[None, :]
    place = tl.load(places + start + rows, mask=is_row, other=0)
    at = y + token * y_stride + place
    before = tl.load(at, mask=is_row, other=0.0).to(tl.float32)
    tl.store(at, (before + tl.sum(products, 1)).to(y.dtype.element_ty), mask=is_row)
