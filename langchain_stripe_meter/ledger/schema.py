"""The ledger's tables. Times are Unix seconds (UTC), amounts exact decimal text, states the words of core/states.py."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, SmallInteger, String, Table, Text, text

HEAD = "0001"
"""The newest migration that this version of the package knows."""

metadata = MetaData()

_BIG_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only under INTEGER

readings = Table(
    "readings",
    metadata,
    Column("id", _BIG_ID, primary_key=True),
    Column("key", String(100), nullable=False, unique=True),
    Column("event_name", String(100), nullable=False),
    Column("customer", String(255)),
    Column("reference", Text),  # "email:…", "name:…", "phone:…" until it is resolved
    Column("value", Text),  # NULL: the amount is unknown, the reading is held
    Column("dimensions", Text),
    Column("at", BigInteger, nullable=False),
    Column("estimated", SmallInteger, nullable=False),
    Column("state", String(12), nullable=False),
    Column("reason", Text),
    Column("due", BigInteger),  # when a held reading is looked at again
    Column("tries", Integer, nullable=False, server_default=text("0")),
    Column("event_id", BigInteger),
    Index(
        "readings_open",
        "id",
        sqlite_where=text("state IN ('recorded', 'resolved')"),
        postgresql_where=text("state IN ('recorded', 'resolved')"),
    ),
    Index("readings_held", "due", sqlite_where=text("state = 'held'"), postgresql_where=text("state = 'held'")),
)

events = Table(
    "events",
    metadata,
    Column("id", _BIG_ID, primary_key=True),
    Column("identifier", String(100), nullable=False, unique=True),
    Column("event_name", String(100), nullable=False),
    Column("customer", String(255), nullable=False),
    Column("value", Text, nullable=False),
    Column("dimensions", Text),
    Column("at", BigInteger, nullable=False),
    Column("state", String(12), nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("due", BigInteger, nullable=False),
    Column("sent_at", BigInteger),
    Column("lease", Text),  # who is sending it: host/process/boot/number, the fence against a late answer
    Column("lease_until", BigInteger),
    Column("first_unknown_at", BigInteger),
    Column("settled_at", BigInteger),
    Column("error", Text),
    Column("request_id", Text),
    Index("events_pending", "id", sqlite_where=text("state = 'pending'"), postgresql_where=text("state = 'pending'")),
    Index(
        "events_sending",
        "customer",
        "event_name",
        sqlite_where=text("state = 'sending'"),
        postgresql_where=text("state = 'sending'"),
    ),
    Index(
        "events_attention",
        "state",
        sqlite_where=text("state IN ('doubtful', 'rejected')"),
        postgresql_where=text("state IN ('doubtful', 'rejected')"),
    ),
)

leads = Table(
    "leads",
    metadata,
    Column("session", String(255), primary_key=True),
    Column("email", Text),
    Column("name", Text),
    Column("phone", Text),
    Column("captured_at", BigInteger, nullable=False),
)

notes = Table(  # facts about the ledger itself: its pin to live or test mode, why sending is paused
    "notes",
    metadata,
    Column("name", String(50), primary_key=True),
    Column("value", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
)
