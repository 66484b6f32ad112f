"""The kernels for single tokens, against the same sums in fp64."""

import pytest
import torch
from torch import Tensor

from s2ft_ray.serving.routing import PoolRanges

COUNTS = [1, 2, 3, 31, 32, 33, 64, 270]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [96, 1000, 4096])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("strided", [False, True])
def test_each_token_gets_what_its_rows_give(
    dtype: torch.dtype, width: int, num_tokens: int, strided: bool
) -> None:
    from s2ft_ray.serving import gpu_kernels

    draw = torch.Generator("cuda").manual_seed(num_tokens + width)
    torch.manual_seed(num_tokens + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    other = 384  # of the side where rows are selected
    counts = torch.tensor([COUNTS[i % len(COUNTS)] for i in range(num_tokens)], device="cuda")
    starts = counts.cumsum(0) - counts
    pool = normal(int(counts.sum()), width)
    places = torch.cat([torch.randperm(other)[: int(c)].sort().values for c in counts]).cuda()
    tokens = torch.randperm(num_tokens + 3, device="cuda")[:num_tokens].sort().values
    wide, narrow = normal(num_tokens + 3, width), normal(num_tokens + 3, other)
    if strided:  # as a part of a fused projection's output is
        wide = torch.cat([wide, wide], 1)[:, :width]
        narrow = torch.cat([narrow, narrow], 1)[:, :other]
    for side, x, y, add in (
        ("in", narrow, wide, gpu_kernels.add_sums),
        ("out", wide, narrow, gpu_kernels.add_dots),
    ):
        ranges = PoolRanges(side, tokens, starts, counts, int(counts.max()))
        wanted = y.double()
        for token, start, count in zip(
            tokens.tolist(), starts.tolist(), counts.tolist(), strict=True
        ):
            rows, at = pool[start : start + count].double(), places[start : start + count]
            if side == "in":
                wanted[token] += x[token, at].double() @ rows
            else:
                wanted[token, at] += rows @ x[token].double()
        got = y.clone(memory_format=torch.preserve_format)
        if strided:
            got = torch.cat([y, y], 1)[:, : y.shape[1]]
        add(x, got, pool, places, ranges)
        off = float((got.double() - wanted).norm() / wanted.norm())
        assert off < (1e-6 if dtype == torch.float32 else 4e-3)
