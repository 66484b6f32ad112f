"""Who is next: pure functions from a ``Snapshot`` to a ``Plan``. No I/O, clock or randomness.

A decision walks the queue once in its order (``order``: claims within quota, priority, fair
share, age), admits whole gangs where they fit (``placement``), and from the first that doesn't
fit on lets only those pass that don't delay it (``backfill``). For the first that wait it may
stop others (``preemption``) or shrink elastic ones (``elastic``); where nobody waits they grow.

Invariants, each held by a property test over histories:

- What is held never passes what a node has, nor a tenant's limit of workers.
- A gang is admitted whole or not at all.
- Given right estimates, no job that is passed starts later than its reservation.
- A tenant that waits is served: its level stays while the others' rise.
- No ping-pong: a job that was stopped never has the one stopped that it was stopped for.
- The same snapshot at the same time gives the same plan.

The cost of a tick is linear in the jobs (times the logarithm of the tenants that wait), plus the
nodes for each gang that starts; ``jobs/benchmark.py queue`` measures it.
"""

from s2ft_ray.scheduler.policy.decision import decide
from s2ft_ray.scheduler.policy.estimates import (
    Measurement,
    expected_duration_s,
    expected_starts,
)
from s2ft_ray.scheduler.policy.placement import never_fits

__all__ = ["Measurement", "decide", "expected_duration_s", "expected_starts", "never_fits"]
