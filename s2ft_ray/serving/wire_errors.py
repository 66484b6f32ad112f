"""What goes back when a request can't be answered: OpenAI's error body and its HTTP status.

Invariant: every refusal is an ``ApiError``; its message names the value, the limit and the way out,
and never carries a key, a path or a traceback.
"""

from collections.abc import Mapping
from typing import Any

MODEL_NOT_FOUND = "model_not_found"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal as the client sees it. Survives pickling: replicas raise it too."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self.args

    @property
    def headers(self) -> dict[str, str]:
        """What belongs beside the body: when to come back, and whether to."""
        if self.status == 504:  # OpenAI's SDK would have all that work done twice more
            return {"x-should-retry": "false"}
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, round(self.retry_after_s)))}
        return {}

    def body(self) -> dict[str, Any]:
        """Return ``{"error": {message, type, param, code}}``."""
        return error_body(self.status, self.message, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of an error with `status`."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, default)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_not_found(model: str, reason: str = "") -> ApiError:
    """Return the 404 of a model that isn't there, or isn't the caller's to see."""
    shown = model if len(model) <= 200 else model[:200] + "..."
    why = f": {reason}" if reason else ""
    return ApiError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it{why};"
        " GET /v1/models lists what this key may call",
        param="model",
        code=MODEL_NOT_FOUND,
    )


def describe_faults(faults: list[Mapping[str, Any]]) -> ApiError:
    """Turn pydantic's or FastAPI's faults into one 400 that names the first and counts the rest."""
    first = faults[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no valid JSON: {first['ctx']['error']}")
    param = _param_of(location)
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
    elif first["type"] == "missing" and param is None:
        message = "The request has no JSON body; send one with Content-Type: application/json"
    elif first["type"] == "missing":
        message = f"You must provide {param}"
    elif param is None:
        message = "The body must be a JSON object, sent with Content-Type: application/json"
    else:
        text = str(first["msg"]).removeprefix("Value error, ")
        message = f"{param}: {text[0].lower()}{text[1:]}"
    if len(faults) > 1:
        message += f" (and {len(faults) - 1} more faults)"
    return ApiError(400, message, param=param)


def _param_of(location: list[str]) -> str | None:
    # a union's members are named in the location too: str, list[int], function-plain[...]
    names = [part for part in location if part.isidentifier() or part.isdigit()]
    names = [part for part in names if part not in ("str", "int", "constrained")]
    return ".".join(names) or None


def _rebuild(
    status: int, message: str, param: str | None, code: str | None, retry_after_s: float | None
) -> ApiError:
    return ApiError(status, message, param=param, code=code, retry_after_s=retry_after_s)
