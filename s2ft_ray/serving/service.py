"""What the ingress does with a request: who asks, which version answers, how it is bounded.

Invariant: a request is sent to a replica again only while nothing of its answer has gone out; a
stream that breaks later ends with an error event, never with a wrong or silent end.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from s2ft_ray.accounts import Principal, Tenant
from s2ft_ray.registry import AliasMove, ModelRef
from s2ft_ray.serving.bodies import Identity, event
from s2ft_ray.serving.catalog import Catalog
from s2ft_ray.serving.limits import TenantLimits
from s2ft_ray.serving.routes import Route, ServedRequest, tags_of
from s2ft_ray.serving.schemas import ChatRequest, CompletionRequest
from s2ft_ray.serving.settings import ServingSettings
from s2ft_ray.serving.wire_errors import ApiError, model_not_found

log = logging.getLogger("ray.serve")
T = TypeVar("T")
_RETRY_PAUSES_S = (0.0, 0.2, 1.0, 3.0)
_PROBE_S = 2.0
_PROBE_TIMEOUT_S = 5.0
_SILENCE_S = 15.0
"""A base that answers nothing for so long, pings included, is not healthy."""
_FIRST_CATALOG_S = 60.0
"""The watcher may be starting, too."""


class ReplicaLostError(Exception):
    """The replica that held a request died."""


class BaseClient(Protocol):
    """A base's replicas, seen from the ingress."""

    def answer(self, served: ServedRequest) -> AsyncGenerator[str | ApiError]:
        """Yield the body, or server-sent events where the request streams.

        Raises ReplicaLostError, ApiError where the queue is full.
        """

    async def ping(self) -> None:
        """Raise unless a replica answers and its engine works."""

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what each replica holds of each adapter."""


class WatcherClient(Protocol):
    """The watcher, seen from the ingress."""

    async def catalog(self, after: tuple[str, int]) -> Catalog:
        """Return the catalog once it is another than `after`."""

    async def find(self, ref: ModelRef) -> Route | str | ApiError:
        """Return the route to one version, why there is none, or why nobody can tell."""

    async def promote(self, name: str, version: int, alias: str) -> AliasMove | ApiError:
        """Move an alias."""

    async def rollback(self, name: str, alias: str) -> AliasMove | ApiError:
        """Move an alias back."""

    async def place(self, name: str, alias: str, placement: str | None) -> ApiError | None:
        """Say how an alias is kept on the replicas."""

    async def wake(self) -> ApiError | None:
        """Have it look at the registry now."""


class Counts(Protocol):
    """Who is told how requests end."""

    def ended(self, tags: dict[str, str], status: int, seconds: float) -> None:
        """Count a request."""

    def running(self, count: int) -> None:
        """Tell how many requests are at work."""

    def retried(self) -> None:
        """Count a request that is sent again."""


@dataclass(frozen=True)
class Caller:
    """Who a request comes from."""

    principal: Principal
    tenant: Tenant
    request_id: str


class Service:
    """Answers requests from one catalog at a time."""

    def __init__(
        self,
        settings: ServingSettings,
        bases: Mapping[str, BaseClient],
        watcher: WatcherClient,
        counts: Counts,
    ) -> None:
        self._settings = settings
        self._bases = bases
        self._watcher = watcher
        self._counts = counts
        self._limits = TenantLimits()
        self._catalog = Catalog()
        self._was_told = asyncio.Event()
        """Whether the watcher has told what the registry holds, or why it can't be read."""
        self._running = 0
        self._heard = dict.fromkeys(bases, -_SILENCE_S)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow the catalog and to probe the bases; wait a while for the first catalog.

        Serve sends requests once this is over: they wait where they would be refused.
        """
        self._tasks = [asyncio.create_task(self._follow())]
        self._tasks += [asyncio.create_task(self._probe(base_id)) for base_id in self._bases]
        with suppress(TimeoutError):
            await asyncio.wait_for(self._was_told.wait(), _FIRST_CATALOG_S)

    async def stop(self) -> None:
        """End what `start` began."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def models(self, caller: Caller) -> list[dict[str, Any]]:
        """Return what the caller may call. Raises ApiError 503 before the registry was read."""
        if not self._catalog.is_ready:
            reason = self._catalog.problem or "the first pass over it is under way"
            raise ApiError(503, f"The registry hasn't been read yet: {reason}", retry_after_s=2)
        return self._catalog.listing(caller.principal)

    def model(self, model_id: str, caller: Caller) -> dict[str, Any]:
        """Return one model that the caller may call. Raises ApiError 404."""
        for listed in self.models(caller):
            if listed["id"] == model_id:
                return listed
        raise model_not_found(model_id)

    def unhealthy(self) -> list[str]:
        """Return the bases that don't answer."""
        now = time.monotonic()
        return [base_id for base_id, heard in self._heard.items() if now - heard > _SILENCE_S]

    async def whole(self, request: CompletionRequest | ChatRequest, caller: Caller) -> str:
        """Return the body of an answer. Raises ApiError."""
        async with aclosing(self._answer(request, caller)) as texts:
            return "".join([text async for text in texts])

    async def stream(
        self, request: CompletionRequest | ChatRequest, caller: Caller
    ) -> AsyncIterator[str]:
        """Return an answer's server-sent events once the first is there. Raises ApiError."""
        texts = self._answer(request, caller)
        try:
            first = await anext(texts)
        except BaseException:
            await texts.aclose()
            raise
        return self._go_on(first, texts, caller)

    async def promote(self, name: str, version: int, alias: str, caller: Caller) -> AliasMove:
        """Move an alias of the caller's own model. Raises ApiError."""
        self._check_owner(name, caller)
        return _or_raise(await self._watcher.promote(name, version, alias))

    async def rollback(self, name: str, alias: str, caller: Caller) -> AliasMove:
        """Move an alias of the caller's own model back. Raises ApiError."""
        self._check_owner(name, caller)
        return _or_raise(await self._watcher.rollback(name, alias))

    async def place(self, name: str, alias: str, placement: str | None) -> None:
        """Say how an alias is kept on the replicas. Raises ApiError."""
        _or_raise(await self._watcher.place(name, alias, placement))

    async def wake(self) -> None:
        """Have the registry looked at now. Raises ApiError."""
        _or_raise(await self._watcher.wake())

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what the replicas hold, by base, and the live adapters that none of them holds."""
        held = [
            {"base": base_id, **adapter}
            for base_id, base in self._bases.items()
            for adapter in await base.adapters()
        ]
        known = {(adapter["name"], adapter["version"]) for adapter in held}
        return held + [
            {
                "base": route.base_id,
                "replica": None,
                "name": key.name,
                "version": int(key.version),
                "fingerprint": key.fingerprint,
                "tier": "registry",
                "bytes": None,
                "running": 0,
                "placement": None,
                "last_used": None,
                "requests_per_minute": 0,
            }
            for key, route in self._catalog.live().items()
            if (key.name, int(key.version)) not in known
        ]

    def _check_owner(self, name: str, caller: Caller) -> None:
        principal = caller.principal
        if not principal.is_operator and principal.tenant != name.partition(".")[0]:
            raise model_not_found(name)

    async def _go_on(
        self, first: str, texts: AsyncGenerator[str], caller: Caller
    ) -> AsyncGenerator[str]:
        try:
            yield first
            async for text in texts:
                yield text
        except ApiError as error:
            log.warning("request %s broke off: %s", caller.request_id, error)
            yield event(error.body())
        finally:
            await texts.aclose()

    async def _answer(
        self, request: CompletionRequest | ChatRequest, caller: Caller
    ) -> AsyncGenerator[str]:
        started, status = time.monotonic(), 499  # nginx's number for a client that left
        tags = self._tags(request.model, caller)
        self._running += 1
        self._counts.running(self._running)
        try:
            with self._limits.admitted(caller.tenant):
                deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
                async with asyncio.timeout_at(deadline):
                    route = await self._route(request.model, caller)
                tags = tags_of(route, caller.tenant.name)
                served = _bind(request, route, caller)
                async with aclosing(self._retrying(served)) as texts:
                    while True:
                        async with asyncio.timeout_at(deadline):
                            text = await anext(texts, None)
                        if text is None:
                            break
                        yield text
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except TimeoutError:
            status = 504
            limit = self._settings.request_timeout_s
            raise ApiError(
                504, f"The answer wasn't whole after {limit:g} s; ask for less"
            ) from None
        except Exception:
            status = 500
            raise
        finally:
            self._running -= 1
            self._counts.running(self._running)
            self._counts.ended(tags, status, time.monotonic() - started)

    def _tags(self, model_id: str, caller: Caller) -> dict[str, str]:
        """Return what a request counts under before it is admitted: no made-up name."""
        tags = {"model": "", "version": "", "tenant": caller.tenant.name}
        with suppress(ApiError):
            found = self._catalog.resolve(model_id, caller.principal)
            if isinstance(found, Route):
                return tags_of(found, caller.tenant.name)
            tags["model"] = found.name
        return tags

    async def _retrying(self, served: ServedRequest) -> AsyncGenerator[str]:
        base = self._bases[served.route.base_id]
        for pause_s in _RETRY_PAUSES_S:
            await asyncio.sleep(pause_s)
            has_begun = False
            try:
                async with aclosing(base.answer(served)) as items:
                    async for item in items:
                        text = _or_raise(item)
                        self._hear(served.route.base_id)
                        has_begun = True
                        yield text
                return
            except ReplicaLostError as error:
                if has_begun and not served.request.stream:
                    return  # it was whole
                log.warning("request %s: its replica died: %s", served.request_id, error)
                if has_begun:
                    raise ApiError(
                        503, "The replica died in the middle of the answer; send the request again"
                    ) from None
                self._counts.retried()
        raise ApiError(503, "No replica could answer; send the request again", retry_after_s=5)

    async def _route(self, model_id: str, caller: Caller) -> Route:
        found = self._catalog.resolve(model_id, caller.principal)
        if isinstance(found, Route):
            return found
        looked_up = await self._watcher.find(found)
        if isinstance(looked_up, str):
            raise model_not_found(model_id, looked_up)
        return _or_raise(looked_up)

    def _hear(self, base_id: str) -> None:
        self._heard[base_id] = time.monotonic()

    async def _follow(self) -> None:
        seen = self._catalog.revision
        while True:
            try:
                catalog = await self._watcher.catalog(seen)
                seen = catalog.revision
                # a watcher that was restarted knows nothing before its first pass
                if catalog.is_ready or not self._catalog.is_ready:
                    self._catalog = catalog.keeping(self._catalog)
                else:
                    self._catalog = replace(self._catalog, problem=catalog.problem)
                if catalog.is_ready or catalog.problem is not None:
                    self._was_told.set()
            except Exception as error:  # noqa: BLE001 - the watcher is being restarted
                log.warning("the catalog can't be followed now: %r", error)
                await asyncio.sleep(1.0)

    async def _probe(self, base_id: str) -> None:
        while True:
            with suppress(Exception):
                await asyncio.wait_for(self._bases[base_id].ping(), _PROBE_TIMEOUT_S)
                self._hear(base_id)
            await asyncio.sleep(_PROBE_S)


def _bind(request: CompletionRequest | ChatRequest, route: Route, caller: Caller) -> ServedRequest:
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    identity = Identity(
        f"{kind}-{uuid.uuid4().hex}", int(time.time()), request.model, route.fingerprint
    )
    return ServedRequest(request, route, identity, caller.request_id, caller.tenant.name)


def _or_raise(found: T | ApiError) -> T:
    if isinstance(found, ApiError):
        raise found
    return found
