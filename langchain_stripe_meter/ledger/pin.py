"""A ledger holds usage of test mode or of live mode, never of both: whoever opens it first with a key decides."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, select

from langchain_stripe_meter.errors import ForeignLedgerError
from langchain_stripe_meter.ledger.database import Lane
from langchain_stripe_meter.ledger.schema import notes
from langchain_stripe_meter.reentry import inside

LIVEMODE = "livemode"
"""The ledger's note of its mode: "test" or "live"."""


def pin(lane: Lane, now: int, *, is_test: bool) -> None:
    """Pin the ledger behind ``lane`` to the key's mode; ``ForeignLedgerError`` where it has the other one."""
    ours = _word(is_test)
    with inside(), lane.lock:
        pinned = _pinned(lane.connection)
    if pinned is None:
        with lane.transaction() as connection:
            pinned = _pinned(connection) or _set(connection, ours, now)
    _refuse_other(pinned, ours)


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
        _refuse_other(row[0], _word(is_test))


def _word(is_test: bool) -> str:
    return "test" if is_test else "live"


def _pinned(connection: Connection) -> str | None:
    return connection.execute(select(notes.c.value).where(notes.c.name == LIVEMODE)).scalar()


def _set(connection: Connection, mode: str, now: int) -> str:
    """Another process may be as fast on PostgreSQL; then the primary key lets one of them win."""
    from sqlalchemy.dialects import postgresql, sqlite

    insert = sqlite.insert(notes) if connection.dialect.name == "sqlite" else postgresql.insert(notes)
    values = {"name": LIVEMODE, "value": mode, "at": now}
    connection.execute(insert.values(**values).on_conflict_do_nothing(index_elements=["name"]))
    return _pinned(connection) or mode


def _refuse_other(pinned: str, ours: str) -> None:
    if pinned != ours:
        raise ForeignLedgerError(
            f"The ledger holds usage of {pinned} mode, but the key is one for {ours} mode; nothing is recorded or "
            f"sent. Use a key for {pinned} mode, or give {ours} mode a ledger of its own."
        )
