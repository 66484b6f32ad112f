"""The decision how a run's weights are laid out, and the reason for its log.

``auto`` takes the layout that moves the fewest bytes among those that fit: ``replicate``, then
``hybrid`` where the workers stand on several nodes, then ``full``.
"""

import math
from collections.abc import Callable

from s2ft_ray.config import ParallelConfig
from s2ft_ray.training.memory import MemoryEstimate
from s2ft_ray.training.parallel import Layout, Sharding

MIB = 2**20
# Of the free memory, what the estimate may take: it has no allocator's gaps and no buffers of
# the collectives in it.
MAX_SHARE = 0.9


def resolve_layout(
    parallel: ParallelConfig,
    num_workers: int,
    node_group: int,
    free_bytes: int,
    estimate: Callable[[Layout], MemoryEstimate],
) -> tuple[Layout, str]:
    """Decide the layout of `num_workers`; return it and why, in one line.

    `node_group` is the number of workers of a node (what divides every node's). A resized run
    may have workers that ``shard_group`` doesn't divide: its groups are then smaller.
    """
    group = math.gcd(parallel.shard_group or node_group, num_workers)
    if parallel.sharding != "auto":
        layout = Layout.of(parallel.sharding, num_workers, group)
        return layout, f"as configured{describe_group(layout)}"
    modes: list[Sharding] = ["replicate", "full"]
    if 1 < group < num_workers:
        modes.insert(1, "hybrid")
    room = free_bytes * MAX_SHARE
    refused: list[str] = []
    for mode in modes:
        layout = Layout.of(mode, num_workers, group)
        needs = estimate(layout).total
        if needs <= room or mode == "full":
            fits = "fits" if needs <= room else "is the smallest, though it may not fit"
            return layout, (
                f"about {needs / MIB:,.0f} MiB a worker{describe_group(layout)} {fits} into"
                f" {MAX_SHARE:.0%} of the {free_bytes / MIB:,.0f} MiB free{''.join(refused)}"
            )
        refused.append(f"; {mode} would take {needs / MIB:,.0f}")
    raise AssertionError("full is always taken")


def describe_group(layout: Layout) -> str:
    """Return how many workers hold a copy of the base, where the layout leaves that open."""
    return f" in groups of {layout.group}" if layout.sharding == "hybrid" else ""
