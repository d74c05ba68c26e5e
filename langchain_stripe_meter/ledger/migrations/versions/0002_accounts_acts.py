"""Connected accounts; leads that pay for what was skipped; acts, webhooks, payers, pruned sums."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _account(*, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column("account", sa.String(255), nullable=False, server_default=sa.text("''"), primary_key=primary_key)


def upgrade() -> None:
    op.add_column("readings", _account())
    op.add_column("readings", sa.Column("session", sa.String(64)))
    _partial("readings_sealed", "readings", ["event_id"], "event_id IS NOT NULL")
    _partial("readings_unclaimed", "readings", ["session"], "session IS NOT NULL")
    op.add_column("events", _account())
    op.add_column("events", sa.Column("seen_value", sa.Text))
    op.add_column("events", sa.Column("seen_at", sa.BigInteger))
    op.add_column("events", sa.Column("resent", sa.Integer, nullable=False, server_default=sa.text("0")))
    op.drop_index("events_sending", "events")
    _partial("events_sending", "events", ["account", "customer", "event_name"], "state = 'sending'")
    _partial("events_delivered", "events", ["account", "event_name", "settled_at"], "state = 'delivered'")
    op.create_index("events_minute", "events", ["customer", "at"])
    op.execute(
        "UPDATE readings SET event_id = (SELECT id FROM events WHERE identifier = readings.key) WHERE state = 'sealed'"
    )
    _remake_leads()
    op.create_table(
        "payers",
        sa.Column("digest", sa.String(64), primary_key=True),
        _account(),
        sa.Column("customer", sa.String(255), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "acts",
        sa.Column("id", _BIG_ID, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("act", sa.String(30), nullable=False),
        sa.Column("subject", sa.String(100), nullable=False),
        sa.Column("detail", sa.Text),
    )
    op.create_index("acts_subject", "acts", ["subject"])
    op.create_table(
        "webhook_events",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "pruned",
        _account(primary_key=True),
        sa.Column("event_name", sa.String(100), primary_key=True),
        sa.Column("customer", sa.String(255), primary_key=True),
        sa.Column("day", sa.BigInteger, primary_key=True),
        sa.Column("state", sa.String(12), primary_key=True),
        sa.Column("amount", sa.Text, nullable=False),
        sa.Column("readings", sa.BigInteger, nullable=False),
    )


def _remake_leads() -> None:
    """A session belongs to an account; SQLite cannot change a primary key in place."""
    op.execute("CREATE TABLE leads_before AS SELECT * FROM leads")
    op.drop_table("leads")
    op.create_table(
        "leads",
        _account(primary_key=True),
        sa.Column("session", sa.String(255), primary_key=True),
        sa.Column("email", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("phone", sa.Text),
        sa.Column("captured_at", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO leads (session, email, name, phone, captured_at)"
        " SELECT session, email, name, phone, captured_at FROM leads_before"
    )
    op.drop_table("leads_before")
