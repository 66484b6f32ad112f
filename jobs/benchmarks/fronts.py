"""What can be had for what: Pareto fronts of (loss on the new task, KL from the base).

Invariant: plain numbers in, plain numbers out. A front belongs to one method and one seed; means
and intervals are over seeds, and ratios are paired by seed.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
"""(loss on the new task, KL from the base): less is better in both."""
MIN_KL = 1e-12
"""What a KL that is measured as 0 counts as, where its logarithm is taken."""
# Of Student's t at 95%, by the number of values.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both, by rising loss (and so falling KL)."""
    front: list[Point] = []
    for loss, kl in sorted(points):
        if math.isfinite(loss) and math.isfinite(kl) and (not front or kl < front[-1][1]):
            front.append((loss, kl))
    return front


def kl_at(front: Sequence[Point], loss: float) -> float | None:
    """Return the KL that a front pays for `loss`; None where it never gets so low.

    Between two points of the front the logarithm of the KL goes on a line; above the last, its
    KL is enough. It is at least MIN_KL.
    """
    if not front or loss < front[0][0]:
        return None
    for (loss_a, kl_a), (loss_b, kl_b) in itertools.pairwise(front):
        if loss <= loss_b:
            share = (loss - loss_a) / (loss_b - loss_a)
            log_a, log_b = math.log(max(kl_a, MIN_KL)), math.log(max(kl_b, MIN_KL))
            return math.exp((1 - share) * log_a + share * log_b)
    return max(front[-1][1], MIN_KL)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two values with its 95% interval."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _t95(len(values)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def geometric(values: Sequence[float]) -> Interval:
    """Return the geometric mean of positive values with its 95% interval."""
    logs = interval([math.log(value) for value in values])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def levels(fronts: Sequence[Sequence[Point]], start: float, count: int) -> list[float]:
    """Return losses that every front reaches, from half of `start` down, evenly in the logarithm.

    None where some front never gets to half of `start`.
    """
    lowest = max(front[0][0] if front else math.inf for front in fronts) * 1.001
    highest = start / 2
    if not lowest < highest:
        return []
    ratio = lowest / highest
    return [highest * ratio ** (index / (count - 1)) for index in range(count)]


def _t95(num_values: int) -> float:
    """Return Student's t; above the table by its series in 1 / v of v degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.5; right to 4 digits from v = 10 on.
    """
    if num_values in _T95:
        return _T95[num_values]
    z, v = 1.959964, num_values - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
