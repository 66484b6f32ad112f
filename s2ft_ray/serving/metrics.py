"""What Prometheus sees of the service, by ray.serve.metrics: glue to Ray's own exporter.

Invariant: tags are names of models and tenants, never keys, prompts or request ids. An adapter is
told by name and version, so that a new version can be compared with the old one.
"""

from collections.abc import Mapping
from dataclasses import fields

from ray.serve import metrics

from s2ft_ray.serving.bodies import Usage
from s2ft_ray.serving.engine_stats import EngineStats, Event, Tier
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import ServedRequest, tags_of

_TAGS = ("model", "version", "tenant")
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_BETWEEN = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5]


class RequestMetrics:
    """What the ingress counts."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "s2ft_requests_total", "Requests by their HTTP status.", tag_keys=(*_TAGS, "status")
        )
        self._running = metrics.Gauge("s2ft_requests_running", "Requests at work.")
        self._latency = metrics.Histogram(
            "s2ft_request_seconds", "Whole requests.", boundaries=_SECONDS, tag_keys=_TAGS
        )
        self._retries = metrics.Counter(
            "s2ft_request_retries_total", "Requests sent again: their replica had died."
        )

    def ended(self, tags: dict[str, str], status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.inc(1, {**tags, "status": str(status)})
        self._latency.observe(seconds, tags)

    def running(self, count: int) -> None:
        """Tell how many requests are at work."""
        self._running.set(count)

    def retried(self) -> None:
        """Count a request that is sent again."""
        self._retries.inc()


class TokenMetrics:
    """What a replica counts: a `generation.Meter`."""

    def __init__(self) -> None:
        self._prompt = metrics.Counter(
            "s2ft_prompt_tokens_total", "Tokens of prompts.", tag_keys=_TAGS
        )
        self._completion = metrics.Counter(
            "s2ft_completion_tokens_total", "Tokens generated.", tag_keys=_TAGS
        )
        self._first = metrics.Histogram(
            "s2ft_first_token_seconds",
            "From arrival at the replica to the first token.",
            boundaries=_SECONDS,
            tag_keys=_TAGS,
        )
        self._next = metrics.Histogram(
            "s2ft_next_token_seconds",
            "Between two tokens of an answer.",
            boundaries=_BETWEEN,
            tag_keys=_TAGS,
        )
        self._engine = metrics.Gauge(
            "s2ft_engine", "What the engine tells of itself, by name.", tag_keys=("figure",)
        )

        self._events = metrics.Counter(
            "s2ft_adapter_events_total",
            "An adapter's hits and misses on the device, loads and evictions.",
            tag_keys=(*_TAGS, "event"),
        )
        self._bytes = metrics.Gauge(
            "s2ft_adapter_bytes",
            "What an adapter takes of a tier's memory.",
            tag_keys=(*_TAGS, "tier"),
        )
        self._held: set[tuple[AdapterKey, Tier]] = set()

    def first_token(self, request: ServedRequest, seconds: float) -> None:
        """Count the time from a request's arrival to its first token."""
        self._first.observe(seconds, tags_of(request.route, request.tenant))

    def next_token(self, request: ServedRequest, seconds: float) -> None:
        """Count the time between two tokens of one answer."""
        self._next.observe(seconds, tags_of(request.route, request.tenant))

    def tokens(self, request: ServedRequest, usage: Usage) -> None:
        """Count a request's tokens once it is over, however it ended."""
        tags = tags_of(request.route, request.tenant)
        if usage.prompt_tokens:
            self._prompt.inc(usage.prompt_tokens, tags)
        if usage.completion_tokens:
            self._completion.inc(usage.completion_tokens, tags)

    def engine(self, stats: EngineStats) -> None:
        """Tell the engine's figures: hits, misses, loads, resident bytes, what runs and waits."""
        for figure in fields(stats):
            value = getattr(stats, figure.name)
            number = len(value) if isinstance(value, tuple) else value
            self._engine.set(number, {"figure": figure.name})

    def adapters(
        self,
        events: Mapping[tuple[AdapterKey, Event], int],
        memory: Mapping[tuple[AdapterKey, Tier], int],
    ) -> None:
        """Tell each adapter's new `events`, and its bytes at each place in `memory`."""
        for (key, event), count in events.items():
            self._events.inc(count, {**_owner_tags(key), "event": event})
        for key, tier in self._held - memory.keys():
            self._bytes.set(0, {**_owner_tags(key), "tier": tier})
        for (key, tier), size_bytes in memory.items():
            self._bytes.set(size_bytes, {**_owner_tags(key), "tier": tier})
        self._held = set(memory)


def _owner_tags(key: AdapterKey) -> dict[str, str]:
    """Return an adapter's tags; its tenant is the owner's, whoever asks for it."""
    return {"model": key.name, "version": key.version, "tenant": key.name.partition(".")[0]}
