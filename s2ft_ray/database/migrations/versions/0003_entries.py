"""Entry penalties by resource, in resource-seconds.

They were seconds of the whole cluster, whose size nobody recorded: they are let go. Tenants that
wait are lifted again at the first decision, and the others' fade as all use does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Take the number for the mapping."""
    op.add_column("usages", sa.Column("entries", sa.JSON, nullable=False, server_default="{}"))
    op.drop_column("usages", "entry")
