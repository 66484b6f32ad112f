"""The Ray Serve application: an ingress that speaks OpenAI, a watcher, and each base's replicas.

    client -> Serve's proxy -> Ingress -> Replica of the base -> Engine
                                  ^ catalog
                               Watcher <- MLflow's aliases

`build_app` is what `s2ft serve` runs and what deploy/serve.yaml names as its ``import_path``.
Invariant: the deployments hold no code of their own beyond glue; each part is tested without Serve.
Every process of the application, and the one that starts it, imports this module: what only one of
them needs (MLflow, torch, transformers) is imported in that one.
"""

import asyncio
import re
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from s2ft_ray.accounts import Accounts
from s2ft_ray.errors import AdapterError, ConfigError, JobError
from s2ft_ray.registry import AliasMove, ModelRef
from s2ft_ray.serving.access import Access
from s2ft_ray.serving.api import build_api
from s2ft_ray.serving.catalog import Catalog
from s2ft_ray.serving.handles import WATCHER, BaseHandle, WatcherHandle
from s2ft_ray.serving.metrics import RequestMetrics
from s2ft_ray.serving.replica import Replica
from s2ft_ray.serving.routes import Route
from s2ft_ray.serving.service import Service
from s2ft_ray.serving.settings import BaseSettings, ServingSettings
from s2ft_ray.serving.webhooks import WebhookSecret
from s2ft_ray.serving.wire_errors import ApiError

APP_NAME = "s2ft"
_LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DRAIN_S = 120.0
"""Answers that are under way get so long when a replica is taken away."""


class WatcherDeployment:
    """The watcher as an actor. One: two would check everything twice."""

    def __init__(self, bases: dict[str, DeploymentHandle], settings: ServingSettings) -> None:
        from s2ft_ray.registry import default_tracking_uri
        from s2ft_ray.serving.watcher import Watcher

        uri = settings.tracking_uri or default_tracking_uri()
        handles = {base_id: BaseHandle(handle) for base_id, handle in bases.items()}
        self._watcher = Watcher(dict(handles), uri, settings.poll_s)
        self._following: asyncio.Task[None] | None = None

    async def catalog(self, after: tuple[str, int]) -> Catalog:
        """Return the catalog once it is another than `after`."""
        await self.check_health()
        return await self._watcher.catalog(after)

    async def find(self, ref: ModelRef) -> Route | str | ApiError:
        """Return the route to one version, why there is none, or why nobody can tell."""
        try:
            return await self._watcher.find(ref)
        except (AdapterError, ConfigError) as error:
            return " ".join(str(error).split())
        except JobError as error:
            return ApiError(503, f"`{ref}` can't be looked up now: {error}", retry_after_s=5)

    async def promote(self, name: str, version: int, alias: str) -> AliasMove | ApiError:
        """Move an alias."""
        try:
            return await self._watcher.promote(name, version, alias)
        except (AdapterError, ConfigError, JobError) as error:
            return _refused(error)

    async def rollback(self, name: str, alias: str) -> AliasMove | ApiError:
        """Move an alias back."""
        try:
            return await self._watcher.rollback(name, alias)
        except (AdapterError, ConfigError, JobError) as error:
            return _refused(error)

    async def place(self, name: str, alias: str, placement: str | None) -> ApiError | None:
        """Say how an alias is kept on the replicas."""
        try:
            await self._watcher.place(name, alias, placement)
        except (AdapterError, ConfigError, JobError) as error:
            return _refused(error)
        return None

    async def wake(self) -> None:
        """Look at the registry now."""
        self._watcher.wake()

    async def check_health(self) -> None:
        """Begin to follow the registry; raise where that has ended."""
        if self._following is None:
            self._following = asyncio.create_task(self._watcher.run())
        if self._following.done():
            self._following.result()


class Ingress:
    """The ASGI application in a replica."""

    def __init__(
        self,
        settings: ServingSettings,
        watcher: DeploymentHandle,
        bases: dict[str, DeploymentHandle],
    ) -> None:
        if settings.no_auth:
            _check_loopback()
        accounts = None if settings.no_auth else Accounts(settings.database_url)
        self._access = Access(accounts)
        path = settings.webhook_secret_file
        self._webhooks = None if path is None else WebhookSecret.read(path)
        self._service = Service(
            settings,
            {base_id: BaseHandle(handle) for base_id, handle in bases.items()},
            WatcherHandle(watcher),
            RequestMetrics(),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return what Serve mounts."""
        # Serve's proxy always adds x-request-id; a second one would reach clients as "id, id"
        return build_api(self._service, self._access, self._webhooks, sends_id=False)


def build_app(settings: ServingSettings) -> serve.Application:
    """Bind the deployments of a service."""
    bases = {base.model_id: _bind_base(base, settings) for base in settings.bases}
    watcher = serve.deployment(
        WatcherDeployment,
        name=WATCHER,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config=_LOGGING,
    ).bind(bases, settings)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.num_ingresses,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_S,
        logging_config=_LOGGING,
    )
    return ingress.bind(settings, watcher, bases)


def _bind_base(base: BaseSettings, settings: ServingSettings) -> serve.Application:
    options: dict[str, Any] = {"num_replicas": base.min_replicas}
    if base.max_replicas > base.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": base.min_replicas,
                "max_replicas": base.max_replicas,
                "target_ongoing_requests": base.target_requests,
            }
        }
    deployment = serve.deployment(
        Replica,
        name="Base-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", base.model_id),
        max_ongoing_requests=base.max_requests,
        max_queued_requests=base.max_queued,
        ray_actor_options={"num_cpus": base.num_cpus, "num_gpus": base.num_gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=_DRAIN_S,
        logging_config=_LOGGING,
        **options,
    )
    return deployment.bind(base, settings)


def _check_loopback() -> None:
    host = _get_global_client().http_config.host
    if host not in _LOOPBACK:
        raise ConfigError(
            f"no_auth: Serve listens on {host}, where others reach it; give keys"
            " (`s2ft keys create`), or set http_options.host to 127.0.0.1"
        )


def _refused(error: Exception) -> ApiError:
    message = " ".join(str(error).split())
    status = 503 if isinstance(error, JobError) else 400
    return ApiError(status, message, code="alias_not_moved")
