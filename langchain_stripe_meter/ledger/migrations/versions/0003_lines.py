"""What waits is found by customer and meter, by when it is due, and by since when its outcome is unknown."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_PENDING = "state = 'pending'"


def _partial(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "events", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    op.drop_index("events_pending", "events")
    _partial("events_pending", ["account", "customer", "event_name", "due", "id"], _PENDING)
    _partial("events_due", ["due"], _PENDING)
    _partial("events_unknown", ["first_unknown_at"], f"{_PENDING} AND first_unknown_at IS NOT NULL")
