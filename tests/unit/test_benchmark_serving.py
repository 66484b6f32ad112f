"""The arithmetic behind the serving benchmark: LoRA's kernels, the sizes, the table."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lora() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        yield import_module("benchmarks.serve_lora")


@pytest.fixture(scope="module")
def mixed() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        yield import_module("benchmarks.serve_mixed")


def test_every_kernel_of_lora_gives_the_same_product(lora: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, 32, generator=draw)  # [G, Q, P], as B lies in memory
    x = torch.randn(5, 3, 8, generator=draw)
    expected = torch.einsum("gqp,gmq->gmp", rows, x)
    for kernel in lora.SECOND:
        torch.testing.assert_close(kernel(rows.transpose(1, 2), x), expected)


def test_a_kernel_that_refuses_a_shape_is_not_taken(lora: ModuleType) -> None:
    weights, x = torch.ones(2, 3, 5), torch.ones(2, 1, 5)  # rows of 20 bytes: not for grouped_mm
    assert torch.equal(lora.Products(lora.FIRST)(weights, x), torch.full((2, 1, 3), 5.0))


def test_an_adapter_is_about_a_hundredth_of_the_base_and_as_large_as_loras(
    mixed: ModuleType,
) -> None:
    shape = mixed.Shape(2048, 2)
    lora = shape.rank * (3 * 2 * shape.width + 2 * (shape.width + shape.intermediate))
    assert shape.num_rows * shape.width == pytest.approx(lora, rel=0.01)
    layer = 4 * shape.width**2 + 3 * shape.width * shape.intermediate
    assert lora / layer == pytest.approx(0.01, rel=0.1)


def test_the_table_compares_with_the_base_the_floor_and_lora(mixed: ModuleType) -> None:
    cases = {
        name: mixed.Case(name, [rate], [step])
        for name, rate, step in [
            ("base alone", 100.0, 10.0),
            ("S2FT over 8", 92.0, 11.0),
            ("LoRA over 8", 85.0, 12.0),
            ("S2FT over 64", 55.0, 18.0),
            ("LoRA over 64", 40.0, 20.0),
        ]
    }
    table = mixed._render("bf16", mixed.Shape(2048, 2), cases, {8: 0.93, 64: 0.61})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    of = {row[0]: row[1:] for row in rows}
    assert of["S2FT over 8"][1:4] == ["0.92 (within at least 0.90)", "0.93", "-0.01"]
    assert of["S2FT over 8"][-1] == "0.50 (within at most 0.70)"
    assert of["S2FT over 64"][1:4] == ["0.55 (MISSES at least 0.61)", "0.61", "-0.06"]
    assert of["S2FT over 64"][-1] == "0.80 (MISSES at most 0.70)"
