"""A base model's replica: the glue between Ray Serve and one engine.

Invariant: a request is answered by the adapter version that its route names, or refused. torch,
transformers and MLflow are imported where a replica is made: whoever puts the application together
imports this module too, and needs none of them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from s2ft_ray.errors import ConfigError, JobError, S2FTError, ServingError
from s2ft_ray.registry import list_kept
from s2ft_ray.serving.handles import WATCHER, WatcherHandle
from s2ft_ray.serving.metrics import TokenMetrics
from s2ft_ray.serving.placements import Placements, check_undedicated
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.settings import BaseSettings, ServingSettings
from s2ft_ray.serving.uses import Uses
from s2ft_ray.serving.wire_errors import ApiError

if TYPE_CHECKING:
    from s2ft_ray.method import Adapter

log = logging.getLogger("ray.serve")
_STATS_S = 5.0


class Replica:
    """One base in memory, with its engine. Methods are called through Serve's handle."""

    def __init__(self, base: BaseSettings, settings: ServingSettings) -> None:
        from s2ft_ray.bases import TRIAL_TURNS, load_base_model, load_tokenizer
        from s2ft_ray.method import base_fingerprint
        from s2ft_ray.serving.adapter_reader import AdapterReader
        from s2ft_ray.serving.canary import Canary
        from s2ft_ray.serving.engine import Engine
        from s2ft_ray.serving.generation import Generator
        from s2ft_ray.serving.prompts import Limits
        from s2ft_ray.serving.templates import TemplateRenderer

        self._base_id = base.model_id
        self._templates: dict[str, str] = {}
        self._uses = Uses()
        model = load_base_model(base.model)
        if base.num_gpus:
            model.to("cuda")
        self._fingerprint = base_fingerprint(model)
        tokenizer = load_tokenizer(base.model)
        self._canary = Canary(model)
        self._adapters = AdapterReader(
            self._base_id, self._fingerprint, settings.tracking_uri, settings.adapter_disk_bytes
        )
        self._engine = Engine(
            model,
            tokenizer,
            self._adapters.read,
            slot_bytes=base.adapter_slot_bytes,
            host_bytes=base.adapter_host_bytes,
            cache_tokens=base.cache_tokens,
            max_batch_tokens=base.max_batch_tokens,
            max_batch_requests=base.max_batch_requests,
            share_prefixes=base.share_prefixes,
        )
        self._engine.start()
        self._checking = asyncio.Lock()
        self._placements = Placements(
            self._engine, self._base_id, self._adapters.remember, self._checking
        )
        limits = Limits(
            context_tokens=self._engine.max_tokens,
            output_tokens=settings.max_output_tokens,
            vocab_size=int(model.config.get_text_config().vocab_size),
        )
        self._metrics = TokenMetrics()
        self._renderer = TemplateRenderer()
        self._try_template = partial(
            self._renderer.render,
            turns=TRIAL_TURNS,
            special_tokens=tokenizer.special_tokens_map,
            max_chars=limits.max_chars,
        )
        self._generator = Generator(
            self._engine, tokenizer, limits, self._metrics, self._renderer.render
        )
        self._loaded_at = time.time()
        self._tasks: list[asyncio.Task[None]] = []

    def describe(self) -> Route:
        """Return the route to the base alone."""
        return Route(self._base_id, self._fingerprint, created_at=self._loaded_at)

    def ping(self) -> None:
        """Raise where the engine is stuck or dead."""
        self._engine.check_health()

    async def answer(self, served: ServedRequest) -> AsyncGenerator[str | ApiError]:
        """Yield the body, or server-sent events; an ApiError is the last thing that comes."""
        try:
            prepared = await self._prepare(served)
            async with aclosing(self._generator.answer(prepared)) as texts:
                async for text in texts:
                    yield text
        except Exception as error:  # noqa: BLE001 - the request's edge: nothing but an answer leaves
            yield refusal(error, served)

    async def check(self, route: Route) -> str | None:
        """Try an adapter before it takes traffic, and leave it loaded; return what is wrong."""
        key = route.adapter
        assert key is not None
        try:
            self._adapters.remember(route)
            await self._template(route)
            adapter = await self._engine.fetch(key)
            await self._try(key, adapter)
        except (ServingError, JobError):
            raise  # of the engine, its memory or the registry: no fault of the adapter
        except S2FTError as error:
            await self.release(key)
            return " ".join(str(error).split())
        return None

    async def _try(self, key: AdapterKey, adapter: "Adapter") -> None:
        await self._placements.give_way(key)
        async with self._checking:
            if self._engine.dedicated == key:  # it has proven itself here, and is in the weights
                return
            check_undedicated(self._engine, key)
            merged = await asyncio.to_thread(self._canary.logprobs, adapter)
            served = await self._engine.score(self._canary.prompt_ids, key, 0)
        self._canary.compare(served, merged)

    async def release(self, key: AdapterKey) -> None:
        """Drop an adapter once no request uses it."""
        self._adapters.forget(key)
        self._engine.drop(key)

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what the engine holds of each adapter, and what lies on this node's disk."""
        now, replica = time.time(), serve.get_replica_context().replica_id.unique_id
        held = [
            {
                "replica": replica,
                "name": resident.key.name,
                "version": int(resident.key.version),
                "fingerprint": resident.key.fingerprint,
                "tier": resident.tier,
                "bytes": resident.size_bytes,
                "running": resident.num_running,
                "placement": self._placements.placement_of(resident.key),
                **self._uses.describe(resident.key, now),
            }
            for resident in self._engine.residents()
        ]
        in_memory = {(adapter["name"], adapter["version"]) for adapter in held}
        return held + [
            {
                "replica": replica,
                "name": kept.name,
                "version": kept.version,
                "fingerprint": None,
                "tier": "disk",
                "bytes": kept.size_bytes,
                "running": 0,
                "placement": None,
                "last_used": kept.wanted_at,
                "requests_per_minute": 0,
            }
            for kept in await asyncio.to_thread(list_kept)
            if kept.base_fingerprint == self._fingerprint
            and (kept.name, kept.version) not in in_memory
        ]

    async def check_health(self) -> None:
        """Raise where the engine is stuck or dead: Serve then replaces the replica."""
        self._engine.check_health()
        if not self._tasks:
            self._tasks = [asyncio.create_task(it) for it in (self._report(), self._follow())]

    async def __del__(self) -> None:
        self._engine.stop()
        self._renderer.close()

    async def _prepare(self, served: ServedRequest) -> ServedRequest:
        self._adapters.remember(served.route)
        await self._placements.give_way(served.route.adapter)
        if served.route.adapter is not None:
            self._uses.count(served.route.adapter, time.time())
        if served.route.chat_template is None:
            return served
        template = await self._template(served.route)
        return replace(served, route=replace(served.route, chat_template=template))

    async def _template(self, route: Route) -> str | None:
        """Return the Jinja text of the route's chat template, which may be a file's name.

        Raises ConfigError where it can't be read, or fails on a user's and an assistant's turn.
        """
        from s2ft_ray.bases import read_template

        wanted = route.chat_template
        if wanted is not None and wanted not in self._templates:
            text = await asyncio.to_thread(read_template, wanted)
            try:
                await asyncio.to_thread(self._try_template, text)
            except ConfigError as error:
                raise ConfigError(f"its chat template can't be used: {error}") from error
            self._templates[wanted] = text
        return None if wanted is None else self._templates[wanted]

    async def _follow(self) -> None:
        """Keep what the catalog says: the watcher's own, asked as the ingress asks it."""
        app, seen = serve.get_replica_context().app_name, ("", 0)
        watcher: WatcherHandle | None = None
        while True:
            try:
                if watcher is None:
                    watcher = WatcherHandle(serve.get_deployment_handle(WATCHER, app))
                catalog = await watcher.catalog(seen)
                seen = catalog.revision
                await self._placements.follow(catalog)
            except Exception as error:  # noqa: BLE001 - the watcher starts later, or again
                log.warning("the catalog can't be followed now: %r", error)
                await asyncio.sleep(2.0)

    async def _report(self) -> None:
        while True:
            self._metrics.engine(self._engine.stats())
            self._metrics.adapters(self._engine.events.take(), self._engine.memory())
            await asyncio.sleep(_STATS_S)


def refusal(error: Exception, served: ServedRequest) -> ApiError:
    """Return what a request is answered that ended with `error`."""
    if isinstance(error, ApiError):
        return error
    model = served.identity.model
    if isinstance(error, ConfigError):
        return ApiError(400, " ".join(str(error).split()))
    if isinstance(error, S2FTError | MemoryError):
        log.warning("request %s: %s", served.request_id, error)
        reason = " ".join(str(error).split()) or "it is out of memory"
        return ApiError(503, f"The model `{model}` can't answer now: {reason}", retry_after_s=5)
    log.exception("request %s failed", served.request_id)
    return ApiError(500, f"The request failed inside the server; its id is {served.request_id}")
