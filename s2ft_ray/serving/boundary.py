"""The outermost layer of every request: its id, its size, who asks, and what may not get out.

Invariant: nothing that a request does ends in a traceback for the client; keys are in no log.
"""

import logging
import re
import time
import uuid
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2ft_ray.serving.access import Access
from s2ft_ray.serving.service import Caller
from s2ft_ray.serving.wire_errors import ApiError

log = logging.getLogger("ray.serve")
MAX_BODY_BYTES = 8 * 2**20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
WEBHOOK_PATH = "/v1/webhooks/mlflow"
_OPEN = (WEBHOOK_PATH, "/healthz", "/openapi.json", "/docs", "/redoc")


class Boundary:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp, access: Access, sends_id: bool) -> None:
        """Without `sends_id` a proxy in front gives requests and replies their id."""
        self._app = app
        self._access = access
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        named = headers.get("x-request-id", "")
        request_id = named if _REQUEST_ID.match(named) else uuid.uuid4().hex
        reply = _Reply(send, request_id if self._sends_id else None)
        started, tenant = time.monotonic(), None
        try:
            if scope["path"] not in _OPEN:
                principal, limits = await self._access.identify(headers.get("authorization"))
                tenant = limits.name
                scope.setdefault("state", {})["caller"] = Caller(principal, limits, request_id)
            await self._app(scope, _Bounded(receive, headers), reply)
        except ApiError as error:
            await self._fail(error, scope, receive, reply)
        except Exception:
            log.exception("request %s failed", request_id)
            message = f"The request failed inside the server; its id is {request_id}"
            await self._fail(ApiError(500, message), scope, receive, reply)
        finally:
            log.info(
                "request_id=%s tenant=%s method=%s path=%s status=%s seconds=%.3f",
                *(request_id, tenant, scope["method"], scope["path"][:200], reply.status),
                time.monotonic() - started,
            )

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        if reply.status is None:
            await error_response(error)(scope, receive, reply)


class _Reply:
    """Sends, with the request's id where nobody else adds it."""

    def __init__(self, send: Send, request_id: str | None) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._request_id is not None:
                MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


class _Bounded:
    """Receives, up to the most that a body may have."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self._num_bytes = 0
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
            raise _too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        return message


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error as OpenAI has it."""
    return JSONResponse(
        error.body(), status_code=error.status, headers={**(headers or {}), **error.headers}
    )


def _too_large() -> ApiError:
    return ApiError(413, f"The body is above {MAX_BODY_BYTES} bytes; send a shorter prompt")
