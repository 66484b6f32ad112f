"""Tenants and keys in the database."""

import difflib
import time
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    Row,
    String,
    Table,
    insert,
    select,
    update,
)

from s2ft_ray.accounts.keys import ApiKey, NewKey, Principal, generate, key_id_of, matches
from s2ft_ray.accounts.keys import hash_secret as hashed
from s2ft_ray.accounts.tenants import Tenant
from s2ft_ray.database import metadata, open_database, reading, writing
from s2ft_ray.errors import ConfigError

_TENANTS = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("quota", Integer, nullable=False),
    Column("max_workers", Integer),
    Column("priority_cap", Integer),
    Column("max_queued", Integer),
    Column("data_roots", JSON, nullable=False),
    Column("max_concurrent_requests", Integer),
    Column("requests_per_minute", Integer),
    Column("created_at", Float, nullable=False),
    # by an operator; else it came with its first job, while no tenant was set
    Column("is_set", Boolean, nullable=False),
)
_KEYS = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("tenant", ForeignKey("tenants.name")),
    Column("is_operator", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)


class Accounts:
    """The tenants and keys of one database. Safe to use from many threads."""

    def __init__(self, url: str | None = None) -> None:
        """Open the database at an SQLAlchemy `url`, None: the default one.

        Raises ConfigError where it can't be opened.
        """
        self._engine = open_database(url)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def tenants(self) -> list[Tenant]:
        """Return every tenant, by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(_TENANTS).order_by(_TENANTS.c.name)).all()
        return [_to_tenant(row) for row in rows]

    def tenant(self, name: str) -> Tenant:
        """Return one tenant. Raises ConfigError where there is none of that name."""
        with reading(self._engine) as connection:
            found = _find_tenant(connection, name)
        if found is None:
            known = [tenant.name for tenant in self.tenants()]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ConfigError(f"tenant {name}: unknown; {hint}s2ft tenants set {name} adds it")
        return found

    def set_tenant(self, name: str, **changes: Any) -> Tenant:
        """Add a tenant or change what `changes` names of it; the fields of `Tenant`.

        Raises ConfigError for a value that can't be; nothing is changed then.
        """
        with writing(self._engine) as connection:
            found = _find_tenant(connection, name)
            before = found.model_dump() if found else {"name": name}
            tenant = Tenant.parse(**{**before, **changes})
            values = {**tenant.model_dump(mode="json"), "is_set": True}
            if found:
                connection.execute(update(_TENANTS).where(_TENANTS.c.name == name).values(values))
            else:
                connection.execute(insert(_TENANTS).values(**values, created_at=time.time()))
        return tenant

    def welcome(self, name: str) -> Tenant:
        """Return a tenant that submits a job.

        While no operator has set any tenant, everybody is one, with the defaults. From the first
        `set_tenant` on raises ConfigError for a name that is unknown.
        """
        with writing(self._engine) as connection:
            if found := _find_tenant(connection, name):
                return found
            if connection.execute(select(_TENANTS.c.name).where(_TENANTS.c.is_set)).first() is None:
                tenant = Tenant.parse(name=name)
                values = {**tenant.model_dump(mode="json"), "is_set": False}
                connection.execute(insert(_TENANTS).values(**values, created_at=time.time()))
                return tenant
        return self.tenant(name)  # tells what is known

    def create_key(self, tenant: str | None, operator: bool = False) -> NewKey:
        """Make an API key of a tenant, or an operator's. Its secret is never shown again.

        Raises ConfigError for an unknown tenant, or a key of nobody.
        """
        if tenant is None and not operator:
            raise ConfigError("a key needs a tenant, or to be an operator's")
        if tenant is not None:
            self.tenant(tenant)
        key_id, secret = generate()
        key = ApiKey(key_id, tenant, operator, time.time(), None)
        with writing(self._engine) as connection:
            connection.execute(
                insert(_KEYS).values(
                    id=key.id,
                    secret_sha256=hashed(secret),
                    tenant=tenant,
                    is_operator=operator,
                    created_at=key.created_at,
                )
            )
        return NewKey(key, secret)

    def keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Return the keys, oldest first: all, or those of one tenant."""
        query = select(_KEYS).order_by(_KEYS.c.created_at, _KEYS.c.id)
        if tenant is not None:
            query = query.where(_KEYS.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_to_key(row) for row in connection.execute(query)]

    def revoke_key(self, key_id: str) -> ApiKey:
        """Make a key invalid from now on; repeating it changes nothing.

        Raises ConfigError where there is no such key.
        """
        this = _KEYS.c.id == key_id
        with writing(self._engine) as connection:
            live = update(_KEYS).where(this, _KEYS.c.revoked_at.is_(None))
            connection.execute(live.values(revoked_at=time.time()))
            row = connection.execute(select(_KEYS).where(this)).first()
        if row is None:
            raise ConfigError(f"key {key_id}: there is none; s2ft keys list shows the ids")
        return _to_key(row)

    def authenticate(self, secret: str) -> Principal | None:
        """Return whom a secret stands for; None where it is unknown, malformed or revoked."""
        key_id = key_id_of(secret)
        if key_id is None:
            return None
        with reading(self._engine) as connection:
            row = connection.execute(select(_KEYS).where(_KEYS.c.id == key_id)).first()
        if row is None or not matches(secret, row.secret_sha256) or row.revoked_at is not None:
            return None
        return Principal(row.id, row.tenant, row.is_operator)


def _find_tenant(connection: Connection, name: str) -> Tenant | None:
    row = connection.execute(select(_TENANTS).where(_TENANTS.c.name == name)).first()
    return None if row is None else _to_tenant(row)


def _to_tenant(row: Row[Any]) -> Tenant:
    values = dict(row._mapping)
    del values["created_at"], values["is_set"]
    return Tenant(**values)


def _to_key(row: Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.tenant, row.is_operator, row.created_at, row.revoked_at)
