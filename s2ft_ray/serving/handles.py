"""Serve's handles as the ingress and the watcher use them: glue.

Invariant: a call that is left (its client went away, its time is up) is cancelled in the replica,
and one whose replica died is told from one that its caller left. Answers come by gRPC: by Ray's
objects, a handle's default in the process that binds it, a token costs twice as much. They come as
streams, the whole ones too, of one item: of a single reply by gRPC a replica's acceptance would be
a part.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import (
    DeploymentHandle,
    DeploymentResponse,
    DeploymentResponseGenerator,
)

from s2ft_ray.registry import AliasMove, ModelRef
from s2ft_ray.serving.catalog import Catalog
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.service import ReplicaLostError
from s2ft_ray.serving.wire_errors import ApiError

log = logging.getLogger("ray.serve")
WATCHER = "Watcher"
"""The watcher's deployment."""
_ALL_TIMEOUT_S = 10.0
"""For an answer of every replica."""
_LOST = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
"""gRPC's words for a replica that died or was ending; its others are faults of our own."""


class BaseHandle:
    """The replicas of one base."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._answers = handle.options(
            stream=True, _by_reference=False, response_serialization="pickle"
        )

    async def answer(self, served: ServedRequest) -> AsyncGenerator[str | ApiError]:
        """Yield the body, or server-sent events where the request streams.

        Raises ReplicaLostError, ApiError where the queue is full.
        """
        response = self._answers.answer.remote(served)
        try:
            with _faults():
                async for item in response:
                    yield item
        finally:
            _leave(response)

    async def ping(self) -> None:
        """Raise unless a replica answers and its engine works."""
        with _faults():
            await self._handle.ping.remote()

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what each replica holds of each adapter; one that is dying tells nothing.

        Nothing is told either where there is no replica, or one that doesn't answer in time.
        """
        try:
            asked = self._handle.broadcast("adapters")
            told = await asked.results_async(timeout_s=_ALL_TIMEOUT_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            log.warning("what the replicas hold can't be told now: %r", error)
            return []
        return [adapter for held in told if isinstance(held, list) for adapter in held]

    async def describe(self) -> Route:
        """Return the route to the base alone."""
        with _faults():
            return cast(Route, await self._handle.describe.remote())

    async def check(self, route: Route) -> str | None:
        """Try an adapter and leave it warm; return what is wrong with it."""
        with _faults():
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
        """Return the catalog once it is another than `after`. Raises ReplicaLostError, ApiError."""
        response = self._handle.catalog.remote(after)
        try:
            with _faults():
                return cast(Catalog, await response)
        finally:
            _leave(response)

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
        with _faults():
            return await response
    except (ReplicaLostError, ApiError) as error:
        reason = _first_line(error.__cause__ or error)
        return ApiError(
            503, f"The watcher of the registry is being restarted: {reason}", retry_after_s=2
        )
    finally:
        _leave(response)


def _leave(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """Have the replica end a call; of no effect on one that is over."""
    with suppress(Exception):  # what kept it from a replica is raised here a second time
        response.cancel()


@contextmanager
def _faults() -> Iterator[None]:
    """Turn Ray's and gRPC's faults of a call into ReplicaLostError, or ApiError without a queue."""
    try:
        yield
    except RayActorError as error:
        raise ReplicaLostError(_first_line(error)) from error
    except AioRpcError as error:
        if error.code() not in _LOST:
            raise
        raise ReplicaLostError(_first_line(error)) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # its connection was closed under it: who waits here hasn't left
        raise ReplicaLostError("the call was cancelled from outside") from error
    except (BackPressureError, DeploymentUnavailableError) as error:
        raise _full(error) from error


def _full(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        message = "Too many requests are waiting for this model; come back in a moment"
        return ApiError(429, message, code="queue_full", retry_after_s=2)
    return ApiError(503, "This model's replicas can't be started now", retry_after_s=30)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
