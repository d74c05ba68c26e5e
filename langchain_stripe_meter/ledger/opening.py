"""What happens before a ledger is used: its address is read, its file made or tightened, its schema brought up to
date.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import stat
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.exc import SQLAlchemyError as AnyDatabaseError
from sqlalchemy.pool import NullPool

from langchain_stripe_meter.errors import ConfigurationError, ForeignLedgerError, LedgerError, NewerLedgerError, logger
from langchain_stripe_meter.ledger.lanes import BUSY_SECONDS, Lane
from langchain_stripe_meter.ledger.schema import HEAD, metadata

_NO_PSYCOPG = "A ledger on PostgreSQL needs psycopg: pip install 'langchain-stripe-meter[postgres]'"


_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?")

# -- where it is


def parse_url(url: str) -> URL:
    """A SQLAlchemy URL for SQLite or PostgreSQL; ``ConfigurationError`` for anything else."""
    if not isinstance(url, str):
        kind = type(url).__name__
        raise ConfigurationError(f"ledger= takes an address such as 'sqlite:///stripe_meter.db', not {kind}.")
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
    for name, value in parsed.query.items() if backend == "sqlite" else ():
        if name != "timeout" or not _SECONDS.fullmatch(str(value)):
            shown = f"{name}={value}" if name == "timeout" else name
            raise ConfigurationError(
                f"ledger=…?{shown} is not understood. A SQLite address takes only ?timeout=, for how many "
                "seconds a run waits for another process, such as ?timeout=2."
            )
    return parsed


def check_place(url: URL) -> None:
    """``ConfigurationError`` where no ledger can be at ``url``: its folder is missing, or its driver not installed."""
    if url.get_backend_name() == "postgresql":
        if find_spec("psycopg") is None:
            raise ConfigurationError(_NO_PSYCOPG)
        return
    folder = Path(str(url.database)).absolute().parent
    try:
        why = "" if stat.S_ISDIR(folder.stat().st_mode) else "It is no folder"
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise ConfigurationError(f"The ledger's folder {folder} cannot be used: {why}. Make it, or give another path.")


def without_password(url: str) -> str:
    """A database address, also a mistyped one, as people and logs may see it."""
    plain, asked, _ = url.partition("?")  # a password may be asked for there, too
    if "@" in plain:
        plain = f"{plain.partition(':')[0]}://{plain.rpartition('@')[2]}"
    return plain + asked + ("…" if asked else "")


def prepare_file(path: Path) -> None:
    """Create the file as 0600 before SQLite does; refuse a symbolic link, which could point anywhere.

    A file that exists is not opened here: closing it again would drop the locks that SQLite holds on it for another
    ledger in this process (POSIX), and a third process could then throw its write-ahead log away.
    """
    if path.is_symlink():
        raise LedgerError(f"The ledger {path} is a symbolic link; give the real path of the file.")
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        if not path.is_file():
            raise PermissionError(0, "it is no file")
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be opened for writing: {error.strerror}. "
            "Give a writable path in ledger= or $STRIPE_METER_LEDGER."
        ) from error
    if not os.access(path, os.R_OK | os.W_OK):  # another path would begin a second ledger
        raise LedgerError(
            f"The ledger {path} may not be read and written: it or its file system is read-only. "
            "Make it writable again for this user; what it holds is safe."
        )


def tighten(path: Path) -> None:
    """Make a ledger that is for others too 0600, with SQLite's own files beside it; refuse where that is not ours to
    do."""
    if os.name != "posix":
        return
    loose = 0
    for file in _with_sqlites_own(path):
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


_DISCREET: dict[str, Any] = {"hide_parameters": True, "logging_name": "stripe_meter"}
"""Values name people, so neither SQLAlchemy's errors nor its log may show them."""


def _is_no_row(record: logging.LogRecord) -> bool:
    """At DEBUG, SQLAlchemy logs every row that it reads."""
    return record.levelno > logging.DEBUG


logging.getLogger("sqlalchemy.engine.Engine.stripe_meter").addFilter(_is_no_row)


def make_engine(url: URL, synchronous: str) -> Engine:
    """An engine for the ledger at ``url``, whose file is made first where there is none."""
    if url.get_backend_name() != "sqlite":
        return _postgres_engine(url)
    path = Path(str(url.database))
    prepare_file(path)
    patience = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = create_engine(url, poolclass=NullPool, connect_args={"check_same_thread": False, **patience}, **_DISCREET)

    def never_create(_dialect: Any, _record: Any, arguments: list[Any], named: dict[str, Any]) -> None:
        # Who opens a file again that was deleted meanwhile would else make an empty one, for everybody to read.
        arguments[0] = f"{path.absolute().as_uri()}?mode=rw"
        named["uri"] = True

    def set_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
        # For a new file: a commit writes whole pages, and rows are small. The log stays at SQLite's usual 4 MB.
        connection.execute("PRAGMA page_size=1024")
        connection.execute("PRAGMA wal_autocheckpoint=4000")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA secure_delete=ON")  # what is erased must be gone from the file

    event.listen(engine, "do_connect", never_create)
    event.listen(engine, "connect", set_pragmas)
    return engine


def _postgres_engine(url: URL) -> Engine:
    """An engine for psycopg 3, which gives up after some seconds unless the address says otherwise.

    A server that is gone must not hold a run up for the minutes that TCP would wait.
    """
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    options = {"connect_timeout": str(BUSY_SECONDS), "tcp_user_timeout": str(2000 * BUSY_SECONDS)}
    options = {name: value for name, value in options.items() if name not in url.query}
    try:
        return create_engine(url.update_query_dict(options), pool_pre_ping=True, **_DISCREET)
    except ModuleNotFoundError as error:
        raise ConfigurationError(_NO_PSYCOPG) from error


# -- its schema

VERSION_TABLE = "stripe_meter_version"


def bring_up_to_date(lane: Lane, *, automatic: bool) -> None:
    """Make an empty ledger, migrate an older one; refuse a newer or foreign one and leave it as it is.

    With ``automatic`` False (PostgreSQL), an older ledger is refused too: an operator runs the migration.
    """
    version = _known_version(lane.connection)
    if lane.connection.dialect.name == "sqlite":
        _write_ahead(lane.connection)
    if version == HEAD:
        return
    if not automatic:
        raise LedgerError(
            "The ledger's tables are missing or older than this package. Run: stripe-meter ledger upgrade"
        )
    url = lane.connection.engine.url
    sidecar = sidecar_of(url) if url.get_backend_name() == "sqlite" else None
    with lane.transaction() as connection:
        version = _known_version(connection)  # another process may have been faster
        if version is None:
            make(connection)
            if sidecar is not None:
                _miss_an_earlier_one(sidecar)
        elif version != HEAD:
            migrate(connection)
    if version is None and sidecar is not None:
        with suppress(OSError):  # it is there; or it cannot be written, which a courier tells
            os.close(os.open(sidecar, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _with_sqlites_own(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))]


def files_of(url: URL) -> list[Path]:
    """The files that are a SQLite ledger; none of one on a server."""
    return [*_with_sqlites_own(Path(str(url.database))), sidecar_of(url)] if url.get_backend_name() == "sqlite" else []


def sidecar_of(url: URL) -> Path:
    """The file beside a SQLite ledger that holds its epoch (see ledger/epoch.py).

    It is made empty, right after the ledger: whoever makes a ledger and finds one there knows that another was.
    """
    return Path(f"{url.database}.epoch")


def _miss_an_earlier_one(sidecar: Path) -> None:
    """Let an empty one fit no ledger any more: no courier had come to the one that it was made for."""
    with suppress(OSError):  # there is none, or a courier tells that it cannot be written
        if not sidecar.stat().st_size:
            sidecar.write_text('{"epoch": "?", "next": "?", "at": 0}')


def _write_ahead(connection: Connection) -> None:
    """Switch the file to WAL, which it then stays in. SQLite does not wait by itself for others who do the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except DBAPIError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant


def _known_version(connection: Connection) -> str | None:
    """The schema's version, None for an empty database; a newer or foreign one is refused.

    The tables are looked at first: a process that makes the ledger meanwhile makes them and the version at once.
    """
    tables = inspect(connection).get_table_names()
    version = _version(connection)
    if version is not None and version > HEAD:
        raise NewerLedgerError(
            f"The ledger has schema {version}; this version of langchain_stripe_meter knows {HEAD}. "
            "Upgrade the package."
        )
    if version is None and connection.dialect.name == "sqlite" and tables:
        raise ForeignLedgerError(
            f"The database holds tables of something else ({', '.join(sorted(tables)[:3])}). "
            "Give the ledger its own file."
        )
    return version


def make(connection: Connection) -> None:
    """Make an empty ledger inside the caller's transaction: what the migrations come to, without Alembic, which takes
    longer to import and run than all else that a new ledger needs."""
    metadata.create_all(connection, checkfirst=False)
    connection.exec_driver_sql(f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    connection.exec_driver_sql(f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')")  # noqa: S608 - constants


def migrate(connection: Connection, to: str = "head") -> None:
    """Run the migrations inside the caller's transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except CommandError as error:
        raise LedgerError(f"The ledger cannot be brought up to date: {error}. Restore a backup.") from error
