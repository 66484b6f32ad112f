"""What an engine tells of itself: plain values for metrics and for `s2ft adapters list`."""

from dataclasses import dataclass
from typing import Literal

from s2ft_ray.serving.requests import AdapterKey


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
