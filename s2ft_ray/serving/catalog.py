"""What can be called, by whom: the bases, and the live version of every alias.

Invariant: a catalog is a value. The ingress answers a request from one catalog, so no request sees
half of a change; an alias points to a version that has passed its checks, or isn't in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from s2ft_ray.accounts import Principal
from s2ft_ray.errors import ConfigError
from s2ft_ray.registry import EVERYONE, ModelRef, parse_ref
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route
from s2ft_ray.serving.wire_errors import ApiError, model_not_found

DEFAULT_ALIAS = "champion"


@dataclass(frozen=True)
class CatalogModel:
    """One registered model that can be called."""

    name: str
    shared_with: frozenset[str] = frozenset()
    """Tenants beside the owner; ``*``: everyone."""
    live: Mapping[str, Route] = field(default_factory=dict)
    """By alias."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """By alias: why its newest version takes no traffic."""
    placements: Mapping[str, str] = field(default_factory=dict)
    """By alias: how its live version is kept on the replicas."""
    waiting: Mapping[str, str] = field(default_factory=dict)
    """By alias: why its version couldn't be checked yet; it is tried again."""

    @property
    def tenant(self) -> str:
        """The owner."""
        return self.name.partition(".")[0]

    def is_visible_to(self, principal: Principal) -> bool:
        """Tell whether a key may know of the model."""
        if principal.is_operator or principal.tenant == self.tenant:
            return True
        return EVERYONE in self.shared_with or principal.tenant in self.shared_with


@dataclass(frozen=True)
class Catalog:
    """The whole of it, as the watcher saw it last."""

    revision: tuple[str, int] = ("", 0)
    """The watcher that made it, and how many it had made before."""
    is_ready: bool = False
    """Whether the registry has been read once."""
    bases: Mapping[str, Route] = field(default_factory=dict)
    models: Mapping[str, CatalogModel] = field(default_factory=dict)
    problem: str | None = None
    """Why the registry can't be read now; what is known goes on being served."""

    def resolve(self, model_id: str, principal: Principal) -> Route | ModelRef:
        """Find what `model_id` names: a route, or a version that the watcher has to look up.

        Raises ApiError: 404 for what isn't there or isn't the caller's, 503 where the registry
        can't tell.
        """
        if model_id in self.bases:
            return self.bases[model_id]
        try:
            ref = parse_ref(model_id)
        except ConfigError:
            raise model_not_found(model_id) from None
        if model_id != str(ref):  # models:/... is MLflow's way to write it, not this API's
            raise model_not_found(model_id)
        if not self.is_ready:
            raise self._unknown_yet(model_id)
        model = self.models.get(ref.name)
        if model is None or not model.is_visible_to(principal):
            if self.problem is not None and principal.tenant in (None, ref.name.partition(".")[0]):
                raise self._unknown_yet(model_id)
            raise model_not_found(model_id)
        if ref.version is not None:
            for route in model.live.values():
                if route.adapter is not None and route.adapter.version == str(ref.version):
                    return route
            return ref
        alias = ref.alias or DEFAULT_ALIAS
        if alias not in model.live:
            if alias in model.waiting:
                raise self._unknown_yet(model_id, model.waiting[alias])
            raise self._not_live(model_id, model, alias)
        return model.live[alias]

    def keeping(self, before: "Catalog") -> "Catalog":
        """Return this catalog with what `before` has of what can't be looked at now.

        A watcher that was restarted while a base was away knows neither of that base nor of its
        adapters; requests for them wait for the base, as they did.
        """
        models = dict(self.models)
        for name, model in self.models.items():
            known = before.models.get(name)
            kept = {} if known is None else {it: known.live.get(it) for it in model.waiting}
            live = {alias: route for alias, route in kept.items() if route is not None}
            if live:
                waiting = {it: why for it, why in model.waiting.items() if it not in live}
                models[name] = replace(model, live={**model.live, **live}, waiting=waiting)
        return replace(self, bases={**before.bases, **self.bases}, models=models)

    def live(self) -> dict[AdapterKey, Route]:
        """Return the routes of all aliases, by adapter."""
        return {
            route.adapter: route
            for model in self.models.values()
            for route in model.live.values()
            if route.adapter is not None
        }

    def placed(self, base_id: str) -> dict[AdapterKey, tuple[Route, str]]:
        """Return the live adapters of a base that have a placement, sorted by name.

        A base can be dedicated to one: where several are to be, the others are pinned.
        """
        found: dict[AdapterKey, tuple[Route, str]] = {}
        is_dedicated = False
        for _, model in sorted(self.models.items()):
            for alias, placement in sorted(model.placements.items()):
                route = model.live.get(alias)
                if route is None or route.adapter is None or route.base_id != base_id:
                    continue
                if placement == "dedicated" and is_dedicated:
                    placement = "pinned"
                is_dedicated |= placement == "dedicated"
                found[route.adapter] = (route, placement)
        return found

    def _not_live(self, model_id: str, model: CatalogModel, alias: str) -> ApiError:
        if alias in model.rejected:
            return model_not_found(
                model_id, f"its version takes no traffic, {model.rejected[alias]}"
            )
        known = ", ".join(sorted(model.live)) or "none"
        return model_not_found(model_id, f"no alias {alias}, there is {known}")

    def _unknown_yet(self, model_id: str, reason: str | None = None) -> ApiError:
        reason = reason or self.problem or "it has not been read yet"
        return ApiError(
            503,
            f"The model `{model_id}` can't be looked up in the registry now: {reason}",
            param="model",
            code="registry_unavailable",
            retry_after_s=5,
        )

    def listing(self, principal: Principal) -> list[dict[str, Any]]:
        """Return what the key may call, as OpenAI's model objects: bases, then adapters."""
        listed = [
            _model_object(base_id, route, owner="s2ft") for base_id, route in self.bases.items()
        ]
        for name, model in sorted(self.models.items()):
            if not model.is_visible_to(principal):
                continue
            aliases = sorted(model.live, key=lambda alias: (alias != DEFAULT_ALIAS, alias))
            for alias in aliases:
                route = model.live[alias]
                shown = name if alias == DEFAULT_ALIAS else f"{name}@{alias}"
                listed.append(_model_object(shown, route, owner=model.tenant))
        return listed


def _model_object(model_id: str, route: Route, owner: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": model_id,
        "object": "model",
        "created": int(route.created_at),
        "owned_by": owner,
        "fingerprint": route.fingerprint,
    }
    if route.adapter is not None:
        shown |= {"version": route.adapter.version, "base": route.base_id}
    return shown
