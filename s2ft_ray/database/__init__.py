"""The service's own database: one for tenants, keys and jobs, SQLite or PostgreSQL.

    engine      opening, WAL, one writer at a time
    migrations  alembic: what the tables were and are; ``s2ft_alembic_version`` tells which

Invariant: an engine that `open_database` returned has this version's tables, whoever created them.
Rooms above describe their tables on `metadata` and add a revision for each change.
"""

from s2ft_ray.database.engine import default_url, metadata, open_database, reading, writing

__all__ = ["default_url", "metadata", "open_database", "reading", "writing"]
