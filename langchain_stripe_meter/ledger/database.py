"""The ledger's connections: opening, forking, writing, and bringing the schema up to date.

SQLite has one writer, so all of a process's writes share one connection behind one lock and never wait for each other
by polling. PostgreSQL has many: recording and delivering get a connection each.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.exc import SQLAlchemyError as AnyDatabaseError
from sqlalchemy.pool import NullPool

from langchain_stripe_meter.errors import ConfigurationError, ForeignLedgerError, LedgerError, NewerLedgerError
from langchain_stripe_meter.ledger.schema import HEAD

BUSY_SECONDS = 5
"""How long a write waits for another process before it gives up."""
VERSION_TABLE = "stripe_meter_version"


class Lane:
    """One connection for writing, one writer at a time."""

    def __init__(self, engine: Engine) -> None:
        self.lock = threading.RLock()
        self._engine = engine
        self._connection: Connection | None = None
        self._driver: Any = None

    @property
    def driver(self) -> Any:
        """The database driver's own connection, for the one statement that runs once per run; hold ``lock``."""
        if self._driver is None:
            self._driver = self.connection.connection.driver_connection
        return self._driver

    @property
    def connection(self) -> Connection:
        """The open connection, in autocommit; hold ``lock`` while using it."""
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._driver = None
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing; on SQLite the write lock is taken at once, so that what is read stays true."""
        with self.lock, _clear_errors():
            connection = self.connection
            connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "BEGIN")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        connection = self._connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if connection.dialect.name == "sqlite" and not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
            return  # SQLite has rolled back by itself (disk full, I/O error)
        connection.exec_driver_sql("ROLLBACK")

    def close(self) -> None:
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = self._driver = None


class Database:
    """A process's connections to one ledger. After a fork, the child opens its own."""

    def __init__(self, url: str, *, synchronous: str = "FULL") -> None:
        self.url = parse_url(url)
        self._synchronous = synchronous
        self._opening = threading.Lock()
        self._pid = -1
        self._engine: Engine | None = None
        self._lanes: dict[str, Lane] = {}

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def engine(self) -> Engine:
        """For reading. Opens the ledger, and brings its schema up to date, when first asked."""
        if self._pid != os.getpid():
            self._open()
        assert self._engine is not None  # noqa: S101 - _open has set it or raised
        return self._engine

    def lane(self, name: str) -> Lane:
        """The connection for ``"record"`` or ``"deliver"``; the same one on SQLite."""
        if self._pid != os.getpid():
            self._open()
        return self._lanes[name]

    def _open(self) -> None:
        with self._opening:
            if self._pid == os.getpid():
                return
            if self._engine is not None:
                _leave_to_parent(self._engine, self._lanes)
            with _clear_errors():
                engine = self._make_engine()
                lane = Lane(engine)
                lanes = {"record": lane, "deliver": lane if self.is_sqlite else Lane(engine)}
                try:
                    bring_up_to_date(lane, automatic=self.is_sqlite)
                except BaseException:
                    lane.close()
                    engine.dispose()
                    raise
            self._engine, self._lanes, self._pid = engine, lanes, os.getpid()

    def _make_engine(self) -> Engine:
        if not self.is_sqlite:
            return create_engine(self.url, pool_pre_ping=True)
        _prepare_file(self.url)
        engine = create_engine(
            self.url, poolclass=NullPool, connect_args={"check_same_thread": False, "timeout": BUSY_SECONDS}
        )
        event.listen(engine, "connect", self._set_pragmas)
        return engine

    def _set_pragmas(self, connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute("PRAGMA page_size=2048")  # for a new file: a commit writes whole pages, and rows are small
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute("PRAGMA secure_delete=ON")  # what is erased must be gone from the file

    def close(self) -> None:
        """Close what this process opened; the next use opens it again."""
        with self._opening:
            if self._engine is None or self._pid != os.getpid():
                return
            for lane in self._lanes.values():
                lane.close()
            self._engine.dispose()
            self._engine, self._lanes, self._pid = None, {}, -1


def parse_url(url: str) -> URL:
    """A SQLAlchemy URL for SQLite or PostgreSQL; ``ConfigurationError`` for anything else."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        parsed.get_dialect()
    except (AnyDatabaseError, NoSuchModuleError) as error:
        raise ConfigurationError(
            f"ledger={_without_password(url)!r} is not a database address. "
            "Use 'sqlite:///stripe_meter.db' or 'postgresql+psycopg://user@host/name'."
        ) from error
    if backend not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"ledger= takes SQLite or PostgreSQL, not {backend}.")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("ledger= needs a file: a ledger in memory forgets what customers owe.")
    return parsed


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _prepare_file(url: URL) -> None:
    """Create the file as 0600 before SQLite does; refuse a symbolic link, which could point anywhere."""
    path = Path(str(url.database))
    if path.is_symlink():
        raise LedgerError(f"The ledger {path} is a symbolic link; give the real path of the file.")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600))
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be opened for writing: {error.strerror}. "
            "Give a writable path in ledger= or $STRIPE_METER_LEDGER."
        ) from error


def _leave_to_parent(*objects: object) -> None:
    """Keep a parent's connections alive in the child for good.

    Closing a SQLite handle that came through a fork can corrupt the database of the parent, and garbage collection
    closes; so the child takes a reference that is never given back.
    """
    for item in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Database errors as ``LedgerError``, with what to do."""
    try:
        yield
    except DBAPIError as error:
        raise explain(error.orig or error) from error
    except (sqlite3.Error, AnyDatabaseError) as error:
        raise explain(error) from error


def explain(error: BaseException) -> LedgerError:
    """What a driver's error means for the operator. The driver's own parameters are left out: they name customers."""
    if isinstance(error, LedgerError):
        return error
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    advice = {
        "not a database": "The file is corrupt or no SQLite database; it was left untouched. Restore a backup.",
        "malformed": "The file is corrupt; it was left untouched. Restore a backup.",
        "locked": "Another process holds it; try again, or find the process.",
        "full": "Free some disk space; what is stored is safe.",
        "readonly": "Make the file and its folder writable.",
    }
    hint = next((text for word, text in advice.items() if word in said), "See the cause for details.")
    return LedgerError(f"The ledger's database says: {said}. {hint}")


def bring_up_to_date(lane: Lane, *, automatic: bool) -> None:
    """Migrate an empty or older ledger; refuse a newer or foreign one and leave it as it is.

    With ``automatic`` False (PostgreSQL), an older ledger is refused too: an operator runs the migration.
    """
    if _version(lane.connection) == HEAD:
        return
    with lane.transaction() as connection:
        version = _version(connection)  # another process may have been faster
        if version == HEAD:
            return
        _refuse_unknown(connection, version)
        if not automatic:
            raise LedgerError(
                "The ledger's tables are missing or older than this package. Run: stripe-meter ledger upgrade"
            )
        migrate(connection)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant


def _refuse_unknown(connection: Connection, version: str | None) -> None:
    if version is not None and version > HEAD:
        raise NewerLedgerError(
            f"The ledger has schema {version}; this version of langchain_stripe_meter knows {HEAD}. Upgrade the package."
        )
    tables = inspect(connection).get_table_names()
    if version is None and connection.dialect.name == "sqlite" and tables:
        raise ForeignLedgerError(
            f"The database holds tables of something else ({', '.join(sorted(tables)[:3])}). Give the ledger its own file."
        )


def migrate(connection: Connection) -> None:
    """Run the migrations inside the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
