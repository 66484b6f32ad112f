"""MLflow's webhooks: told of a change, the watcher looks at once, not at its next poll.

A delivery carries ``v1,<base64 of HMAC-SHA256>`` over its id, its time and its body.
Invariant: what a delivery says is not used. It can bring about a look at the registry and nothing
else, and only with a signature by the operator's secret that is some minutes old at most.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from s2ft_ray.errors import ConfigError
from s2ft_ray.serving.wire_errors import ApiError

_SIGNATURE, _TIME, _ID = "x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"
_VERSION = "v1"
_MAX_AGE_S = 300.0
_SHORTEST_SECRET = 16


class WebhookSecret:
    """What MLflow signs its deliveries with."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._clock = clock

    @classmethod
    def read(cls, path: str) -> "WebhookSecret":
        """Read the secret from a file. Raises ConfigError without one of some length."""
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"webhook_secret_file: {path} can't be read: {error}") from error
        if len(secret) < _SHORTEST_SECRET:
            raise ConfigError(
                f"webhook_secret_file: {path} has {len(secret)} bytes, a secret needs"
                f" {_SHORTEST_SECRET}; make one with `openssl rand -hex 32`"
            )
        return cls(secret)

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Raise ApiError 401 unless the secret's owner has sent `body` a short while ago."""
        sent_at, delivery = headers.get(_TIME, ""), headers.get(_ID, "")
        signed = f"{delivery}.{sent_at}.".encode() + body
        digest = hmac.new(self._secret, signed, hashlib.sha256).digest()
        wanted = f"{_VERSION},{base64.b64encode(digest).decode()}".encode()
        if not hmac.compare_digest(wanted, headers.get(_SIGNATURE, "").encode()):
            raise ApiError(401, "The webhook's signature isn't that of this service's secret")
        if not sent_at.isascii() or not sent_at.isdecimal():
            raise ApiError(401, "The webhook doesn't say when it was sent")
        if abs(self._clock() - int(sent_at)) > _MAX_AGE_S:
            raise ApiError(401, f"The webhook was sent more than {_MAX_AGE_S:.0f} s ago")
