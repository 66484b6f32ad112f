"""What a simulated month was like: shares against entitlements, waits, what was lost.

A tenant's entitlement is its weighted max-min share of the workers that were in use: those who
wait divide what the others leave them. Over a day in which it waited all along, what it got is
held against that. The ideal fair queue is the fluid one: at every moment each tenant's jobs run
at exactly that share, with no gangs, nodes, stops or failures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.queue_simulation import STARTUP_S, Record
from benchmarks.queue_trace import HOUR, Trace, TraceJob

Floats = NDArray[np.float64]
_FIRST_DAY_H = 48
"""The first sliding day ends here: on the first of all the cluster fills."""
_Fluid = tuple[int, float, str, int]
"""A job in the ideal queue: negative priority, submitted at, id, workers."""


@dataclass(frozen=True)
class Fairness:
    """Over all days (sliding by the hour) and the tenants that waited all through them."""

    off_capacity: Floats
    """What each got above or below its entitlement, as a part of the day's capacity."""
    off_entitlement: Floats
    """The same as a part of its entitlement."""
    granularity: Floats
    """The largest job of the tenant as a part of its entitlement of the day."""
    jain: Floats
    """Jain's index of got over entitled, of each day with two such tenants or more."""
    by_tenant: dict[str, tuple[int, float, float]]
    """Number of such days, mean of what it got and of what it was entitled to, worker-hours."""
    surplus: Floats
    """[hour, tenant]: got less entitled of the 24 hours before, worker-hours; of every tenant."""


@dataclass(frozen=True)
class LateJob:
    """A job that waited over twice its ideal wait plus the longest job."""

    job: TraceJob
    waited_s: float
    ideal_s: float
    beyond_s: float
    """How much over."""
    surplus_h: float
    """Worker-hours that its tenant got above its entitlement in the day before it came."""


def water_fill(capacity: float, demands: Floats, weights: Floats) -> Floats:
    """Return each one's weighted max-min share of `capacity`, none above its demand."""
    shares = np.zeros_like(demands)
    open_ones = demands > 0
    left = capacity
    while left > 1e-9 and open_ones.any():
        level = left / weights[open_ones].sum()
        full = open_ones & (demands <= weights * level + 1e-12)
        if not full.any():
            shares[open_ones] = weights[open_ones] * level
            break
        shares[full] = demands[full]
        left -= float(demands[full].sum())
        open_ones &= ~full
    return shares


def utilisation(trace: Trace, record: Record) -> float:
    """Return the part of the workers that was held, from the first day's end to the last."""
    hours = _by_hour(trace, record.times, np.array(record.held, dtype=float))
    return float(hours[24:].sum() / (trace.num_workers * (len(hours) - 24)))


def hourly_utilisation(trace: Trace, record: Record) -> Floats:
    """Return the part of the workers that was held, by hour."""
    hours = _by_hour(trace, record.times, np.array(record.held, dtype=float))
    return np.asarray(hours.sum(axis=1) / trace.num_workers)


def measure_fairness(trace: Trace, record: Record) -> Fairness:
    """Hold every tenant's days of waiting against its entitlement."""
    held, wanted = np.array(record.held, dtype=float), np.array(record.wanted, dtype=float)
    claims = Claims.of(trace)
    entitled = np.array([claims.entitled(*tick) for tick in zip(held, wanted, strict=True)])
    got = _days(_by_hour(trace, record.times, held))
    due = _days(_by_hour(trace, record.times, entitled))
    idle = _days(_by_hour(trace, record.times, (wanted == 0).astype(float)))
    waited = (idle < 1e-6) & (due > 0)
    largest = np.zeros(len(trace.tenants))
    places = {tenant.name: i for i, tenant in enumerate(trace.tenants)}
    for job in trace.jobs:
        largest[places[job.tenant]] = max(largest[places[job.tenant]], job.work_s / HOUR)
    jain = []
    for got_one, due_one, those in zip(got, due, waited, strict=True):
        if those.sum() >= 2:
            ratio = got_one[those] / due_one[those]
            jain.append(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()))
    by_tenant = {
        tenant.name: (int(those.sum()), float(got[those, i].mean()), float(due[those, i].mean()))
        for i, tenant in enumerate(trace.tenants)
        if (those := waited[:, i]).any()
    }
    return Fairness(
        off_capacity=(got - due)[waited] / (trace.num_workers * 24.0),
        off_entitlement=got[waited] / due[waited] - 1,
        granularity=np.broadcast_to(largest, got.shape)[waited] / due[waited],
        jain=np.array(jain),
        by_tenant=by_tenant,
        surplus=got - due,
    )


@dataclass(frozen=True)
class Claims:
    """The tenants' weights, limits and quotas, in the trace's order."""

    weights: Floats
    limits: Floats
    quotas: Floats

    @classmethod
    def of(cls, trace: Trace) -> "Claims":
        """Take them from a trace."""
        return cls(
            weights=np.array([tenant.weight for tenant in trace.tenants]),
            limits=np.array([float(it.max_workers or trace.num_workers) for it in trace.tenants]),
            quotas=np.array([float(tenant.quota) for tenant in trace.tenants]),
        )

    def entitled(self, held: Floats, wanted: Floats) -> Floats:
        """Return the entitlements to the workers in use, where `wanted` more are asked for."""
        return self.shares(float(held.sum()), held + wanted)

    def shares(self, num_workers: float, demands: Floats) -> Floats:
        """Divide workers: the quota to whom it is more, to the others by weight what is left."""
        demands = np.minimum(demands, self.limits)
        sure = np.minimum(self.quotas, demands)
        by_quota = np.zeros(len(sure), dtype=bool)
        while True:
            rest = max(num_workers - float(sure[by_quota].sum()), 0.0)
            shares = water_fill(rest, np.where(by_quota, 0.0, demands), self.weights)
            short = ~by_quota & (shares < sure - 1e-9)
            if not short.any():
                return np.where(by_quota, sure, shares)
            by_quota |= short


def used_while_wanted(trace: Trace, record: Record) -> float:
    """Return the part of the workers that was held while jobs waited for workers."""
    spans = np.diff(np.array(record.times), append=record.times[-1])
    wanted = np.array(record.wanted).sum(axis=1) > 0
    held = np.array(record.held).sum(axis=1)
    return float((spans * held)[wanted].sum() / (spans[wanted].sum() * trace.num_workers))


def ideal_delays(trace: Trace, share: float = 1.0) -> dict[str, float]:
    """Return how much later than alone each job ends in the ideal fair queue, in seconds.

    `share` is the part of the workers that it has.
    """
    left = {job.id: job.work_s + STARTUP_S * job.sizes[0] for job in trace.jobs}
    lengths = {job.id: left[job.id] / job.sizes[0] for job in trace.jobs}
    claims = Claims.of(trace)
    places = {tenant.name: i for i, tenant in enumerate(trace.tenants)}
    lines: list[list[_Fluid]] = [[] for _ in trace.tenants]
    delays: dict[str, float] = {}
    arrivals = list(reversed(trace.jobs))
    now = 0.0
    while arrivals or any(lines):
        rates = _fluid_rates(lines, claims, share * trace.num_workers)
        then = min((now + left[job_id] / rate for job_id, rate in rates.items()), default=np.inf)
        if arrivals:
            then = min(then, arrivals[-1].submitted_at)
        for job_id, rate in rates.items():
            left[job_id] -= rate * (then - now)
        now = then
        for line in lines:
            for ended in [it for it in line if left[it[2]] <= 1e-3]:
                line.remove(ended)
                delays[ended[2]] = max(now - ended[1] - lengths[ended[2]], 0.0)
        while arrivals and arrivals[-1].submitted_at <= now:
            job = arrivals.pop()
            line = lines[places[job.tenant]]
            line.append((-job.priority, job.submitted_at, job.id, job.sizes[0]))
            line.sort()
    return delays


def late_jobs(
    trace: Trace, record: Record, fairness: Fairness, delays: dict[str, float]
) -> list[LateJob]:
    """Return the jobs that waited over twice their ideal `delays` plus the longest job."""
    longest_s = max(job.work_s / job.sizes[0] for job in trace.jobs)
    places = {tenant.name: i for i, tenant in enumerate(trace.tenants)}
    late = []
    for name, simulated in record.jobs.items():
        beyond_s = simulated.waited_s - 2 * delays[name] - longest_s
        if beyond_s > 0:
            job = simulated.spec
            day = int(job.submitted_at // HOUR) - _FIRST_DAY_H
            known = 0 <= day < len(fairness.surplus)
            surplus = float(fairness.surplus[day, places[job.tenant]]) if known else float("nan")
            late.append(LateJob(job, simulated.waited_s, delays[name], beyond_s, surplus))
    return sorted(late, key=lambda it: -it.beyond_s)


def _fluid_rates(
    lines: Sequence[list[_Fluid]], claims: Claims, num_workers: float
) -> dict[str, float]:
    """Return the workers of each job that runs: the tenants' shares, dealt out in line."""
    demands = np.array([float(sum(it[3] for it in line)) for line in lines])
    rates = {}
    for line, share in zip(lines, claims.shares(num_workers, demands), strict=True):
        rest = float(share)
        for _, _, job_id, workers in line:
            if rest <= 1e-9:
                break
            rates[job_id] = min(rest, float(workers))
            rest -= rates[job_id]
    return rates


def _by_hour(trace: Trace, times: Sequence[float], values: Floats) -> Floats:
    """Return the integral of a step function over each hour of the trace, in hours: [hour, ...]."""
    edges = np.arange(0.0, trace.duration_s + 1, HOUR)
    starts = np.array(times)
    spans = np.diff(starts, append=starts[-1])
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values * spans[:, None], 0)])
    knots = np.append(starts, starts[-1] + 1e-9)
    at_edges = np.stack([np.interp(edges, knots, column) for column in total.T], axis=1)
    return np.asarray(np.diff(at_edges, axis=0) / HOUR)


def _days(hours: Floats) -> Floats:
    """Return sums over 24 hours, sliding by one, without the first day."""
    sums = np.concatenate([np.zeros((1, hours.shape[1])), np.cumsum(hours, axis=0)])
    return np.asarray(sums[24:] - sums[:-24])[_FIRST_DAY_H - 24 :]
