"""The first ledger: readings, events, leads, notes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    op.create_table(
        "readings",
        sa.Column("id", _BIG_ID, primary_key=True),
        sa.Column("key", sa.String(100), nullable=False, unique=True),
        sa.Column("event_name", sa.String(100), nullable=False),
        sa.Column("customer", sa.String(255)),
        sa.Column("reference", sa.Text),
        sa.Column("value", sa.Text),
        sa.Column("dimensions", sa.Text),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("estimated", sa.SmallInteger, nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("due", sa.BigInteger),
        sa.Column("tries", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("event_id", sa.BigInteger),
    )
    _partial("readings_open", "readings", ["id"], "state IN ('recorded', 'resolved')")
    _partial("readings_held", "readings", ["due"], "state = 'held'")
    op.create_table(
        "events",
        sa.Column("id", _BIG_ID, primary_key=True),
        sa.Column("identifier", sa.String(100), nullable=False, unique=True),
        sa.Column("event_name", sa.String(100), nullable=False),
        sa.Column("customer", sa.String(255), nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("dimensions", sa.Text),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("due", sa.BigInteger, nullable=False),
        sa.Column("sent_at", sa.BigInteger),
        sa.Column("lease", sa.Text),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("first_unknown_at", sa.BigInteger),
        sa.Column("settled_at", sa.BigInteger),
        sa.Column("error", sa.Text),
        sa.Column("request_id", sa.Text),
    )
    _partial("events_pending", "events", ["id"], "state = 'pending'")
    _partial("events_sending", "events", ["customer", "event_name"], "state = 'sending'")
    _partial("events_attention", "events", ["state"], "state IN ('doubtful', 'rejected')")
    op.create_table(
        "leads",
        sa.Column("session", sa.String(255), primary_key=True),
        sa.Column("email", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("phone", sa.Text),
        sa.Column("captured_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "notes",
        sa.Column("name", sa.String(50), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
