"""API keys: a public id and a secret of 256 random bits, of which the database holds the hash.

A key reads ``s2ft-<id>-<secret>``. The id finds the row, so that the secret's hash is compared once
and in constant time. Against 256 random bits a slow hash would add cost and no safety.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

_PREFIX = "s2ft"


@dataclass(frozen=True)
class ApiKey:
    """A key as it is listed: without its secret. Times are seconds since the epoch."""

    id: str
    tenant: str | None
    """None for an operator's key that belongs to no tenant."""
    is_operator: bool
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class NewKey:
    """A key as it is created: the only moment at which its secret exists."""

    key: ApiKey
    secret: str

    def __repr__(self) -> str:
        return f"NewKey(key={self.key!r}, secret='...')"


@dataclass(frozen=True)
class Principal:
    """Who a valid key stands for."""

    key_id: str
    tenant: str | None
    is_operator: bool


def generate() -> tuple[str, str]:
    """Return a new key's id and the whole secret text that its owner sends."""
    key_id = secrets.token_hex(6)
    return key_id, f"{_PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"


def key_id_of(secret: str) -> str | None:
    """Return the id that a secret names, None where it has not the form of one."""
    parts = secret.split("-", 2)
    if len(parts) != 3 or parts[0] != _PREFIX or not secret.isascii():
        return None
    return parts[1]


def hash_secret(secret: str) -> str:
    """Return what the database holds of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, stored_hash: str) -> bool:
    """Compare in a time that doesn't depend on where they differ."""
    return hmac.compare_digest(hash_secret(secret), stored_hash)
