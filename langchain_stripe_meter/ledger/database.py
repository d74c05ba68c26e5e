"""The ledger's connections: opening, forking, writing, and bringing the schema up to date.

SQLite has one writer, so all of a process's writes share one connection behind one lock and never wait for each other
by polling. PostgreSQL has many: recording and delivering get a connection each. Counting what limits allow reads on
one more, on either.

What couriers and people do to many rows would lock them in different orders on PostgreSQL, and stop each other. So
such a transaction has the deliver lane to itself; what only takes rows that nobody else holds (``shared``) goes on
beside its like. Recording takes no part in this: a run waits for nobody.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import SQLAlchemyError as AnyDatabaseError

from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.ledger.opening import (
    BUSY_SECONDS,
    bring_up_to_date,
    make_engine,
    parse_url,
    tighten,
    without_password,
)
from langchain_stripe_meter.reentry import block, inside

FORK_SECONDS = BUSY_SECONDS + 1
"""How long a fork waits for what is being written or read just then."""
STOPPED_SECONDS = 60
"""How long a transaction on PostgreSQL may do nothing: a process that was stopped within one would block the others."""
_TURN = 7382910545
"""PostgreSQL's advisory lock that transactions on the deliver lane take, for themselves or together."""
_IDLE = 0
"""PostgreSQL's name for a connection that does nothing, and is in no transaction."""

logger = logging.getLogger("langchain_stripe_meter")
T = TypeVar("T")


class Lane:
    """One connection for writing, one writer at a time. A connection that died is replaced by the next use.

    ``in_turn``: its transactions wait for those of other processes' lanes, on PostgreSQL.
    """

    def __init__(self, engine: Engine, *, in_turn: bool = False) -> None:
        self.lock = threading.RLock()
        self._in_turn = in_turn
        self._engine = engine
        self._connection: Connection | None = None
        self._driver: Any = None

    @property
    def connection(self) -> Connection:
        """The open connection, in autocommit; hold ``lock`` while using it."""
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._driver = None
        return self._connection

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """What ``work`` makes of the driver's own connection and ``args``, for the statement that runs once per run.

        If the server has gone away, it is done once more on a new connection: that must change nothing.
        """
        with self.lock:
            try:
                return work(self._driver or self._open_driver(), *args)
            except BaseException as error:
                found = _condition(self._driver)
                if found != "idle":  # also where Ctrl-C came before a statement's end
                    self.drop()
                if found != "closed" or not isinstance(error, Exception):
                    raise
                return work(self._open_driver(), *args)

    def _open_driver(self) -> Any:
        if self._driver is None:
            self._driver = self.connection.connection.driver_connection
        return self._driver

    @block
    def transaction(self, *, shared: bool = False) -> Generator[Connection, None, None]:
        """All or nothing; on SQLite the write lock is taken at once, so that what is read stays true.

        On PostgreSQL, ``shared`` transactions run beside each other: each must pass over rows that another holds.
        """
        with inside(), self.lock, clear_errors():
            try:
                connection = self._begin(shared=shared)
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:  # also where beginning failed: it may have begun, and not have got its turn
                self._roll_back()
                raise

    def _begin(self, *, shared: bool) -> Connection:
        connection = self.connection
        begin = "BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else self._begin_on_postgres(shared=shared)
        try:
            connection.exec_driver_sql(begin)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            self.drop()
            connection = self.connection
            connection.exec_driver_sql(begin)
        except BaseException:  # psycopg may count what a time limit cut short, and would soon prepare it, in vain
            self.drop()
            raise
        return connection

    def _begin_on_postgres(self, *, shared: bool) -> str:
        """Statements for one round trip."""
        begin = ["BEGIN ISOLATION LEVEL READ COMMITTED", f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"]
        begin.append(f"SET LOCAL idle_in_transaction_session_timeout = '{STOPPED_SECONDS}s'")
        if self._in_turn:
            begin.append(f"SELECT pg_advisory_xact_lock{'_shared' if shared else ''}({_TURN})")
        return "; ".join(begin)

    def _roll_back(self) -> None:
        connection = self._connection
        if connection is None or connection.invalidated:  # SQLAlchemy has closed it, amid a statement
            self.drop()
            return
        try:
            if _condition(connection.connection.driver_connection) != "idle":  # SQLite may have done it by itself
                connection.exec_driver_sql("ROLLBACK")
        except Exception:  # noqa: BLE001 - the error that led here is the one to be told
            self.drop()

    def drop(self) -> None:
        """Give the connection up, whatever state it is in."""
        with inside(), self.lock:
            connection, self._connection, self._driver = self._connection, None, None
            if connection is not None:
                with suppress(Exception):
                    connection.invalidate()
                with suppress(Exception):
                    connection.close()

    def close(self) -> None:
        with inside(), self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = self._driver = None


def _condition(driver: Any) -> Literal["idle", "busy", "closed"]:
    """What a driver's connection is good for: the next statement, nothing before it is rolled back, nothing at all."""
    try:
        busy = driver is not None and (
            driver.in_transaction if isinstance(driver, sqlite3.Connection) else driver.info.transaction_status != _IDLE
        )
    except sqlite3.ProgrammingError:
        return "closed"
    return "closed" if getattr(driver, "closed", False) else "busy" if busy else "idle"


class _Opening:
    """Ledgers are opened one after the other: Alembic keeps global state while it migrates."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self.lock = threading.Lock()
        self.held = False


_opening = _Opening()
_on_sqlite: WeakSet[Database] = WeakSet()


def _before_fork() -> None:
    """Close SQLite in every forking process, and let nobody open it meanwhile.

    SQLite keeps, per process and file, a record of the locks that it holds. A child would inherit that record: it
    would take a lock that a thread of its parent held for its own, for ever, and never really lock the file itself.
    """
    _opening.held = _opening.lock.acquire(timeout=FORK_SECONDS)
    for database in list(_on_sqlite):
        database.before_fork()


def _after_fork_in_parent() -> None:
    for database in list(_on_sqlite):
        database.after_fork_in_parent()
    if _opening.held:
        _opening.lock.release()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)


class _Opened(NamedTuple):
    engine: Engine
    lanes: dict[str, Lane]
    file: tuple[int, int] | None
    """Device and inode of the file, where there is one."""


class Database:
    """A process's connections to one ledger. After a fork, the child opens its own."""

    def __init__(self, url: str, *, synchronous: str = "FULL") -> None:
        self.url = parse_url(url)
        self._synchronous = synchronous
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._path = str(self.url.database)
        self.automatic = self.is_sqlite  # whether opening it brings its schema up to date
        self.on_open: Callable[[Lane], None] | None = None  # looks at a ledger before it is used; may refuse it
        self.openings = 0
        self._moved: LedgerError | None = None
        self._opened: _Opened | None = None
        self.reading = threading.RLock()
        self._held: list[Any] = []
        renew_after_fork(self)
        if self.is_sqlite:
            _on_sqlite.add(self)

    @property
    def address(self) -> str:
        """Where the ledger is, without what may be a secret."""
        return str(self.url) if self.is_sqlite else without_password(self.url.render_as_string(hide_password=False))

    def before_fork(self) -> None:
        """Close the file, unless somebody goes on using it for longer than a fork can wait."""
        opened = self._opened
        if opened is None:
            return
        lanes = list(dict.fromkeys(opened.lanes.values()))
        locks = [*(lane.lock for lane in lanes), self.reading]
        self._held = [lock for lock in locks if lock.acquire(timeout=FORK_SECONDS)]
        if len(self._held) == len(locks):
            for lane in lanes:
                lane.close()

    def after_fork_in_parent(self) -> None:
        """Go on; the file is opened again when it is used."""
        held, self._held = self._held, []
        for lock in held:
            lock.release()

    def after_fork(self) -> None:
        """Keep what is still open of the parent's alive in the child for good.

        Closing it, which garbage collection does too, would end the parent's connections to PostgreSQL, and could
        corrupt a SQLite file; so the child takes a reference that is never given back.
        """
        self.reading = threading.RLock()
        self._held = []
        if self._opened is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._opened))
            self._opened = None

    @property
    def engine(self) -> Engine:
        """For reading. Opens the ledger, and brings its schema up to date, when first asked."""
        return (self._opened or self._open()).engine

    def lane(self, name: str) -> Lane:
        """The connection for ``"record"`` or ``"deliver"``, the same one on SQLite; or for ``"count"``, which only
        reads and so waits for no writer."""
        return (self._opened or self._open()).lanes[name]

    def _open(self) -> _Opened:
        with inside(), _opening.lock, clear_errors():
            if self._opened is not None:
                return self._opened
            engine = make_engine(self.url, self._synchronous)
            lane = Lane(engine)
            try:
                bring_up_to_date(lane, automatic=self.automatic)
                if self.on_open is not None:
                    self.on_open(lane)
                if self.is_sqlite:  # it is a ledger, and ours
                    tighten(Path(self._path))
            except BaseException:
                lane.drop()
                engine.dispose()
                raise
            deliver = lane if self.is_sqlite else Lane(engine, in_turn=True)
            self._opened = _Opened(engine, {"record": lane, "deliver": deliver, "count": Lane(engine)}, self._file())
            self.openings += 1
            return self._opened

    def _file(self) -> tuple[int, int] | None:
        """What is at the ledger's path now."""
        with suppress(FileNotFoundError):
            if self.is_sqlite:
                found = os.stat(self._path)
                return found.st_dev, found.st_ino
        return None

    @property
    def is_in_place(self) -> bool:
        """Whether it is open, and what is open is what is at its path now."""
        opened = self._opened
        return opened is not None and opened.file == self._file()

    def reopen_if_moved(self) -> None:
        """Open the file anew if it was deleted or replaced while it was open: what is written into it would be lost."""
        opened = self._opened
        if opened is None or not self.is_sqlite:
            return
        try:
            found = os.stat(self._path)
            if opened.file == (found.st_dev, found.st_ino):
                return
        except FileNotFoundError:
            pass
        self._moved = LedgerError(
            f"The ledger {self._path} was deleted or replaced while in use; what is recorded from now on is in the "
            "file that is there now. Unless this was a restore, restore it from a backup, else what it had not "
            "delivered is lost."
        )
        logger.error("stripe-meter: %s", self._moved)
        self.close()

    def tell_moved(self, tell: Callable[[LedgerError], None]) -> None:
        """Tell of a file that was deleted or replaced while it was open, if that is new. The caller holds no lock."""
        moved, self._moved = self._moved, None
        if moved is not None:
            tell(moved)

    def close(self) -> None:
        """Close what this process opened; the next use opens it again."""
        with inside():
            with _opening.lock:
                opened, self._opened = self._opened, None
            if opened is not None:  # without that lock: whoever uses a lane may be waiting for it, to open the ledger
                for lane in opened.lanes.values():
                    lane.close()
                opened.engine.dispose()


@contextmanager
def clear_errors() -> Iterator[None]:
    """Database errors as ``LedgerError``, with what to do."""
    try:
        yield
    except DBAPIError as error:
        raise explain(error.orig or error) from error
    except (sqlite3.Error, AnyDatabaseError, UnicodeDecodeError) as error:
        raise explain(error) from error


def explain(error: BaseException) -> LedgerError:
    """What a driver's error means for the operator. The driver's own parameters are left out: they name customers."""
    if isinstance(error, LedgerError):
        return error
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, UnicodeDecodeError) or "Could not decode" in said:  # it goes on to quote the row
        said = "it holds text that is no UTF-8"
    advice = {
        ("not a database",): "The file is corrupt or no SQLite database; it was left untouched. Restore a backup.",
        ("malformed", "no UTF-8", "unsupported file", "no such column", "has no column"): (
            "The file is corrupt; it was left untouched. Restore a backup."
        ),
        ("locked", "lock timeout"): "Another process holds it; try again, or find the process.",
        ("full",): "Free some disk space; what is stored is safe.",
        ("disk I/O",): "Look at the disk and its free space; what is stored is safe.",
        ("readonly",): "Make the file and its folder writable.",
        ("permission denied",): "Give the ledger's role the rights to read and write its tables (GRANT).",
        ("read-only transaction",): "Give the address of the server that takes writes; this is a standby, or set so.",
        ('relation "', "no such table"): (
            "Look whether it is the ledger's database, and its schema; else run: stripe-meter ledger upgrade"
        ),
        ("unable to open",): "Unless it was deleted, make the file and its folder writable.",
    }
    found = (text for words, text in advice.items() if any(word in said for word in words))
    hint = next(found, "Look at the database and at its own log.")
    return LedgerError(f"The ledger's database says: {said}. {hint}")


def upgrade(url: str) -> None:
    """Bring the ledger at ``url`` up to date, or make it: for an operator, and for PostgreSQL."""
    database = Database(url)
    database.automatic = True
    try:
        database.lane("deliver")
    finally:
        database.close()
