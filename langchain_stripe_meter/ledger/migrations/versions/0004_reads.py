"""What of its lead would say who pays for a skipped run, for each source reads its own; and the readings of one job."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("readings", sa.Column("reads", sa.String(20)))
    op.add_column("readings", sa.Column("job", sa.BigInteger))
    known = sa.text("job IS NOT NULL")
    op.create_index("readings_of_jobs", "readings", ["job"], sqlite_where=known, postgresql_where=known)
