"""Where a request goes: which adapter of which base answers it, and what travels there with it.

Invariant: a request is bound to one version as it comes in, and keeps it to its end, whatever
happens to the alias meanwhile.
"""

from dataclasses import dataclass

from s2ft_ray.serving.bodies import Identity
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Route:
    """One version of an adapter, or a base alone."""

    base_id: str
    fingerprint: str
    """Of the adapter, or of the base where it answers alone."""
    adapter: AdapterKey | None = None
    folder: str | None = None
    """Where the watcher found the adapter's files; another node may have to fetch them."""
    chat_template: str | None = None
    """What the adapter was trained with; None: the tokenizer's own."""
    created_at: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True)
class ServedRequest:
    """A request on its way to a replica."""

    request: CompletionRequest | ChatRequest
    route: Route
    identity: Identity
    request_id: str
    tenant: str
    """Whose key it came with; ``operator`` for an operator's."""


def tags_of(route: Route, tenant: str) -> dict[str, str]:
    """Return the metrics' tags of one model and tenant."""
    adapter = route.adapter
    if adapter is None:
        return {"model": route.base_id, "version": "", "tenant": tenant}
    return {"model": adapter.name, "version": adapter.version, "tenant": tenant}
