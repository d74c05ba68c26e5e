"""A copy of the ledger while it is in use."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.address import make_durable
from langchain_stripe_meter.ledger.database import clear_errors
from langchain_stripe_meter.ledger.epoch import Epoch
from langchain_stripe_meter.ledger.store import Ledger

PAGES = 5_000
"""Pages that are copied in one go."""

Progress = Callable[[int, int], None]


def backup(ledger: Ledger, file: Path, *, progress: Progress | None = None) -> int:
    """Copy a SQLite ledger as it stands now to ``file`` (0600), while others go on writing. Returns its bytes.

    Refuses to overwrite, and never leaves half a copy under that name. ``progress`` is told how many of how many pages
    are copied. Raises ``ConfigurationError`` for PostgreSQL, which has tools of its own.
    """
    if not ledger.database.is_sqlite:
        raise ConfigurationError(
            "A ledger on PostgreSQL is backed up with PostgreSQL's own tools: pg_dump, or its continuous archiving. "
            "After a restore, and before anything is sent, run: stripe-meter ledger restored"
        )
    partial = file.with_name(file.name + ".partial")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigurationError(f"{partial} cannot be made: {error.strerror}. Give another path.") from error
    try:
        if file.exists() or file.is_symlink():
            raise ConfigurationError(f"{file} exists already; a backup overwrites nothing. Give another path.")
        epoch = Epoch(ledger)
        epoch.begin()
        with clear_errors():
            _copy(ledger, partial, progress)
        epoch.begin()  # what is sent from now on is not in the copy, so the copy's epoch must be a past one
        make_durable(partial)
        partial.rename(file)
        make_durable(file.absolute().parent)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return file.stat().st_size


def _copy(ledger: Ledger, target: Path, progress: Progress | None) -> None:
    with ledger.read() as connection, closing(sqlite3.connect(target)) as copy:
        source: Any = connection.connection.driver_connection
        source.execute("BEGIN")  # one moment for the whole copy, whatever others write meanwhile
        source.execute("SELECT count(*) FROM notes")
        try:
            told = None if progress is None else lambda _status, left, all_: progress(all_ - left, all_)
            source.backup(copy, pages=PAGES, progress=told, sleep=0)
        finally:
            source.execute("ROLLBACK")
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        said = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(f"the copy is malformed: {said}")
