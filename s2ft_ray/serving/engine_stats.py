"""What an engine tells of itself: plain values for metrics and for `s2ft adapters list`."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from s2ft_ray.serving.requests import AdapterKey

Event = Literal["hit", "miss", "load", "eviction"]


@dataclass
class AdapterEvents:
    """How often each adapter was on the device when it was asked for, or was not, was loaded into
    host memory, and was evicted from the device."""

    counts: Counter[tuple[AdapterKey, Event]] = field(default_factory=Counter)

    def add(self, key: AdapterKey, event: Event) -> None:
        """Count an event."""
        self.counts[key, event] += 1

    def total(self, event: Event) -> int:
        """Return how often it was over all adapters."""
        return sum(count for (_, other), count in self.counts.items() if other == event)


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
    tier: Literal["device", "host"]
    size_bytes: int
    num_running: int = 0
    """Requests that it answers now."""
