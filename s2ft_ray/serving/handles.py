"""Serve's handles as the ingress and the watcher use them: glue.

Invariant: a call that is left (its client went away, its time is up) is cancelled in the replica.
Requests go to a base by gRPC: by Ray's objects, a handle's default in the process that binds it, a
streamed token costs twice as much.
"""

from collections.abc import AsyncGenerator
from typing import Any, cast

from grpc import RpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from s2ft_ray.registry import AliasMove, ModelRef
from s2ft_ray.serving.catalog import Catalog
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.service import ReplicaLostError
from s2ft_ray.serving.wire_errors import ApiError

WATCHER = "Watcher"
"""The watcher's deployment."""
_ALL_TIMEOUT_S = 10.0
"""For an answer of every replica."""


class BaseHandle:
    """The replicas of one base."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._whole = handle.options(_by_reference=False)
        self._streams = self._whole.options(stream=True, response_serialization="pickle")

    async def whole(self, served: ServedRequest) -> str | ApiError:
        """Answer in one body. Raises ReplicaLostError, ApiError where the queue is full."""
        response = self._whole.whole.remote(served)
        try:
            return cast(str | ApiError, await response)
        except (RayActorError, RpcError) as error:
            raise ReplicaLostError(_first_line(error)) from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise _full(error) from error
        finally:
            response.cancel()  # of no effect on one that is over

    async def stream(self, served: ServedRequest) -> AsyncGenerator[str | ApiError]:
        """Answer in server-sent events. Raises what `whole` raises."""
        response = self._streams.stream.remote(served)
        try:
            async for item in response:
                yield item
        except (RayActorError, RpcError) as error:
            raise ReplicaLostError(_first_line(error)) from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise _full(error) from error
        finally:
            response.cancel()

    async def ping(self) -> None:
        """Raise unless a replica answers and its engine works."""
        await self._handle.ping.remote()

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what each replica holds of each adapter; one that is dying tells nothing."""
        asked = self._handle.broadcast("adapters")
        told = await asked.results_async(timeout_s=_ALL_TIMEOUT_S, return_exceptions=True)
        return [adapter for held in told if isinstance(held, list) for adapter in held]

    async def describe(self) -> Route:
        """Return the route to the base alone."""
        return cast(Route, await self._handle.describe.remote())

    async def check(self, route: Route) -> str | None:
        """Try an adapter and leave it warm; return what is wrong with it."""
        return cast(str | None, await self._handle.check.remote(route))

    async def release(self, key: AdapterKey) -> None:
        """Have every replica drop an adapter once no request uses it."""
        asked = self._handle.broadcast("release", key)
        await asked.results_async(timeout_s=_ALL_TIMEOUT_S, return_exceptions=True)


class WatcherHandle:
    """The watcher."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def catalog(self, after: tuple[str, int]) -> Catalog:
        """Return the catalog once it is another than `after`."""
        return cast(Catalog, await self._handle.catalog.remote(after))

    async def find(self, ref: ModelRef) -> Route | str | ApiError:
        """Return the route to one version, why there is none, or why nobody can tell."""
        return cast(Route | str | ApiError, await _answer_of(self._handle.find.remote(ref)))

    async def promote(self, name: str, version: int, alias: str) -> AliasMove | ApiError:
        """Move an alias."""
        moved = await _answer_of(self._handle.promote.remote(name, version, alias))
        return cast(AliasMove | ApiError, moved)

    async def place(self, name: str, alias: str, placement: str | None) -> ApiError | None:
        """Say how an alias is kept on the replicas."""
        placed = await _answer_of(self._handle.place.remote(name, alias, placement))
        return cast(ApiError | None, placed)

    async def wake(self) -> ApiError | None:
        """Have it look at the registry now."""
        return cast(ApiError | None, await _answer_of(self._handle.wake.remote()))

    async def rollback(self, name: str, alias: str) -> AliasMove | ApiError:
        """Move an alias back."""
        moved = await _answer_of(self._handle.rollback.remote(name, alias))
        return cast(AliasMove | ApiError, moved)


async def _answer_of(response: DeploymentResponse[Any]) -> Any:
    """Return the watcher's answer; an ApiError where it died or isn't there."""
    try:
        return await response
    except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
        reason = _first_line(error)
        return ApiError(
            503, f"The watcher of the registry is being restarted: {reason}", retry_after_s=2
        )
    finally:
        response.cancel()  # of no effect on one that is over


def _full(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        message = "Too many requests are waiting for this model; come back in a moment"
        return ApiError(429, message, code="queue_full", retry_after_s=2)
    return ApiError(503, "This model's replicas can't be started now", retry_after_s=30)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
