"""What the ingress is told of a call that didn't go well: Ray's own responses, without Ray."""

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import (
    DeploymentBroadcastResponse,
    DeploymentResponse,
    DeploymentResponseGenerator,
)

from s2ft_ray.serving import handles
from s2ft_ray.serving.handles import BaseHandle, WatcherHandle
from s2ft_ray.serving.service import ReplicaLostError
from s2ft_ray.serving.wire_errors import ApiError

FULL = BackPressureError(num_queued_requests=3, max_queued_requests=3)
GONE = DeploymentUnavailableError(DeploymentID("Base", "s2ft"))


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "told by gRPC")


DEATHS = [
    ActorDiedError(),
    ActorUnavailableError("gone", b"\0" * 16),
    rpc_error(grpc.StatusCode.UNAVAILABLE),
    rpc_error(grpc.StatusCode.CANCELLED),
    asyncio.CancelledError(),
]


class Result:
    """What a replica answers: `items`, then `error`; or nothing at all where it is to hang."""

    def __init__(self, error: BaseException | None, *items: str) -> None:
        self.error, self.items, self.is_cancelled = error, list(items), False
        self.begun = asyncio.Event()

    async def get_async(self) -> str:
        self.begun.set()
        if self.error is None:
            await asyncio.sleep(60)
        else:
            raise self.error
        return ""

    async def __anext__(self) -> str:
        return self.items.pop(0) if self.items else await self.get_async()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A handle whose calls aren't assigned, because of an exception, or come to a result."""

    def __init__(self, assigned: Exception | Result, **options: Any) -> None:
        self.assigned, self.given = assigned, options
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def options(self, **options: Any) -> "Handle":
        other = Handle(self.assigned, **{**self.given, **options})
        other.calls = self.calls
        return other

    def __getattr__(self, name: str) -> "Handle":
        return self.options(method_name=name)

    def remote(self, *_: object) -> DeploymentResponse[Any] | DeploymentResponseGenerator[Any]:
        self.calls.append((self.given.pop("method_name"), self.given))
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if isinstance(self.assigned, Exception):
            future.set_exception(self.assigned)
        else:
            future.set_result(self.assigned)
        kind = DeploymentResponseGenerator if self.given.get("stream") else DeploymentResponse
        return kind(future, RequestMetadata(request_id="r", internal_request_id="i"))


async def ask(base: BaseHandle) -> list[Any]:
    return [item async for item in base.answer(None)]  # type: ignore[arg-type]


WATCHER_CALLS: list[Callable[[WatcherHandle], Awaitable[Any]]] = [
    lambda watcher: watcher.find(None),  # type: ignore[arg-type]
    lambda watcher: watcher.promote("acme.bot", 1, "champion"),
    lambda watcher: watcher.rollback("acme.bot", "champion"),
    lambda watcher: watcher.place("acme.bot", "champion", None),
    lambda watcher: watcher.wake(),
]


@pytest.mark.parametrize(("error", "status"), [(FULL, 429), (GONE, 503)])
def test_what_no_replica_takes_is_told_when_to_come_back(error: Exception, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        asyncio.run(ask(BaseHandle(Handle(error))))  # type: ignore[arg-type]
    assert refused.value.status == status
    assert refused.value.headers["Retry-After"]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_a_replica_that_died_is_lost_however_it_is_told(error: BaseException) -> None:
    async def lose(assigned: Exception | Result) -> None:
        with pytest.raises(ReplicaLostError):
            await ask(BaseHandle(Handle(assigned)))  # type: ignore[arg-type]

    async def lose_each() -> None:
        await lose(Result(error))
        if isinstance(error, Exception):
            await lose(error)

    asyncio.run(lose_each())


def test_a_fault_of_our_own_calls_is_no_dead_replica() -> None:
    error = rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED)
    for assigned in (error, Result(error)):
        with pytest.raises(grpc.aio.AioRpcError):
            asyncio.run(ask(BaseHandle(Handle(assigned))))  # type: ignore[arg-type]


def test_a_caller_that_leaves_cancels_its_call_and_is_no_lost_replica() -> None:
    async def leave() -> Result:
        result = Result(None)
        task = asyncio.create_task(ask(BaseHandle(Handle(result))))  # type: ignore[arg-type]
        await result.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ask(BaseHandle(Handle(Result(None))))  # type: ignore[arg-type]
        return result

    assert asyncio.run(leave()).is_cancelled


def test_a_stream_that_is_closed_cancels_its_call() -> None:
    async def close() -> Result:
        result = Result(None, "one", "two")
        items = BaseHandle(Handle(result)).answer(None)  # type: ignore[arg-type]
        assert await anext(items) == "one"
        await items.aclose()
        return result

    assert asyncio.run(close()).is_cancelled


@pytest.mark.parametrize("call", WATCHER_CALLS)
@pytest.mark.parametrize("error", [*DEATHS, FULL, GONE], ids=repr)
def test_a_watcher_that_is_away_is_told_as_such(
    call: Callable[[WatcherHandle], Awaitable[Any]], error: BaseException
) -> None:
    async def ask() -> list[Any]:
        told = [await call(WatcherHandle(Handle(Result(error))))]  # type: ignore[arg-type]
        if isinstance(error, Exception):
            told.append(await call(WatcherHandle(Handle(error))))  # type: ignore[arg-type]
        return told

    for told in asyncio.run(ask()):
        assert isinstance(told, ApiError)
        assert (told.status, told.headers) == (503, {"Retry-After": "2"})


@pytest.mark.parametrize("error", [*DEATHS, FULL, GONE], ids=repr)
def test_who_follows_the_catalog_outlives_the_watcher(error: BaseException) -> None:
    async def follow() -> None:
        watcher = WatcherHandle(Handle(Result(error)))  # type: ignore[arg-type]
        with pytest.raises((ReplicaLostError, ApiError)):
            await watcher.catalog(("", 0))

    asyncio.run(follow())


def test_answers_go_by_grpc_item_by_item() -> None:
    handle = Handle(GONE)
    with pytest.raises(ApiError):
        asyncio.run(ask(BaseHandle(handle)))  # type: ignore[arg-type]
    ((_, given),) = handle.calls
    assert given["stream"] is True
    assert given["_by_reference"] is False


async def no_replica() -> list[Any]:
    raise GONE


async def no_answer() -> list[Any]:
    await asyncio.sleep(60)
    return []


@pytest.mark.parametrize("results", [no_replica, no_answer])
def test_a_base_without_an_answer_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, results: Callable[[], Any]
) -> None:
    class Broadcasting(Handle):
        def broadcast(self, _name: str) -> DeploymentBroadcastResponse:
            return DeploymentBroadcastResponse(results(), None)

    monkeypatch.setattr(handles, "_ALL_TIMEOUT_S", 0.05)
    assert asyncio.run(BaseHandle(Broadcasting(GONE)).adapters()) == []  # type: ignore[arg-type]
