"""One connection for writing, and what its driver's errors mean.

What couriers and people do to many rows would lock them in different orders on PostgreSQL, and stop each other. So
such a transaction has the deliver lane to itself; what only takes rows that nobody else holds (``shared``) goes on
beside its like. Recording takes no part in this: a run waits for nobody.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.reentry import block, inside

BUSY_SECONDS = 5
"""How long a write waits for another process before it gives up; ``?timeout=`` in a SQLite address says otherwise."""
STOPPED_SECONDS = 60
"""How long a transaction on PostgreSQL may do nothing: a process that was stopped within one would block the others."""
_TURN = 7382910545
"""PostgreSQL's advisory lock that transactions on the deliver lane take, for themselves or together."""
_DRIVERS = ("sqlite3", "psycopg", "sqlalchemy")
"""Whose errors speak of the database; psycopg may not be installed."""
_IDLE = 0
"""PostgreSQL's name for a connection that does nothing, and is in no transaction."""

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


@contextmanager
def clear_errors() -> Iterator[None]:
    """Database errors as ``LedgerError``, with what to do."""
    try:
        yield
    except DBAPIError as error:
        raise explain(error.orig or error) from error
    except Exception as error:
        if isinstance(error, UnicodeDecodeError) or type(error).__module__.partition(".")[0] in _DRIVERS:
            raise explain(error) from error
        raise


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
