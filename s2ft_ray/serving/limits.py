"""How much a tenant may ask at once and in a minute.

Invariant: what is admitted is given back exactly once. A refusal says when to come back.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from s2ft_ray.accounts import Tenant
from s2ft_ray.serving.wire_errors import ApiError

_WINDOW_S = 60.0


class TenantLimits:
    """Requests at once and in the last minute, by tenant. For one event loop, without locks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[str, int] = {}
        self._recent: dict[str, deque[float]] = {}

    @contextmanager
    def admitted(self, tenant: Tenant) -> Iterator[None]:
        """Count a request of `tenant` for as long as the block runs. Raises ApiError 429."""
        self._check(tenant)
        self._running[tenant.name] = self._running.get(tenant.name, 0) + 1
        if tenant.requests_per_minute is not None:
            self._recent.setdefault(tenant.name, deque()).append(self._clock())
        try:
            yield
        finally:
            self._running[tenant.name] -= 1

    def _check(self, tenant: Tenant) -> None:
        most = tenant.max_concurrent_requests
        if most is not None and self._running.get(tenant.name, 0) >= most:
            raise ApiError(
                429,
                f"Tenant {tenant.name} has {most} requests running, which is its limit; wait for"
                " one to end, or ask the operator for more",
                code="rate_limit_exceeded",
                retry_after_s=1,
            )
        recent = self._recent.get(tenant.name)
        if tenant.requests_per_minute is None or not recent:
            return
        now = self._clock()
        while recent and recent[0] <= now - _WINDOW_S:
            recent.popleft()
        if len(recent) >= tenant.requests_per_minute:
            raise ApiError(
                429,
                f"Tenant {tenant.name} has sent {len(recent)} requests in a minute, which is its"
                " limit; come back later, or ask the operator for more",
                code="rate_limit_exceeded",
                retry_after_s=recent[0] + _WINDOW_S - now + 1,
            )
