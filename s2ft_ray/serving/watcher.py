"""Follows the registry: what an alias points to becomes live once it has proven itself.

    seen -> fetched -> checked on a replica (fingerprint, base, canary) -> warm -> live -> released

Invariant: a version that hasn't passed its checks is in no catalog, and the last good one stays
live instead. What can't be read now changes nothing of what is live.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from s2ft_ray.errors import AdapterError, ConfigError, JobError, S2FTError
from s2ft_ray.registry import (
    REJECTED_TAG,
    AliasedModel,
    AliasMove,
    ModelRef,
    list_models,
    note_accepted,
    note_rejected,
    note_served,
    place,
    promote,
    resolve_adapter,
    rollback,
)
from s2ft_ray.serving.catalog import Catalog, CatalogModel
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route

log = logging.getLogger("ray.serve")
_RELEASE_AFTER_S = 30.0
"""Ingresses take a new catalog at once; a request that was bound before may still be on its way."""
_REJECTED_S = 60.0
"""A rejected version is tried again after this: its fault may have been the replica's."""
_LONG_POLL_S = 10.0
_GATHER_S = 0.05
"""Changes come in bursts (a tag, then the alias): one look is enough for them."""
_CHECK_TIMEOUT_S = 120.0
"""A replica that hasn't checked a version after this is asked again later, beside all others."""
_DESCRIBE_TIMEOUT_S = 5.0
_AT_ONCE = 4
_MAX_PINNED = 4096


class Base(Protocol):
    """What is asked of a base's replicas here."""

    async def describe(self) -> Route:
        """Return the route to the base alone."""

    async def check(self, route: Route) -> str | None:
        """Try an adapter and leave it warm; return what is wrong with it."""

    async def release(self, key: AdapterKey) -> None:
        """Drop an adapter once no request uses it."""


class RejectedError(AdapterError):
    """A version that takes no traffic, and why."""


class Watcher:
    """Keeps the catalog. One event loop; MLflow's calls run in threads."""

    def __init__(self, bases: dict[str, Base], tracking_uri: str, poll_s: float) -> None:
        self._bases = bases
        self._uri = tracking_uri
        self._poll_s = poll_s
        self._epoch = uuid.uuid4().hex[:8]
        self._catalog = Catalog((self._epoch, 0))
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._rejected: dict[tuple[str, int], tuple[float, str]] = {}
        self._pinned: dict[tuple[str, int], Route] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._releases: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follow the registry for ever."""
        while True:
            started = time.monotonic()
            try:
                await self.look()
            except Exception:  # the loop's edge: the next look may succeed
                log.exception("looking at the registry failed")
            # a pass over thousands of models takes its time: leave the registry alone for longer
            pause_s = max(self._poll_s, 4 * (time.monotonic() - started))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)
            await asyncio.sleep(_GATHER_S)
            self._wake.clear()

    async def catalog(self, after: tuple[str, int]) -> Catalog:
        """Return the catalog once it is another than `after`, or after some seconds."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._catalog.revision != after), _LONG_POLL_S
                )
        return self._catalog

    async def find(self, ref: ModelRef) -> Route:
        """Return the route to one version, checked.

        Raises AdapterError (RejectedError where it failed its checks) or JobError.
        """
        assert ref.version is not None
        known = self._pinned.get((ref.name, ref.version))
        return known or await self._accept(ref.name, ref.version)

    async def promote(self, name: str, version: int, alias: str) -> AliasMove:
        """Move an alias, and look at once."""
        move = await asyncio.to_thread(promote, name, version, alias, self._uri)
        self._wake.set()
        return move

    async def rollback(self, name: str, alias: str) -> AliasMove:
        """Move an alias back, and look at once."""
        move = await asyncio.to_thread(rollback, name, alias, self._uri)
        self._wake.set()
        return move

    async def place(self, name: str, alias: str, placement: str | None) -> None:
        """Say how an alias is kept on the replicas, and look at once."""
        await asyncio.to_thread(place, name, alias, placement, self._uri)
        self._wake.set()

    def wake(self) -> None:
        """Look at once: somebody knows of a change."""
        self._wake.set()

    async def look(self) -> None:
        """Take one look at the registry, and make live what is new and good."""
        missing = self._bases.keys() - self._catalog.bases.keys()
        found = await asyncio.gather(*map(self._describe, sorted(missing)))
        new = {route.base_id: route for route in found if route is not None}
        if new:
            await self._publish(bases={**self._catalog.bases, **new})
        if not self._catalog.bases:
            return
        try:
            models = await asyncio.to_thread(list_models, self._uri)
        except JobError as error:
            await self._publish(problem=error.faults[0])
            return
        updated = await asyncio.gather(*map(self._try_update, models))
        gone = self._catalog.models.keys() - {model.name for model in models}
        kept = {name: model for name, model in self._catalog.models.items() if name not in gone}
        kept.update((model.name, model) for model in updated if model is not None)
        await self._publish(models=kept, is_ready=True, problem=None)

    async def _describe(self, base_id: str) -> Route | None:
        """Return the route to a base; None where it hasn't come up, which holds up no other."""
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                return await self._bases[base_id].describe()
        except Exception as error:  # noqa: BLE001 - whatever a replica that can't start says
            log.info("%s isn't up yet: %r", base_id, error)
            return None

    async def _try_update(self, model: AliasedModel) -> CatalogModel | None:
        try:
            return await self._update(model)
        except Exception:  # a model's edge: what is wrong with one holds up no other
            log.exception("looking at %s failed", model.name)
            return self._catalog.models.get(model.name)

    async def _update(self, model: AliasedModel) -> CatalogModel:
        before = self._catalog.models.get(model.name) or CatalogModel(model.name)
        live, rejected, waiting = {}, {}, {}
        for alias, version in model.aliases.items():
            known = before.live.get(alias)
            if known is not None and _version(known) == version:
                live[alias] = known
                continue
            try:
                live[alias] = await self._accept(model.name, version)
            except (AdapterError, ConfigError) as error:
                rejected[alias] = f"version {version}: {error}"
                last_good = known or await self._last_good(model, alias)
                if last_good is not None:
                    live[alias] = last_good
            except JobError as error:  # the registry left while we looked: the next look tries
                log.warning("%s: %s", model.name, error)
                if known is not None:
                    live[alias] = known
                else:
                    waiting[alias] = f"version {version}: {error}"
            if alias in live and _version(live[alias]) == version:
                await self._note(note_served, model.name, alias, version)
                log.info("%s@%s is version %d now", model.name, alias, version)
                # live at once, not only when the whole pass is over
                await self._publish_model(before, model, alias, live[alias])
        return CatalogModel(
            model.name, model.shared_with, live, rejected, model.placements, waiting
        )

    async def _last_good(self, model: AliasedModel, alias: str) -> Route | None:
        version = model.served.get(alias)
        if version is None:
            return None
        try:
            return await self._accept(model.name, version)
        except (AdapterError, ConfigError, JobError):
            return None

    async def _accept(self, name: str, version: int) -> Route:
        """Fetch, check and warm one version. Raises RejectedError and what the registry raises."""
        if (name, version) in self._pinned:
            return self._pinned[name, version]
        since, fault = self._rejected.get((name, version), (-_REJECTED_S, None))
        if fault is not None and time.monotonic() - since < _REJECTED_S:
            raise RejectedError(fault)
        async with self._slots:
            route, is_marked = await asyncio.to_thread(self._fetch, name, version)
            fault = await self._check(route)
        if fault is not None:
            self._rejected[name, version] = (time.monotonic(), fault)
            log.warning("%s:%d takes no traffic: %s", name, version, fault)
            await self._note(note_rejected, name, version, fault)
            raise RejectedError(fault)
        if self._rejected.pop((name, version), None) or is_marked:
            await self._note(note_accepted, name, version)
        if len(self._pinned) >= _MAX_PINNED:
            self._pinned.clear()
        self._pinned[name, version] = route
        return route

    async def _check(self, route: Route) -> str | None:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                return await self._bases[route.base_id].check(route)
        except Exception as error:  # a replica that died says nothing about the adapter
            reason = getattr(error, "cause", error)  # Ray wraps what a replica raises
            told = str(reason) if isinstance(reason, S2FTError) else repr(reason)
            raise JobError(f"{route.adapter}: can't be checked now: {told}"[:300]) from error

    def _fetch(self, name: str, version: int) -> tuple[Route, bool]:
        """Return the route to a version, and whether it is marked as rejected."""
        found = resolve_adapter(f"{name}:{version}", self._uri)
        base_fingerprint = found.tags.get("base_fingerprint")
        for base_id, base in self._catalog.bases.items():
            if base.fingerprint == base_fingerprint:
                key = AdapterKey(name, str(version), found.fingerprint)
                folder = str(found.folder)
                template = _chat_template(folder)
                route = Route(base_id, found.fingerprint, key, folder, template, time.time())
                return route, REJECTED_TAG in found.tags
        missing = self._bases.keys() - self._catalog.bases.keys()
        if missing:  # it may be of one of them
            raise JobError(f"{name}: {', '.join(sorted(missing))} hasn't come up yet")
        raise RejectedError(f"its base {found.tags.get('base')} isn't served here")

    async def _note(self, note: Callable[..., None], *facts: object) -> None:
        try:
            await asyncio.to_thread(note, *facts, self._uri)
        except JobError as error:  # a note for people; what it says holds without it
            log.warning("%s", error)

    async def _publish_model(
        self, before: CatalogModel, model: AliasedModel, alias: str, route: Route
    ) -> None:
        if not self._catalog.is_ready:
            return
        current = self._catalog.models.get(model.name) or before
        changed = replace(
            current, shared_with=model.shared_with, live={**current.live, alias: route}
        )
        await self._publish(models={**self._catalog.models, model.name: changed})

    async def _publish(self, **changes: object) -> None:
        changed = replace(self._catalog, **changes)  # type: ignore[arg-type]
        if changed == self._catalog:
            return
        old = self._catalog
        self._catalog = replace(changed, revision=(self._epoch, old.revision[1] + 1))
        live = changed.live()
        for key, route in old.live().items():
            if key not in live:
                self._pinned.pop((key.name, int(key.version)), None)
                task = asyncio.create_task(self._release(key, route.base_id))
                self._releases.add(task)
                task.add_done_callback(self._releases.discard)
        async with self._changed:
            self._changed.notify_all()

    async def _release(self, key: AdapterKey, base_id: str) -> None:
        await asyncio.sleep(_RELEASE_AFTER_S)
        if key in self._catalog.live():
            return  # rolled back to meanwhile
        try:
            await self._bases[base_id].release(key)
        except Exception:  # the replica's own eviction gets it
            log.warning("%s: can't be released", key, exc_info=True)


def _version(route: Route) -> int:
    assert route.adapter is not None
    return int(route.adapter.version)


def _chat_template(folder: str) -> str | None:
    try:
        document = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        template = ((document.get("training") or {}).get("data") or {}).get("chat_template")
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise AdapterError("its adapter_config.json is missing or damaged") from error
    except OSError as error:
        raise JobError(f"its adapter_config.json can't be read now: {error.strerror}") from error
    return template if isinstance(template, str) else None
