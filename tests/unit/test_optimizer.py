import pytest

from s2ft_ray.config import OptimConfig
from s2ft_ray.training.optimizer import learning_rate


def rates(num_steps: int, **values: object) -> list[float]:
    config = OptimConfig(lr=1.0, max_steps=num_steps, **values)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_warmup_rises_to_the_rate_and_the_line_falls_to_zero() -> None:
    found = rates(10, warmup_steps=4, schedule="linear")
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([1 - i / 6 for i in range(6)])


def test_the_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates(11, schedule="cosine")
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.5, abs=0.08)
    assert found == sorted(found, reverse=True)


def test_constant_stays() -> None:
    assert set(rates(5, schedule="constant")) == {1.0}


def test_a_warmup_longer_than_the_run_never_divides_by_zero() -> None:
    assert rates(3, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75])
    assert all(0 < rate <= 1 for rate in rates(3, warmup_steps=9))
