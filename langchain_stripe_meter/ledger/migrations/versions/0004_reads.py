"""What of its lead would say who pays for a skipped run: each source reads its own."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("readings", sa.Column("reads", sa.String(20)))
