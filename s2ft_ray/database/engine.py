"""Opening the database, and transactions on it.

Readers never wait; writers take turns from the first statement on, so that what one has read is
still true when it writes, and none fails in its middle because another one came first. SQLite, in
WAL mode with full durability, does so by BEGIN IMMEDIATE, PostgreSQL by an advisory lock.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from s2ft_ray.config import s2ft_home
from s2ft_ray.errors import ConfigError

# Who waits for its turn longer fails, and its caller tries again.
_BUSY_TIMEOUT_S = 30
_VERSION_TABLE = "s2ft_alembic_version"
_MIGRATIONS = Path(__file__).parent / "migrations"
# One number for everybody who writes: PostgreSQL lets one of them in at a time.
_WRITER_LOCK = 7_302_517
# A connection whose packets are lost is given up on both sides after a minute at most: else we wait
# a quarter of an hour, and the server keeps the writers' lock for a client that is gone.
_POSTGRESQL = {
    "connect_timeout": 10,
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "options": f"-c lock_timeout={_BUSY_TIMEOUT_S}s -c idle_in_transaction_session_timeout=60s",
}

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""The tables of all rooms."""


def default_url() -> str:
    """Return ``$S2FT_DATABASE_URL``, else the URL of the home's file ``scheduler.db``."""
    return os.environ.get("S2FT_DATABASE_URL") or f"sqlite:///{s2ft_home() / 'scheduler.db'}"


def open_database(url: str | None = None) -> Engine:
    """Open the database at an SQLAlchemy `url` (None: `default_url`), with today's tables.

    Creates or migrates them. Raises ConfigError where the URL is none, the database can't be
    reached, or its tables are of a newer version than this package.
    """
    try:
        target = make_url(url or default_url())
    except ArgumentError as error:
        raise ConfigError(
            f"database {url!r}: no SQLAlchemy URL; write sqlite:////path/to.db or"
            " postgresql+psycopg://user@host/name"
        ) from error
    try:
        engine = _build_engine(target)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"database {target.render_as_string(hide_password=True)}: its driver isn't installed"
            f" ({error}); pip install 's2ft-ray[postgresql]'"
        ) from error
    try:
        if engine.dialect.name == "sqlite" and target.database:
            Path(target.database).parent.mkdir(parents=True, exist_ok=True)
        _migrate(engine)
    except (OperationalError, OSError) as error:
        engine.dispose()
        cause = getattr(error, "orig", None) or error
        raise ConfigError(
            f"database {target.render_as_string(hide_password=True)}: can't be opened"
            f" ({' '.join(str(cause).split())}); check the path or that the server runs"
        ) from error
    except ConfigError:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Give a connection that sees one consistent state."""
    with engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Give a connection whose work is committed at the end, all or nothing."""
    with engine.connect() as connection:
        connection = connection.execution_options(s2ft_writes=True)
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
            yield connection


def _build_engine(url: URL) -> Engine:
    if url.drivername == "postgresql":  # as everybody else writes it
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "postgresql":
        ours = {key: value for key, value in _POSTGRESQL.items() if key not in url.query}
        return create_engine(url, pool_pre_ping=True, connect_args=ours)
    if url.get_backend_name() != "sqlite":
        raise ConfigError(
            f"database {url.render_as_string(hide_password=True)}: {url.get_backend_name()} isn't"
            " supported; use SQLite or PostgreSQL"
        )
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late
    _enter_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Wait for our turn, as SQLite itself doesn't: of two who open a new file one fails at once."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("s2ft_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    # alembic takes a fifth of a second to import: only who opens a database pays it
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    # it tells each step at INFO, under the level of whoever runs us
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    with writing(engine) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": _VERSION_TABLE})
        current = context.get_current_revision()
        if current is not None and current not in known:
            raise ConfigError(
                f"database {engine.url.render_as_string(hide_password=True)}: its tables are of"
                f" revision {current}, newer than this package knows; update s2ft-ray, or name"
                " another database"
            )
        if current != script.get_current_head():
            config.attributes.update(connection=connection, version_table=_VERSION_TABLE)
            command.upgrade(config, "head")
