"""The arithmetic behind the serving benchmark: LoRA's kernels, the sizes, the table."""

from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).parents[2]


def load(name: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        yield import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def lora() -> Iterator[ModuleType]:
    yield from load("serve_lora")


@pytest.fixture(scope="module")
def mixed() -> Iterator[ModuleType]:
    yield from load("serve_mixed")


@pytest.fixture(scope="module")
def serve() -> Iterator[ModuleType]:
    yield from load("serve")


@pytest.fixture(scope="module")
def swap() -> Iterator[ModuleType]:
    yield from load("serve_swap")


@pytest.fixture(scope="module")
def http() -> Iterator[ModuleType]:
    yield from load("serve_http")


def test_every_kernel_of_lora_gives_the_same_product(lora: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, 32, generator=draw)  # [G, Q, P], as B lies in memory
    x = torch.randn(5, 3, 8, generator=draw)
    expected = torch.einsum("gqp,gmq->gmp", rows, x)
    for kernel in lora.SECOND:
        torch.testing.assert_close(kernel(rows.transpose(1, 2), x), expected)
    weights = rows.transpose(1, 2).contiguous()  # [G, P, Q], as A does
    for kernel in lora.FIRST:
        torch.testing.assert_close(kernel(weights, x), expected)


def test_a_kernel_that_refuses_a_shape_is_not_taken(lora: ModuleType) -> None:
    weights, x = torch.ones(2, 3, 5), torch.ones(2, 1, 5)  # rows of 20 bytes: not for grouped_mm
    assert torch.equal(lora.Products(lora.FIRST)(weights, x), torch.full((2, 1, 3), 5.0))


def test_the_deployed_service_is_not_measured_on_a_gpu(serve: ModuleType) -> None:
    asked = Namespace(device="cuda", parts=["layer", "http", "swap"])
    with pytest.raises(SystemExit, match="no http, swap: they deploy the service"):
        serve.run(asked)


def test_every_part_is_there(serve: ModuleType) -> None:
    for module, function in serve.PARTS.values():
        assert callable(getattr(import_module(module), function))


def test_steps_are_those_in_which_all_decode(mixed: ModuleType) -> None:
    steps = object.__new__(mixed._Steps)
    steps.begun = [(0.0, False), (1.0, True), (1.5, True), (3.0, False), (9.0, True)]
    assert steps.seconds() == [0.5, 1.5]


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


def test_a_move_is_compared_with_as_much_quiet_time_before_it(swap: ModuleType) -> None:
    answer = swap.Answer(0.0, events=[(at, {}) for at in (1.0, 1.1, 4.5, 4.6, 9.0, 9.3)])
    load = swap.Load(answers=[(0, answer)], moves=[(2.0, 5.0), (7.0, 10.0)])
    assert load.quiet() == [(0.0, 2.0), (5.0, 7.0)]  # never what lies in another move
    assert load.gaps_ms(load.quiet()) == pytest.approx([100])
    assert load.gaps_ms(load.moves) == pytest.approx([3400, 100, 4400, 300])


def test_a_swap_is_judged_by_its_faults_mixtures_and_the_gaps_p99(swap: ModuleType) -> None:
    load, quiet = swap.Load(moves=[(2.0, 3.0)]), [10.0] * 99 + [500.0, 30.0, 30.0]
    table = swap._render(load, [], 1, {"quiet": quiet, "moving": [10.0] * 20 + [90.0] * 2})
    assert "0 faults (within 0), 1 mixed (MISSES 0); p99 of the gaps +60 ms (MISSES 50)" in table
    table = swap._render(load, ["broke"], 0, {"quiet": quiet, "moving": [10.0] * 20 + [70.0] * 2})
    assert "1 faults (MISSES 0), 0 mixed (within 0); p99 of the gaps +40 ms (within 50)" in table


def test_a_soak_counts_short_answers_as_faults_and_growth_from_a_fifth_on(http: ModuleType) -> None:
    soak = http.Soak(samples=[{"replica": size} for size in (10, 100, 101, 101, 101)])
    for num_tokens in (32, 31):
        events = [(0.0, {"usage": {"completion_tokens": num_tokens}})]
        soak.take(http.Answer(0.0, 200, events), 32)
    assert soak.faults == ["31 tokens of 32"]
    table = http._render(soak, 1.0)
    assert "63 tokens/s, 1 faults (MISSES 0); memory +1.0% (within 2%)" in table
