"""Where a ledger is: its address, its file if it has one, its server if not."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.exc import SQLAlchemyError as AnyDatabaseError

from langchain_stripe_meter.errors import ConfigurationError, LedgerError

BUSY_SECONDS = 5
"""How long a write waits for another process before it gives up; ``?timeout=`` in a SQLite address says otherwise."""

logger = logging.getLogger("langchain_stripe_meter")


def parse_url(url: str) -> URL:
    """A SQLAlchemy URL for SQLite or PostgreSQL; ``ConfigurationError`` for anything else."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        parsed.get_dialect()
    except (AnyDatabaseError, NoSuchModuleError) as error:
        raise ConfigurationError(
            f"ledger={without_password(url)!r} is not a database address. "
            "Use 'sqlite:///stripe_meter.db' or 'postgresql+psycopg://user@host/name'."
        ) from error
    if backend not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"ledger= takes SQLite or PostgreSQL, not {backend}.")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"):
        raise ConfigurationError(
            f"ledger= cannot use {parsed.drivername}; use 'sqlite:///…' or 'postgresql+psycopg://…' (psycopg 3)."
        )
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("ledger= needs a file: a ledger in memory forgets what customers owe.")
    return parsed


def without_password(url: str) -> str:
    """A database address, also a mistyped one, as people and logs may see it."""
    plain, asked, _ = url.partition("?")  # a password may be asked for there, too
    if "@" in plain:
        plain = f"{plain.partition(':')[0]}://{plain.rpartition('@')[2]}"
    return plain + asked + ("…" if asked else "")


def prepare_file(path: Path) -> None:
    """Create the file as 0600 before SQLite does; refuse a symbolic link, which could point anywhere.

    A file that is for others too is made 0600, and refused where that is not ours to do.

    A file that exists is not opened here: closing it again would drop the locks that SQLite holds on it for another
    ledger in this process (POSIX), and a third process could then throw its write-ahead log away.
    """
    if path.is_symlink():
        raise LedgerError(f"The ledger {path} is a symbolic link; give the real path of the file.")
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(0, "it is no file that may be read and written")
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be opened for writing: {error.strerror}. "
            "Give a writable path in ledger= or $STRIPE_METER_LEDGER."
        ) from error
    if os.name == "posix":
        _tighten(path)


def _tighten(path: Path) -> None:
    loose = 0
    for file in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))):
        with suppress(FileNotFoundError):  # SQLite's own come and go
            mode = stat.S_IMODE(file.stat().st_mode)
            if not mode & 0o077:
                continue
            loose |= mode
            try:
                file.chmod(mode & 0o700)
            except PermissionError as error:
                raise LedgerError(
                    f"{file} is for others too ({mode:04o}) and belongs to somebody else, though it names customers. "
                    "Let its owner run chmod 600 on it, or give the ledger another path."
                ) from error
    if loose:
        logger.warning("stripe-meter: the ledger %s was for others too (%04o); now it is for its owner", path, loose)


def make_durable(path: Path) -> None:
    """Return when ``path``, a file or a folder, survives a power loss as it is now."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def postgres_engine(url: URL, patience: int, **arguments: Any) -> Engine:
    """An engine for psycopg 3, which gives up after ``patience`` seconds unless the address says otherwise.

    A server that is gone must not hold a run up for the minutes that TCP would wait.
    """
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    options = {"connect_timeout": str(patience), "tcp_user_timeout": str(2000 * patience)}
    options = {name: value for name, value in options.items() if name not in url.query}
    try:
        return create_engine(url.update_query_dict(options), pool_pre_ping=True, **arguments)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "A ledger on PostgreSQL needs psycopg: pip install 'langchain-stripe-meter[postgres]'"
        ) from error
