"""Who asks: from the request's key to a principal and its tenant.

Invariant: a key is looked up by the accounts, never compared here, and is neither kept nor logged;
what is remembered for a moment is under its hash.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable

from s2ft_ray.accounts import Accounts, Principal, Tenant
from s2ft_ray.errors import ConfigError
from s2ft_ray.serving.wire_errors import ApiError

OPERATOR = Principal(key_id="none", tenant=None, is_operator=True)
OPERATOR_TENANT = Tenant(name="operator")
_REMEMBERED_S = 2.0
"""A revoked key is refused after this at the latest."""
_MAX_REMEMBERED = 4096


class Access:
    """Turns the Authorization header into a principal."""

    def __init__(
        self, accounts: Accounts | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without accounts everyone is an operator: for loopback alone."""
        self._accounts = accounts
        self._clock = clock
        self._known: dict[str, tuple[float, Principal, Tenant]] = {}

    async def identify(self, authorization: str | None) -> tuple[Principal, Tenant]:
        """Return who sends `authorization`. Raises ApiError 401, or 503 without the database."""
        if self._accounts is None:
            return OPERATOR, OPERATOR_TENANT
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise ApiError(
                401,
                "You didn't provide an API key; send it as Authorization: Bearer KEY"
                " (an operator makes one by `s2ft keys create`)",
            )
        digest = hashlib.sha256(secret.encode()).hexdigest()
        known = self._known.get(digest)
        if known is not None and known[0] > self._clock():
            return known[1], known[2]
        principal, tenant = await asyncio.to_thread(self._look_up, secret)
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[digest] = (self._clock() + _REMEMBERED_S, principal, tenant)
        return principal, tenant

    def _look_up(self, secret: str) -> tuple[Principal, Tenant]:
        assert self._accounts is not None
        try:
            principal = self._accounts.authenticate(secret)
            if principal is not None and principal.tenant is not None:
                return principal, self._accounts.tenant(principal.tenant)
        except ConfigError as error:
            raise ApiError(503, "The accounts can't be read now", retry_after_s=5) from error
        if principal is None:
            raise ApiError(
                401, "Incorrect API key provided, or a revoked one", code="invalid_api_key"
            )
        return principal, OPERATOR_TENANT


def require_operator(principal: Principal) -> None:
    """Raise ApiError 403 unless the key is an operator's."""
    if not principal.is_operator:
        raise ApiError(403, "This needs an operator's key (`s2ft keys create --operator`)")
