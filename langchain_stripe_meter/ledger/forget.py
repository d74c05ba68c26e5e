"""Erasing a person: what names them goes, also from the database's files; what was consumed stays.

Usage that still waited for the person to be found becomes held without a name, for somebody to assign or write off, so
that no amount is lost. A ``cus_…`` id is Stripe's, and stays beside the amounts that were billed to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, func, or_, select, union, update

from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.core.references import By, Reference, normalise
from langchain_stripe_meter.core.states import Move, ReadingState, next_reading_state
from langchain_stripe_meter.core.tables import NotebookTable
from langchain_stripe_meter.core.tenants import session_digest
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.leads import LEAD_FIELDS
from langchain_stripe_meter.ledger.resolving import FOLDED, known_by, secret_of
from langchain_stripe_meter.ledger.schema import acts, leads, payers, pruned, readings
from langchain_stripe_meter.ledger.store import Ledger, write_act
from langchain_stripe_meter.reentry import inside

FORGOTTEN = "forgotten: whoever it was asked to be erased; assign it or write it off"
_TELLING = 6
"""Shorter texts occur by chance in a database's file, so it is not searched for them."""


@dataclass(frozen=True, slots=True)
class Forgotten(NotebookTable):
    """How many ``leads`` were erased, how many ``readings`` lost their name, how many other ``traces`` went.

    ``complete`` is False where the files may still hold the erased bytes; ``advice`` then says what to do. It also says
    so where nothing named the person, and how many readings carry a ``customer``'s id, which is Stripe's and stays.
    """

    leads: int
    readings: int
    traces: int
    complete: bool
    advice: str = ""


@dataclass(slots=True)
class _Person:
    """Everything by which the ledger may know somebody; ``names`` are those that only their leads tell, ``session`` is
    the one that was asked for, and ``sessions`` are all of theirs, each with its account."""

    references: set[Reference] = field(default_factory=set, repr=False)
    names: set[Reference] = field(default_factory=set, repr=False)
    session: str | None = field(default=None, repr=False)
    sessions: set[tuple[str, str]] = field(default_factory=set, repr=False)
    customer: str | None = None


def forget(
    ledger: Ledger,
    *,
    email: str | None = None,
    phone: str | None = None,
    name: str | None = None,
    session: str | None = None,
    customer: str | None = None,
    region: str | None = None,
) -> Forgotten:
    """Erase whoever has this e-mail, phone, name, session or customer, and what their leads tie to them.

    An e-mail is looked for without regard to upper and lower case, a session on every account. ``region`` (``"DE"``)
    is where a phone without a leading ``+`` is dialled.

    Raises ``ConfigurationError`` where nobody is named, ``LedgerError`` where the database cannot be written. Doing it
    again is harmless, and finishes what was incomplete.
    """
    named: dict[By, str | None] = {"email": email, "name": name, "phone": phone}
    person = _Person({Reference(by, normalise(by, value, region)) for by, value in named.items() if value is not None})
    if customer is not None:
        person.customer = check_customer_id(customer)
    if not (person.references or session or person.customer):
        raise ConfigurationError("forget() takes at least one of email=, phone=, name=, session= and customer=.")
    secret = secret_of(ledger)
    with ledger.write() as connection:
        accounts = _accounts(connection)  # before rows go that tell of them
        if session is not None:
            person.session, person.sessions = session, {(account, session) for account in accounts}
        found = _gather(connection, person)
        person.references |= _spellings(connection, person)
        renamed = _unname(connection, person)
        traces = _erase_traces(connection, person, accounts, secret)
        write_act(connection, "forgotten", f"{renamed} readings", "a person was erased", ledger.now())
        kept = _carrying(connection, person.customer) if person.customer else ""
    advice = _scrub(ledger, person)
    if not (advice or kept or found or renamed or traces):
        kept = "Nothing in this ledger named whom you asked for."
    return Forgotten(found, renamed, traces, not advice, f"{advice} {kept}".strip())


def _gather(connection: Connection, person: _Person) -> int:
    """Erase the person's leads, and learn from them what else names the person. Returns how many there were.

    An e-mail or a number is one person's, so it leads on to their other sessions; a name may be several people's.
    """
    erased, known = 0, -1
    while known != len(person.references):
        known = len(person.references)
        for row in connection.execute(select(leads).where(_whose(person))).all():
            person.sessions.add((row.account, row.session))
            for one in _told(row):
                (person.names if one.by == "name" else person.references).add(one)
            mine = (leads.c.account == row.account) & (leads.c.session == row.session)
            erased += connection.execute(delete(leads).where(mine)).rowcount
    return erased


def _told(lead: Row[Any]) -> list[Reference]:
    return [Reference(by, value) for by in LEAD_FIELDS if (value := getattr(lead, by))]


def _whose(person: _Person) -> ColumnElement[bool]:
    """Another account's session of the same name is somebody else's, unless the name is what was asked for."""
    told = [_same(leads.c[one.by], one.value, one.by) for one in person.references]
    if person.session is not None:
        told.append(leads.c.session == person.session)
    return or_(*told) if told else leads.c.session.is_(None)


def _same(column: ColumnElement[str], value: str, by: By) -> ColumnElement[bool]:
    """Nobody remembers how the letters of their address were written; the database folds both in its own way."""
    return func.lower(column) == func.lower(value) if by == "email" else column == value


def _spellings(connection: Connection, person: _Person) -> set[Reference]:
    """The person's addresses as readings have them, and in lower case, for readings of another time."""
    asked = [one for one in person.references if one.by == "email"]
    if not asked:
        return set()
    mine = or_(*(_same(readings.c.reference, one.text, "email") for one in asked))
    texts = connection.execute(select(readings.c.reference).where(mine).distinct()).scalars()
    return {Reference("email", text.removeprefix("email:")) for text in [*texts, *(one.text.lower() for one in asked)]}


def _unname(connection: Connection, person: _Person) -> int:
    """Take the name from readings that wait for the person, and the session from those that were skipped."""
    texts = [one.text for one in person.references | person.names]
    named = readings.c.reference.in_(texts)
    held = next_reading_state(ReadingState.RECORDED, Move.HOLD).value
    waiting = readings.c.state.in_([ReadingState.RECORDED.value, ReadingState.HELD.value])
    values = {"state": held, "reason": FORGOTTEN, "reference": None, "due": None}
    count = connection.execute(update(readings).where(named, waiting).values(**values)).rowcount
    count += connection.execute(update(readings).where(named, ~waiting).values(reference=None)).rowcount
    digests = [session_digest(*one) for one in person.sessions]
    skipped = update(readings).where(readings.c.session.in_(digests))
    return count + connection.execute(skipped.values(session=None)).rowcount


def _accounts(connection: Connection) -> set[str]:
    """Those that any row tells of: readings are pruned, and what they led to stays."""
    told = union(*(select(table.c.account) for table in (readings, payers, leads)))
    return {"", *connection.execute(told).scalars()}


def _erase_traces(connection: Connection, person: _Person, accounts: set[str], secret: bytes) -> int:
    """To whom the person led, and what acts say of them."""
    everything = person.references | person.names
    known = {known_by(secret, account, one.text)[:FOLDED] for account in accounts for one in everything}
    mine: list[ColumnElement[bool]] = [func.substr(payers.c.digest, 1, FOLDED).in_(known)]
    if person.customer is not None:
        mine.append(payers.c.customer == person.customer)
    count = connection.execute(delete(payers).where(or_(*mine))).rowcount
    return count + sum(_erase_from_acts(connection, one) for one in everything)


def _erase_from_acts(connection: Connection, one: Reference) -> int:
    """Not from those that mention somebody whose name, address or number only contains this one."""
    said = f"name:{one.value}" if one.by == "name" else one.value
    whole = re.compile(rf"(?<![\w.%+-]){re.escape(said)}(?![\w@-]|\.\w)", re.IGNORECASE)
    told = select(acts.c.id, acts.c.detail).where(acts.c.detail.icontains(said, autoescape=True))
    mine = [row.id for row in connection.execute(told) if whole.search(row.detail)]
    return connection.execute(update(acts).where(acts.c.id.in_(mine)).values(detail=None)).rowcount


def _carrying(connection: Connection, customer: str) -> str:
    """How much stays under the customer's id, and why; nothing where nothing does."""
    count = connection.execute(select(func.count()).where(readings.c.customer == customer)).scalar_one()
    summed = select(func.sum(pruned.c.readings)).where(pruned.c.customer == customer)
    count += int(connection.execute(summed).scalar() or 0)
    if not count:
        return ""
    return (
        f"{counted(count, 'reading')} still {'carries' if count == 1 else 'carry'} {customer}. It is Stripe's own id, "
        "and stays beside the amounts until they are pruned, then in the sums of days."
    )


# -- the files themselves


def _scrub(ledger: Ledger, person: _Person) -> str:
    """Rewrite what still holds erased bytes. Returns what remains to be done, or nothing."""
    if not ledger.database.is_sqlite:
        return _vacuum(ledger)
    folded = _fold_log(ledger)
    left = _left_in(ledger, [one.value for one in person.references])
    if not folded:
        return (
            "The rows are gone, but others who read the ledger just now keep erased bytes in its write-ahead log. "
            "Run this again when they are done."
        )
    if left:
        return (
            f"The rows are gone, but {' and '.join(left)} still hold what was erased, or something that looks like it. "
            "Run this again; if that does not help, run VACUUM on the file while nobody uses the ledger."
        )
    return ""


def _vacuum(ledger: Ledger) -> str:
    """PostgreSQL keeps dead rows until they are vacuumed; outside a transaction."""
    lane = ledger.deliver_lane()
    with inside(), lane.lock:
        for table in (leads, readings, payers, acts):
            lane.connection.exec_driver_sql(f"VACUUM {table.name}")
    return ""


def _fold_log(ledger: Ledger) -> bool:
    """Bring the write-ahead log into the file and empty it; False where somebody still reads from it.

    Erased bytes are overwritten in the file, for the connection has ``secure_delete``.
    """
    lane = ledger.deliver_lane()
    with inside(), lane.lock, ledger.database.reading:
        busy = lane.connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
    return not busy


def _left_in(ledger: Ledger, texts: list[str]) -> list[str]:
    """The files that still hold one of ``texts``: what was promised is looked at."""
    needles = [text.encode() for text in texts if len(text) >= _TELLING]
    path = str(ledger.database.url.database)
    files = [Path(path + ending) for ending in ("", "-wal", "-shm")]
    return [one.name for one in files if one.exists() and _holds(one, needles)]


def _holds(path: Path, needles: list[bytes]) -> bool:
    overlap = max(map(len, needles), default=0)
    with path.open("rb") as file:
        before = b""
        while piece := file.read(1 << 20):
            if any(needle in before + piece for needle in needles):
                return True
            before = piece[-overlap:] if overlap else b""
    return False
