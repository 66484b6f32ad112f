"""Fair shares: each tenant's level, the weighted dominant share of what it used and will use.

A tenant's amounts are resource-seconds as shares of the whole cluster. Its level is the largest of
them (dominant resource fairness) divided by its weight, plus its entry penalty. The lowest level
is served first. What a job is still expected to use counts from its admission on, so that a burst
can't win before its use shows. Past use decays with a half-life. Invariant: a tenant that doesn't
wait gathers no claim on the future, and what nobody else wanted is held against nobody: its level
is kept, by the entry penalty, at or above the lowest level of those that wait, or where nobody
waits, the level at which jobs were admitted (start-time fair queueing's virtual time). Penalties
are kept in resource-seconds, of the resource that makes the level which they lift to: a cluster
that is small for a moment leaves none behind that are large in the whole one.
"""

from collections.abc import Iterable, Mapping, Sequence

from s2ft_ray.scheduler.views import (
    JobView,
    NodeView,
    PolicySettings,
    TenantView,
    Usage,
    WorkerShape,
)

# A job that holds workers and has no estimate is expected to last as long again, at least so long.
_MIN_EXPECTED_S = 600.0


def expected_left_s(job: JobView, now: float, settings: PolicySettings) -> float:
    """Return the seconds that `job` is expected to hold workers from now on, or once admitted."""
    if job.time_left_s is not None:
        return max(job.time_left_s, 0.0)
    if job.started_at is None:
        return settings.unknown_duration_s
    return max(now - job.started_at, _MIN_EXPECTED_S)


def advance(
    tenants: Iterable[TenantView], jobs: Iterable[JobView], now: float, half_life_s: float
) -> dict[str, Usage]:
    """Return each tenant's usage at `now`: decayed, and the work of `jobs` since then added.

    A clock that went backwards changes nothing.
    """
    amounts: dict[str, dict[str, float]] = {}
    entries: dict[str, dict[str, float]] = {}
    at: dict[str, float] = {}
    for tenant in tenants:
        past = tenant.usage
        factor = 0.5 ** (max(now - past.at, 0.0) / max(half_life_s, 1.0)) if past.at else 1.0
        amounts[tenant.name] = {name: amount * factor for name, amount in past.amounts.items()}
        entries[tenant.name] = {name: amount * factor for name, amount in past.entry.items()}
        at[tenant.name] = past.at
    for job in jobs:
        since = max(at[job.tenant], now if job.started_at is None else job.started_at)
        seconds = now - since
        if seconds > 0:
            mine = amounts[job.tenant]
            for name, amount in job.worker.resources:
                mine[name] = mine.get(name, 0.0) + amount * job.num_workers * seconds
    return {
        name: Usage(mine, entries[name], at=max(now, at[name])) for name, mine in amounts.items()
    }


class Standing:
    """One tenant's level while a decision is made."""

    __slots__ = ("_dominant", "_entries", "_shares", "_weight", "level")

    def __init__(self, shares: list[float], weight: float, entries: list[float]) -> None:
        """Take used and entry penalties as shares of the cluster, by resource."""
        self._shares = shares
        self._weight = weight
        self._entries = entries
        self._dominant = max(shares, default=0.0)
        self.level = self._dominant / weight + sum(entries)

    @property
    def heaviest(self) -> int:
        """The resource that makes most of the level."""
        parts = zip(self._shares, self._entries, strict=True)
        levels = [share / self._weight + entry for share, entry in parts]
        return levels.index(max(levels))

    def charge(self, units: Sequence[tuple[int, float]], worker_seconds: float) -> None:
        """Add the work of a gang; `units` are a worker's shares of the cluster by resource."""
        for resource, unit in units:
            self._shares[resource] = grown = self._shares[resource] + unit * worker_seconds
            if grown > self._dominant:
                self.level += (grown - self._dominant) / self._weight
                self._dominant = grown

    def lift(self, level: float) -> None:
        """Raise the level to `level`."""
        self.level = max(self.level, level)


class Standings:
    """Every tenant's level, and how much of the cluster each shape of worker is."""

    def __init__(
        self, nodes: Sequence[NodeView], tenants: Iterable[TenantView], usages: Mapping[str, Usage]
    ) -> None:
        totals: dict[str, float] = {}
        for node in nodes:
            for name, amount in node.total.items():
                totals[name] = totals.get(name, 0.0) + amount
        self._names = sorted(name for name, total in totals.items() if total > 0)
        self._resources = {name: position for position, name in enumerate(self._names)}
        self._totals = totals
        self._units: dict[WorkerShape, list[tuple[int, float]]] = {}
        self.of: dict[str, Standing] = {}
        for tenant in tenants:
            used = usages[tenant.name]
            shares = [used.amounts.get(name, 0.0) / totals[name] for name in self._names]
            entries = [used.entry.get(name, 0.0) / totals[name] for name in self._names]
            self.of[tenant.name] = Standing(shares, tenant.weight, entries)

    def units(self, shape: WorkerShape) -> list[tuple[int, float]]:
        """Return a worker's share of the cluster by resource."""
        units = self._units.get(shape)
        if units is None:
            units = [
                (self._resources[name], amount / self._totals[name])
                for name, amount in shape.resources
                if name in self._resources
            ]
            self._units[shape] = units
        return units

    def raise_entries(
        self, usages: dict[str, Usage], levels: Mapping[str, float], floor: float, of: str
    ) -> None:
        """Raise the entry penalties of the tenants in `levels` by what they are below `floor`.

        `of` is the tenant whose level the floor is.
        """
        below = {name: floor - level for name, level in levels.items() if level < floor}
        if not below:
            return
        resource = self._names[self.of[of].heaviest]
        for name, lack in below.items():
            past = usages[name]
            raised = past.entry.get(resource, 0.0) + lack * self._totals[resource]
            usages[name] = Usage(past.amounts, {**past.entry, resource: raised}, past.at)

    def commit(self, jobs: Iterable[JobView], now: float, settings: PolicySettings) -> None:
        """Charge what the jobs that hold workers will still use."""
        for job in jobs:
            seconds = expected_left_s(job, now, settings) * job.held_workers
            self.of[job.tenant].charge(self.units(job.worker), seconds)


def lift_entrants(
    standings: Standings,
    usages: dict[str, Usage],
    waiting: set[str],
    tenants: Iterable[TenantView],
) -> None:
    """Keep tenants that don't wait, and new ones, at the lowest level of those that wait."""
    settled = {tenant.name for tenant in tenants if tenant.usage.at}
    levels = [(standings.of[name].level, name) for name in waiting & settled]
    if levels:
        entrants = {name: it.level for name, it in standings.of.items() if name not in settled}
        entrants |= {name: it.level for name, it in standings.of.items() if name not in waiting}
        floor, lowest = min(levels)
        standings.raise_entries(usages, entrants, floor, lowest)
        for name in entrants:
            standings.of[name].lift(floor)
