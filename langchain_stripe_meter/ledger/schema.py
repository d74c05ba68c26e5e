"""The ledger's tables. Times are Unix seconds (UTC), amounts exact decimal text, states the words of core/states.py."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    exists,
    func,
    select,
    text,
)

HEAD = "0004"
"""The newest migration that this version of the package knows."""

metadata = MetaData()

_BIG_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only under INTEGER


def _partial(name: str, *columns: str, where: str) -> Index:
    """An index of the rows that are ``where``."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


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
    Column("event_id", BigInteger),  # the meter event that it is part of
    Column("account", String(255), nullable=False, server_default=text("''")),  # "acct_…"; "" is the key's own
    Column("session", String(64)),  # digest of the session of a skipped run, in case its lead shall pay later
    Column("reads", String(20)),  # what of that lead would say who pays, in order: "email,name"
    Column("job", BigInteger),  # of what no run reported: the number of its id, see ledger/jobs.py
    _partial("readings_open", "id", where="state IN ('recorded', 'resolved')"),
    _partial("readings_held", "due", where="state = 'held'"),
    _partial("readings_sealed", "event_id", where="event_id IS NOT NULL"),
    _partial("readings_unclaimed", "session", where="session IS NOT NULL"),
    _partial("readings_of_jobs", "job", where="job IS NOT NULL"),
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
    Column("lease", Text),  # who is sending it: where/process/start/number, the fence against a late answer
    Column("lease_until", BigInteger),
    Column("first_unknown_at", BigInteger),
    Column("settled_at", BigInteger),
    Column("error", Text),
    Column("request_id", Text),
    Column("account", String(255), nullable=False, server_default=text("''")),
    Column("seen_value", Text),  # of a doubtful event: what Stripe's sum was when it was last looked at, and when
    Column("seen_at", BigInteger),
    Column("resent", Integer, nullable=False, server_default=text("0")),  # how often it got a new identifier
    _partial(  # from one customer and meter to the next, and of each what has been due for longest
        "events_pending", "account", "customer", "event_name", "due", "id", where="state = 'pending'"
    ),
    _partial("events_due", "due", where="state = 'pending'"),
    _partial("events_unknown", "first_unknown_at", where="state = 'pending' AND first_unknown_at IS NOT NULL"),
    _partial("events_sending", "account", "customer", "event_name", where="state = 'sending'"),
    _partial("events_attention", "state", where="state IN ('doubtful', 'rejected')"),
    _partial(  # what an error report of Stripe's may be about
        "events_delivered", "account", "event_name", "settled_at", where="state = 'delivered'"
    ),
    Index("events_minute", "customer", "at"),  # what Stripe's sum of a minute is held against
)

OPEN_READINGS = text("readings.state IN ('recorded', 'resolved')")
IS_PENDING, IS_SENDING = text("events.state = 'pending'"), text("events.state = 'sending'")
IS_DOUBTFUL = and_(events.c.state == "doubtful", text("events.state IN ('doubtful', 'rejected')"))
"""In the words of the partial indexes: of a value that is bound, SQLite does not know that an index has it, and would
read every row."""

leads = Table(
    "leads",
    metadata,
    Column("account", String(255), primary_key=True, server_default=text("''")),
    Column("session", String(255), primary_key=True),
    Column("email", Text),
    Column("name", Text),
    Column("phone", Text),
    Column("captured_at", BigInteger, nullable=False),  # or last asked for, to the day
)

payers = Table(  # to whom a lead's e-mail, name or phone led, for the spend limits; the person is not in it
    "payers",
    metadata,
    Column("digest", String(64), primary_key=True),  # keyed with this ledger's own secret, see ledger/resolving.py
    Column("account", String(255), nullable=False, server_default=text("''")),
    Column("customer", String(255), nullable=False),
    Column("at", BigInteger, nullable=False),
)

acts = Table(  # what a person, a webhook or a look at Stripe decided: re-timed, written off, cancelled, absent, ...
    "acts",
    metadata,
    Column("id", _BIG_ID, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("act", String(30), nullable=False),
    Column("subject", String(100), nullable=False),  # the identifier of the reading or event
    Column("detail", Text),
    Index("acts_subject", "subject"),
)
CANCEL_ASKED, CANCELLED, CANCEL_REFUSED = "cancel asked", "cancelled", "cancel refused"
WISHES = (CANCEL_ASKED, CANCELLED, CANCEL_REFUSED)
IS_CANCEL = acts.c.act.in_([CANCEL_ASKED, CANCELLED])
_wishes = acts.alias()
_LAST_WISH = (
    select(func.max(_wishes.c.id)).where(_wishes.c.subject == events.c.identifier)
    .where(_wishes.c.act.in_(WISHES)).correlate(events).scalar_subquery()
)  # fmt: skip
CANCELLED_AT = (
    select(acts.c.at)
    .where(acts.c.id == _LAST_WISH, IS_CANCEL)
    .correlate(events)
    .scalar_subquery()
    .label("cancelled_at")
)
"""When an event was cancelled, or was last asked to be; None where Stripe has refused that: a column for a query of
events."""

KNOWN_TO_STRIPE = "known to Stripe"
_known = exists(acts.c.id).where(acts.c.subject == events.c.identifier, acts.c.act == KNOWN_TO_STRIPE)
IS_CONTRADICTED = _known.label("is_contradicted")
"""Whether Stripe knew the event's identifier when it was sent again because Stripe was said to lack it: a column for a
query of events."""
ABSENT_AT_STRIPE = "absent at Stripe"
"""What is sent again under an identifier of which this was said, Stripe may know from before: see ``settle`` in
core/states.py."""

webhook_events = Table(  # Stripe's notifications that were taken in, each once
    "webhook_events",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("at", BigInteger, nullable=False),
)

pruned = Table(  # sums of what was pruned: amounts outlive their rows
    "pruned",
    metadata,
    Column("account", String(255), primary_key=True, server_default=text("''")),
    Column("event_name", String(100), primary_key=True),
    Column("customer", String(255), primary_key=True),  # "" for what nobody was to pay
    Column("day", BigInteger, primary_key=True),  # Unix seconds of its midnight, UTC
    Column("state", String(12), primary_key=True),
    Column("amount", Text, nullable=False),
    Column("readings", BigInteger, nullable=False),
)

notes = Table(  # facts about the ledger itself: its pin to live or test mode, why sending is paused
    "notes",
    metadata,
    Column("name", String(50), primary_key=True),
    Column("value", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
)
