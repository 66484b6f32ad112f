"""The arithmetic behind the forgetting benchmark: fronts, levels, intervals, the figure."""

import math
import statistics
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fronts() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        from benchmarks import fronts

        return fronts


def test_front_holds_what_no_other_point_beats(fronts: ModuleType) -> None:
    points = [(3.0, 0.1), (2.0, 0.5), (2.5, 0.6), (1.0, 2.0), (1.0, 3.0), (math.nan, 0.0)]
    assert fronts.pareto(points) == [(1.0, 2.0), (2.0, 0.5), (3.0, 0.1)]


def test_kl_between_two_points_is_on_a_line_in_its_logarithm(fronts: ModuleType) -> None:
    front = [(1.0, 1.0), (3.0, 0.01)]
    assert fronts.kl_at(front, 2.0) == pytest.approx(0.1)
    assert fronts.kl_at(front, 1.0) == pytest.approx(1.0)
    assert fronts.kl_at(front, 9.0) == 0.01
    assert fronts.kl_at(front, 0.9) is None


def test_interval_is_students(fronts: ModuleType) -> None:
    found = fronts.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3))
    ratio = fronts.geometric([0.5, 2.0])
    assert ratio.mean == pytest.approx(1.0)
    assert ratio.low * ratio.high == pytest.approx(1.0)


# From the tables of Student's t.
@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (10, 2.262), (11, 2.228), (16, 2.131), (31, 2.042), (121, 1.980)]
)
def test_interval_is_students_for_any_number_of_seeds(
    fronts: ModuleType, count: int, t: float
) -> None:
    values = [float(value) for value in range(count)]
    found = fronts.interval(values)
    assert found.high - found.mean == pytest.approx(
        t * statistics.stdev(values) / math.sqrt(count), rel=1e-3
    )


def test_a_kl_of_0_is_the_least_that_counts(fronts: ModuleType) -> None:
    front = [(1.0, 1.0), (3.0, 0.0)]
    assert fronts.kl_at(front, 2.0) == pytest.approx(fronts.MIN_KL**0.5)
    assert fronts.kl_at(front, 3.0) == pytest.approx(fronts.MIN_KL)
    assert fronts.kl_at(front, 4.0) == fronts.MIN_KL
    paid = [fronts.kl_at(front, 4.0), 1.0]
    assert fronts.geometric(paid).mean == pytest.approx(fronts.MIN_KL**0.5)


def test_levels_are_losses_that_every_front_reaches(fronts: ModuleType) -> None:
    found = fronts.levels([[(1.0, 1.0)], [(2.0, 1.0)]], start=16.0, count=3)
    assert found == pytest.approx([8.0, 4.0, 2.0], rel=2e-3)
    assert found[-1] > 2.0
    assert fronts.levels([[(9.0, 1.0)], [(2.0, 1.0)]], start=16.0, count=3) == []


def test_figure_is_drawn(fronts: ModuleType, tmp_path: Path) -> None:
    assert fronts  # jobs/ is on the path
    from benchmarks.front_figure import Panel, draw_fronts

    by_seed = {0: [(1.0, 1.0), (2.0, 0.1)], 1: [(1.1, 0.9), (2.5, 0.2)]}
    draw_fronts([Panel("tiny", {"S2FT": by_seed, "LoRA": by_seed})], tmp_path / "a" / "f.png")
    assert (tmp_path / "a" / "f.png").read_bytes().startswith(b"\x89PNG")
