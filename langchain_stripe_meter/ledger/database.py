"""The ledger's connections: opening, forking, writing, and bringing the schema up to date.

SQLite has one writer, so all of a process's writes share one connection behind one lock and never wait for each other
by polling. PostgreSQL has many: recording and delivering get a connection each. Counting what limits allow reads on
one more, on either.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Engine

from langchain_stripe_meter.errors import LedgerError, logger
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.ledger.lanes import BUSY_SECONDS, Lane, clear_errors
from langchain_stripe_meter.ledger.opening import (
    bring_up_to_date,
    make_engine,
    parse_url,
    tighten,
    without_password,
)
from langchain_stripe_meter.reentry import inside

FORK_SECONDS = BUSY_SECONDS + 1
"""How long a fork waits for what is being written or read just then."""


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
        if opened is None or not self.is_sqlite or (opened.file and opened.file == self._file()):
            return
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


def upgrade(url: str) -> None:
    """Bring the ledger at ``url`` up to date, or make it: for an operator, and for PostgreSQL."""
    database = Database(url)
    database.automatic = True
    try:
        database.lane("deliver")
    finally:
        database.close()
