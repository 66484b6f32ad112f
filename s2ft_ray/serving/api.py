"""The HTTP interface: OpenAI's endpoints over a `Service`.

Invariant: every reply has an x-request-id; every refusal has OpenAI's error body; who asks is known
before the body is read.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import Field
from starlette.exceptions import HTTPException

from s2ft_ray.serving.access import Access, require_operator
from s2ft_ray.serving.boundary import WEBHOOK_PATH, Boundary, error_response
from s2ft_ray.serving.exposition import read_metrics
from s2ft_ray.serving.schemas import ChatRequest, CompletionRequest, Wire
from s2ft_ray.serving.service import Caller, Service
from s2ft_ray.serving.webhooks import WebhookSecret
from s2ft_ray.serving.wire_errors import ApiError, describe_faults

_JSON = "application/json"
_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Alias = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]


class ErrorDetail(Wire):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Wire):
    """OpenAI's error body."""

    error: ErrorDetail


class Promotion(Wire):
    """Which version an alias is to point to."""

    version: int = Field(ge=1, lt=10**9)
    alias: Alias = "champion"


class Place(Wire):
    """How an alias is kept on the replicas; null: as it comes and goes."""

    placement: Literal["warm", "pinned", "dedicated"] | None
    alias: Alias = "champion"


class Rollback(Wire):
    """Which alias goes back to where it stood."""

    alias: Alias = "champion"


async def _caller(request: Request) -> Caller:  # async: a plain one is sent to a thread
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


Asking = Annotated[Caller, Depends(_caller)]
_KEYED = [Depends(HTTPBearer(auto_error=False, description="An API key"))]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "A refusal"},
    "5XX": {"model": ErrorBody, "description": "A failure"},
}


def build_api(
    service: Service,
    access: Access,
    webhooks: WebhookSecret | None = None,
    *,
    sends_id: bool = True,
) -> FastAPI:
    """Return the ASGI application; `sends_id`: no proxy in front adds x-request-id."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    api = FastAPI(
        title="s2ft_ray", version=version("s2ft-ray"), lifespan=lifespan, responses=_ERRORS
    )
    _add_openai(api, service)
    _add_operation(api, service)
    _add_webhook(api, service, webhooks)
    api.add_exception_handler(ApiError, _refuse)
    api.add_exception_handler(RequestValidationError, _refuse_invalid)
    api.add_exception_handler(HTTPException, _refuse_http)
    api.add_middleware(Boundary, access=access, sends_id=sends_id)
    return api


def _add_openai(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models", dependencies=_KEYED)
    async def list_models(caller: Asking) -> dict[str, Any]:
        """List the bases and adapters that the key may call."""
        return {"object": "list", "data": service.models(caller), "has_more": False}

    @api.get("/v1/models/{model:path}", dependencies=_KEYED)
    async def retrieve_model(
        model: Annotated[str, Path(max_length=512)], caller: Asking
    ) -> dict[str, Any]:
        """Return one of them."""
        return service.model(model, caller)

    @api.post("/v1/completions", dependencies=_KEYED)
    async def complete(body: CompletionRequest, caller: Asking) -> Response:
        """Continue a text."""
        return await _answer(service, body, caller)

    @api.post("/v1/chat/completions", dependencies=_KEYED)
    async def chat(body: ChatRequest, caller: Asking) -> Response:
        """Answer a conversation."""
        return await _answer(service, body, caller)


def _add_operation(api: FastAPI, service: Service) -> None:
    @api.post("/v1/models/{model}/promote", dependencies=_KEYED)
    async def promote(model: str, body: Promotion, caller: Asking) -> dict[str, Any]:
        """Point an alias of an own model at a version."""
        move = await service.promote(model, body.version, body.alias, caller)
        return {"model": move.name, "alias": move.alias, "version": move.version,
                "before": move.before}  # fmt: skip

    @api.post("/v1/models/{model}/rollback", dependencies=_KEYED)
    async def rollback(model: str, body: Rollback, caller: Asking) -> dict[str, Any]:
        """Point an alias of an own model back at where it stood."""
        move = await service.rollback(model, body.alias, caller)
        return {"model": move.name, "alias": move.alias, "version": move.version,
                "before": move.before}  # fmt: skip

    @api.post("/v1/models/{model}/place", dependencies=_KEYED)
    async def place(model: str, body: Place, caller: Asking) -> dict[str, Any]:
        """Keep what an alias points to warm, pinned or alone on its base: an operator's."""
        require_operator(caller.principal)
        await service.place(model, body.alias, body.placement)
        return {"model": model, "alias": body.alias, "placement": body.placement}

    @api.get("/v1/adapters", dependencies=_KEYED)
    async def list_adapters(caller: Asking) -> dict[str, Any]:
        """List what the replicas hold: an operator's."""
        require_operator(caller.principal)
        return {"object": "list", "data": await service.adapters(), "has_more": False}

    @api.get("/metrics", dependencies=_KEYED)
    async def metrics(caller: Asking) -> Response:
        """Return the service's Prometheus metrics: an operator's."""
        require_operator(caller.principal)
        return Response(await read_metrics(), media_type="text/plain; version=0.0.4")

    @api.get("/healthz")
    async def healthz() -> JSONResponse:
        """Tell whether every base answers."""
        silent = service.unhealthy()
        if silent:
            message = f"no answer from {', '.join(silent)}"
            return error_response(ApiError(503, message, retry_after_s=5))
        return JSONResponse({"status": "ok"})


def _add_webhook(api: FastAPI, service: Service, secret: WebhookSecret | None) -> None:
    @api.post(WEBHOOK_PATH)
    async def hear(request: Request) -> dict[str, Any]:
        """Take a signed delivery of MLflow's: the registry is looked at now."""
        if secret is None:
            raise ApiError(404, "This service takes no webhooks; set webhook_secret_file")
        secret.check(request.headers, await request.body())
        await service.wake()
        return {"status": "ok"}


async def _answer(
    service: Service, body: CompletionRequest | ChatRequest, caller: Caller
) -> Response:
    if body.stream:
        texts = await service.stream(body, caller)
        return StreamingResponse(texts, media_type="text/event-stream", headers=_SSE)
    return Response(await service.whole(body, caller), media_type=_JSON)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _refuse_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(describe_faults(list(error.errors())))


async def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.url.path[:200]} here",
        405: f"{request.method} isn't allowed on {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, message), error.headers)
