"""The ledger: what was consumed, by whom, and what became of it at Stripe."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, insert, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.dialects import postgresql, sqlite

from langchain_stripe_meter.core.events import number_text
from langchain_stripe_meter.core.references import By, Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.tenants import session_digest
from langchain_stripe_meter.core.values import valueclass
from langchain_stripe_meter.errors import ConfigurationError, ForeignLedgerError, InvalidValueError, MeteringError
from langchain_stripe_meter.ledger.database import Database
from langchain_stripe_meter.ledger.group import GroupCommit
from langchain_stripe_meter.ledger.inserting import COLUMNS, Other, insert_on_postgres, insert_on_sqlite
from langchain_stripe_meter.ledger.lanes import Lane, clear_errors, explain
from langchain_stripe_meter.ledger.opening import check_place
from langchain_stripe_meter.ledger.schema import CANCELLED_AT, acts, events, notes, readings
from langchain_stripe_meter.reentry import block, inside

ASSIGNED = "assigned"
"""The act of a person who said who pays for what was held; its detail begins with that customer."""
CORRECTED = "corrected"
"""The act of a person who corrected a customer's total; its subject is the reading that does it."""
LIVEMODE = "livemode"
"""The ledger's note of its mode, "test" or "live": whoever opens it first with a key decides."""
OTHERS = 100
"""Runs that share the id of another of which a ledger tells at once."""
ACCOUNT = "account"
"""The ledger's note of the Stripe account that its usage belongs to."""


@valueclass
class Entry:
    """One reading on its way into the ledger. ``key`` makes it unique: a second entry with it changes nothing.

    ``value`` is ``None`` where the amount is unknown; ``reference`` names who pays until Stripe's customer is known.
    ``session`` is that of a skipped run whose lead may be captured later; only its digest is stored. ``reads`` are the
    fields of that lead that would say who pays, in order. What ``follows`` another reading, by its key, is skipped
    while that one is, whatever is known of the lead by now. ``job`` is the number of the job that it belongs to (see
    ledger/jobs.py).
    """

    key: str
    event_name: str
    value: Decimal | int | None
    at: int
    state: ReadingState
    customer: str | None = None
    reference: Reference | None = None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    estimated: bool = False
    reason: str | None = None
    account: str = ""
    session: str | None = field(default=None, repr=False)
    reads: tuple[By, ...] = ()
    follows: str | None = None
    job: int | None = None

    def row(self) -> tuple[Any, ...]:
        """The values of the columns, in their order."""
        return (
            self.key,
            self.event_name,
            self.customer,
            None if self.value is None else number_text(self.value),
            self.at,
            int(self.estimated),
            str(self.state),
            self.reference.text if self.reference else None,
            json.dumps(dict(self.dimensions), sort_keys=True) if self.dimensions else None,
            self.reason,
            self.account,
            session_digest(self.account, self.session) if self.session else None,
            ",".join(self.reads) if self.session else None,
            self.job,
        )

    def columns(self) -> dict[str, Any]:
        """The values by column."""
        return dict(zip(COLUMNS, self.row(), strict=True))


class Ledger:
    """The durable truth, on SQLite or PostgreSQL.

    Contract: ``record`` and ``arecord`` return when the entries survive a power loss, and raise ``LedgerError`` when
    they could not be stored; any thread and any event loop may call any method; a forked child opens its own
    connections by itself. Times are Unix seconds. SQLite is migrated when first opened, PostgreSQL by an operator
    (``stripe-meter ledger upgrade``); a newer or foreign database is refused. ``synchronous="NORMAL"`` trades the
    last moments before a power loss (not before a crash) for speed, on SQLite only.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] | None = None,
        synchronous: str = "FULL",
    ) -> None:
        if synchronous not in ("FULL", "NORMAL"):
            raise ConfigurationError(f"synchronous={synchronous!r}: use 'FULL' or 'NORMAL'.")
        self.database = Database(url, synchronous=synchronous)
        self._clock = clock
        self._group: GroupCommit[Entry] = GroupCommit(self._write)
        self.others: deque[Other] = deque(maxlen=OTHERS)
        """What was not stored because its key stands for another run already, until it is told."""
        self._insert = insert_on_sqlite if self.database.is_sqlite else insert_on_postgres

    def pin(self, *, is_test: bool) -> None:
        """Let this ledger hold usage of this mode only; one of the other is refused, at once or when it is first used,
        with ``ForeignLedgerError``."""
        self.database.on_open = lambda lane: pin(lane, self.now(), is_test=is_test)
        if self.database.is_sqlite:
            refuse_early(Path(str(self.database.url.database)), is_test=is_test)

    def check_place(self) -> None:
        """``ConfigurationError`` where it could not be opened, now or later: a folder or a driver is missing."""
        check_place(self.database.url)

    def now(self) -> int:
        """The ledger's clock, in whole Unix seconds."""
        return int((self._clock or time.time)())

    def __repr__(self) -> str:
        return f"Ledger({self.database.address!r})"

    def record(self, entries: Sequence[Entry]) -> None:
        """Store ``entries`` durably, together with those of other threads that are waiting."""
        self._group.submit(entries)

    def record_new(self, entries: Sequence[Entry]) -> int:
        """As ``record``, all or nothing; returns how many of them the ledger did not have yet."""
        with self.write("record") as connection:
            return sum(insert_or_ignore(connection, readings, entry.columns()) for entry in entries)

    async def arecord(self, entries: Sequence[Entry], on_failure: Callable[[Exception], None] | None = None) -> None:
        """As ``record``, without blocking the event loop. ``on_failure`` is called where they could not be stored after
        the caller was cancelled."""
        await self._group.asubmit(entries, on_failure)

    def wait_for_writes(self) -> None:
        """Return when everything that was handed over before is durable, also for tasks that no longer wait."""
        self._group.submit(())

    def _write(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        database = self.database
        try:
            database.reopen_if_moved()
            found = database.lane("record").run(self._insert, list(map(Entry.row, entries)))
            if found:
                self.others.extend(found)
        except MeteringError:
            raise
        except Exception as error:
            raise _unstorable(error) if _is_the_rows_fault(error) else explain(error) from error

    def deliver_lane(self) -> Lane:
        """The connection that couriers write through."""
        return self.database.lane("deliver")

    @block
    def write(self, lane: str = "deliver") -> Generator[Connection, None, None]:
        """A transaction in the file that is at the ledger's path now, should it have been replaced.

        (Couriers write through ``deliver_lane``: they look at such a file before they send anything from it.)
        """
        self.database.reopen_if_moved()
        with self.database.lane(lane).transaction() as connection:
            yield connection

    @block
    def read(self) -> Generator[Connection, None, None]:
        """A connection for reading; on SQLite one at a time, so that a fork can wait for it."""
        turn = self.database.reading if self.database.is_sqlite else nullcontext()
        with inside(), clear_errors(), turn, self.database.engine.connect() as connection:
            yield connection

    @block
    def look(self) -> Generator[Connection, None, None]:
        """As ``read``, for what a run waits for: also on SQLite, it waits for no long reading of another thread."""
        if not self.database.is_sqlite:
            with self.read() as connection:
                yield connection
            return
        lane = self.database.lane("count")
        with inside(), clear_errors(), lane.lock:
            yield lane.connection

    def reading(self, key: str) -> Mapping[Any, Any] | None:
        """The columns of the entry with this ``key`` as it stands now, and of the meter event that it became the
        ``event_state`` and when it was ``cancelled_at``, or asked to be."""
        query = select(readings, events.c.state.label("event_state"), CANCELLED_AT)
        query = query.outerjoin_from(readings, events, events.c.id == readings.c.event_id)
        with self.look() as connection:
            return connection.execute(query.where(readings.c.key == key)).mappings().first()

    def note(self, name: str) -> str | None:
        """A fact about the ledger itself."""
        with self.read() as connection:
            return note(connection, name)

    def set_note(self, name: str, value: str | None) -> None:
        """Remember a fact about the ledger itself; ``None`` forgets it."""
        with self.deliver_lane().transaction() as connection:
            if value is None:
                connection.execute(sql_delete(notes).where(notes.c.name == name))
                return
            set_note(connection, name, value, self.now())

    def close(self) -> None:
        """Close the connections; a later use opens them again."""
        self._group.close()
        self.database.close()


def note(connection: Connection, name: str) -> str | None:
    """A fact about the ledger, None where it is not known."""
    return connection.execute(select(notes.c.value).where(notes.c.name == name)).scalar()


def set_note(connection: Connection, name: str, value: str, now: int) -> None:
    """Remember a fact about the ledger, in its caller's transaction."""
    values = {"value": value, "at": now}
    insert = dialect_insert(connection, notes).values(name=name, **values)
    connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=values))


def first_note(connection: Connection, name: str, value: str, now: int) -> str:
    """Remember a fact that never changes, in its caller's transaction: of two processes that are as fast, the primary
    key lets one win. Returns the fact."""
    insert_or_ignore(connection, notes, {"name": name, "value": value, "at": now})
    return note(connection, name) or value


def write_act(connection: Connection, act: str, subject: str, detail: str, now: int) -> None:
    """Record what a person, a lead or a webhook decided, in the transaction that does it.

    Whoever changes readings that are recorded already leaves an act, so that spend limits count anew.
    """
    connection.execute(insert(acts).values(at=now, act=act, subject=subject, detail=detail))


def _is_the_rows_fault(error: Exception) -> bool:
    """Whether the database is well and only could not take a value; both drivers name their errors alike.

    What PostgreSQL itself calls an error of the program is a right or a table that is missing.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ProgrammingError" in names:
        return getattr(error, "sqlstate", None) is None
    return not names.isdisjoint({"DataError", "IntegrityError", "UnicodeError", "OverflowError"})


def _unstorable(error: Exception) -> InvalidValueError:
    return InvalidValueError(f"The ledger cannot store one of the values ({type(error).__name__}); it was refused.")


def dialect_insert(connection: Connection, table: Any) -> Any:
    """An insert that can say what to do about a row that is there already."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def insert_or_ignore(connection: Connection, table: Any, values: Mapping[str, Any]) -> bool:
    """Insert a row unless its key is there already; whether it is new."""
    statement = dialect_insert(connection, table).values(**values).on_conflict_do_nothing()
    # Else SQLAlchemy does not ask PostgreSQL how many rows an insert made.
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount == 1


def own_account(connection: Connection) -> str | None:
    """The id of the key's own account, where that is known: usage may name it, though it goes without a name."""
    return note(connection, ACCOUNT)


def pin(lane: Lane, now: int, *, is_test: bool) -> None:
    """Pin the ledger behind ``lane`` to the key's mode; ``ForeignLedgerError`` where it has the other one."""
    with inside(), lane.lock:
        pinned = note(lane.connection, LIVEMODE)
    if pinned is None:
        with lane.transaction() as connection:
            pinned = first_note(connection, LIVEMODE, _word(is_test), now)
    refuse_other_mode(pinned, is_test=is_test)


def refuse_early(path: Path, *, is_test: bool) -> None:
    """As ``pin``, but only looks at a SQLite file that is there already, and leaves every other complaint for later."""
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=1)) as connection:
            row = connection.execute("SELECT value FROM notes WHERE name = ?", (LIVEMODE,)).fetchone()
    except sqlite3.Error:  # no ledger yet, or one that cannot be used: its first use says so
        return
    if row is not None:
        refuse_other_mode(row[0], is_test=is_test)


def _word(is_test: bool) -> str:
    return "test" if is_test else "live"


def refuse_other_mode(pinned: str | None, *, is_test: bool) -> None:
    """``ForeignLedgerError`` where a ledger that is pinned to one mode is given a key of the other."""
    ours = _word(is_test)
    if pinned not in (None, ours):
        raise ForeignLedgerError(
            f"The ledger holds usage of {pinned} mode, but the key is one for {ours} mode; nothing is recorded or "
            f"sent. Use a key for {pinned} mode, or give {ours} mode a ledger of its own."
        )
