"""What an engine tells of itself: plain values for metrics and for `s2ft adapters list`."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from s2ft_ray.serving.requests import AdapterKey

Event = Literal["hit", "miss", "load", "eviction"]
Tier = Literal["device", "host"]


@dataclass
class AdapterEvents:
    """How often each adapter was on the device when it was asked for, or was not, was loaded into
    host memory, and was evicted from the device."""

    totals: Counter[Event] = field(default_factory=Counter)
    """Over all adapters."""
    _new: Counter[tuple[AdapterKey, Event]] = field(default_factory=Counter)

    def add(self, key: AdapterKey, event: Event) -> None:
        """Count an event."""
        self.totals[event] += 1
        self._new[key, event] += 1

    def take(self) -> Counter[tuple[AdapterKey, Event]]:
        """Return what was counted since this was called last."""
        taken, self._new = self._new, Counter()
        return taken


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds and has done."""

    num_running: int
    num_waiting_adapters: int
    device_bytes: int
    device_used_bytes: int
    host_used_bytes: int
    num_loads: int
    num_hits: int
    num_misses: int
    num_evictions: int
    """Of adapters from the device, for others."""
    num_steps: int
    num_shared_tokens: int
    """Of prompts, that were found in the KV cache."""
    on_device: tuple[AdapterKey, ...]


@dataclass(frozen=True)
class Resident:
    """An adapter in memory."""

    key: AdapterKey
    tier: Tier
    size_bytes: int
    num_running: int = 0
    """Requests that it answers now."""
