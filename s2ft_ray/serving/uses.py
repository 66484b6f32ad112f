"""How much each adapter is asked for on one replica."""

from collections import deque
from typing import Any

from s2ft_ray.serving.requests import AdapterKey

_WINDOW_S = 60.0


class Uses:
    """The last use and the requests of the last minute, by adapter."""

    def __init__(self) -> None:
        self._recent: dict[AdapterKey, deque[float]] = {}

    def count(self, key: AdapterKey, now: float) -> None:
        """Count one request at `now`, in seconds since the epoch."""
        recent = self._recent.setdefault(key, deque())
        recent.append(now)
        _forget(recent, now)

    def describe(self, key: AdapterKey, now: float) -> dict[str, Any]:
        """Return ``last_used`` (None: never) and ``requests_per_minute``."""
        recent = self._recent.get(key)
        if not recent:
            return {"last_used": None, "requests_per_minute": 0}
        last = recent[-1]
        _forget(recent, now)
        return {
            "last_used": last,
            "requests_per_minute": sum(1 for at in recent if at > now - _WINDOW_S),
        }


def _forget(recent: deque[float], now: float) -> None:
    while len(recent) > 1 and recent[0] <= now - _WINDOW_S:
        recent.popleft()
