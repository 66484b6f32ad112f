"""Tenants and API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables of the accounts."""
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("quota", sa.Integer, nullable=False),
        sa.Column("max_workers", sa.Integer),
        sa.Column("priority_cap", sa.Integer),
        sa.Column("max_queued", sa.Integer),
        sa.Column("data_roots", sa.JSON, nullable=False),
        sa.Column("max_concurrent_requests", sa.Integer),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("is_set", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63)),
        sa.Column("is_operator", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_api_keys_tenant"),
    )
