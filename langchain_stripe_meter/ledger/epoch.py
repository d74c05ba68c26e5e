"""Is the database the one that was here last? A restored, swapped or deleted ledger is noticed before anything is sent.

The ledger's epoch, a random word, is stored in the database and in a small file beside it, ``<database>.epoch``. Both
get a new one when a courier starts, every minute in which it sends, when it ends, and with every backup. A database
that comes back from the past has an epoch of the past. Before the first, the database has none, and the file is empty.
(PostgreSQL has no such file: its operator says
``stripe-meter ledger restored``.)

A copy from the minute in which a courier was killed has the epoch that the ledger itself has. The file says whether
anything may have been sent since the epoch began; where a courier finds that so a day later, it treats the ledger like
one from the past, up to what was recorded then. Earlier it needs not: Stripe still knows the identifiers. (Only where
Stripe then cannot be reached until it has forgotten them, such a copy is not noticed.)

What an earlier state of the ledger holds as unsent may have been sent since. Stripe knows it by its identifier for a
day; what is older than the safe window is put in doubt, to be compared with Stripe's sums, instead of being sent.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, case, func, literal, select, update

from langchain_stripe_meter.core.states import SAFE_WINDOW, EventState, ReadingState
from langchain_stripe_meter.errors import ConfigurationError, LedgerError
from langchain_stripe_meter.ledger.lanes import clear_errors
from langchain_stripe_meter.ledger.opening import make_durable, sidecar_of
from langchain_stripe_meter.ledger.schema import events, notes, readings
from langchain_stripe_meter.ledger.store import Ledger, note, set_note

EPOCH = "epoch"
RESTORED = "restored"
"""The ledger's note of the last time that it came back from the past: why, and up to which reading."""
EVERY_SECONDS = 60
"""A copy of the files that was made after the last change of epoch is not noticed, so it must not be long ago."""

SENDS_FOR_SECONDS = 3600
"""Longer than a courier sends in one epoch: what was recorded later than that after its mark, it cannot have sent."""
KILLED = (
    "The courier before was killed while it sent, more than 23 hours ago. A copy of the ledger from its last minute "
    "could not be told from the ledger, so what is unsent since then is compared with Stripe's sums before it is sent."
)

_MAY_HAVE_BEEN_SENT = [EventState.PENDING.value, EventState.SENDING.value, EventState.REJECTED.value]
_MAY_BE_SENT = [ReadingState.RECORDED.value, ReadingState.RESOLVED.value, ReadingState.HELD.value]

Tell = Callable[[Exception], None]


class Sidecar(NamedTuple):
    """What the file beside the database says. The database has ``next`` if it was changed after the file was.

    ``sent``: since ``at`` (Unix seconds), something may have been sent in this epoch.
    """

    epoch: str
    next: str
    at: int
    sent: bool = False

    @classmethod
    def read(cls, path: Path) -> Sidecar | None:
        """None where there is none; one that fits nothing where it is unreadable text. Empty, it is a new ledger's."""
        try:
            text = path.read_bytes()
            if not text:
                return cls("", "", 0)
            found = json.loads(text)
            return cls(str(found["epoch"]), str(found["next"]), int(found["at"]), bool(found.get("sent")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls("?", "?", 2**62)

    def write(self, path: Path) -> None:
        """Old or new, never half, also after a power loss; readable by its owner only."""
        new = path.with_name(path.name + ".new")
        with suppress(FileNotFoundError):
            new.unlink()  # of a process that was killed here; only the holder of the write lock comes here
        handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(self._asdict()))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        make_durable(path.absolute().parent)


class Epoch:
    """Watches over one ledger for one courier. ``tell`` is told of what an operator must know: once each time that the
    ledger came back or was replaced, and once that the file cannot be written."""

    def __init__(self, ledger: Ledger, tell: Tell | None = None) -> None:
        self._ledger = ledger
        self._tell = tell or (lambda _error: None)
        self._misfit: str | None = None
        self._has_told_unwritable = False
        self._opening = -1
        self._after = 0
        self._has_sent = False

    def keep(self, now: int) -> None:
        """Call before anything is sent: makes sure that the ledger is the one that was here last."""
        database = self._ledger.database
        if not database.is_sqlite:
            return
        database.reopen_if_moved()
        self._ledger.deliver_lane()  # opens it, which counts
        if self._is_opening or (self._has_sent and now >= self._after):
            self.begin()
            self._after = now + EVERY_SECONDS

    def sends(self) -> None:
        """Something is about to be sent: a copy of the ledger made before will not know of it.

        Call within the transaction that claims it, so that no other courier begins an epoch meanwhile. Raises
        ``LedgerError`` where the file is not the one that ``keep`` has looked at, so that nothing is claimed of it.
        """
        self._has_sent = True
        database = self._ledger.database
        if not database.is_sqlite:
            return
        if self._is_opening or not database.is_in_place:
            raise LedgerError("The ledger was closed or replaced just now. It is looked at before anything is sent.")
        try:
            if _is_unmarked(sidecar_path(self._ledger)):  # once an epoch, whoever sends first
                self._mark()
        except OSError as error:
            self._tell_unwritable(error)

    def _mark(self) -> None:
        path = sidecar_path(self._ledger)
        known = Sidecar.read(path)
        if known is not None:
            known._replace(sent=True, at=self._ledger.now()).write(path)

    def end(self) -> None:
        """Call when the last answer is stored."""
        if self._has_sent:
            self.begin()

    def begin(self) -> None:
        """Compare, and begin a new epoch.

        The file is changed before the database and after it, each time under the database's write lock, so that a
        crash in between is told from a ledger of the past.
        """
        if not self._ledger.database.is_sqlite:
            return
        opening = self._ledger.database.openings  # first: it may be replaced, and opened, while it is compared
        self._has_sent = False
        new = secrets.token_hex(16)
        try:
            self._change(new)
            self._confirm(new)
        except OSError as error:
            self._tell_unwritable(error)
        self._opening = opening

    def _tell_unwritable(self, error: OSError) -> None:
        if not self._has_told_unwritable:
            self._has_told_unwritable = True
            self._tell(LedgerError(_unwritable(self._ledger, error)))

    def _change(self, new: str) -> None:
        path, now = sidecar_path(self._ledger), self._ledger.now()
        unwritable: OSError | None = None
        with self._ledger.deliver_lane().transaction() as connection:
            ours, theirs = note(connection, EPOCH) or "", Sidecar.read(path)
            found = compare(ours, theirs)
            is_known = found == self._misfit and not self._is_opening
            if found is not None and not is_known:
                put_in_doubt(connection, now, found, theirs.at if theirs is not None and not ours else None)
            last = ours if found is None else theirs.epoch if theirs is not None else "?"
            if found is None and theirs is not None and self._was_killed_long_ago(theirs, now):
                until = theirs.at + SENDS_FOR_SECONDS
                if _has_unsent(connection, until):
                    found = KILLED
                    put_in_doubt(connection, now, found, until)
            sent = theirs is not None and theirs.sent  # until it is stored what follows from it
            try:
                Sidecar(last, new, theirs.at if theirs is not None and sent else now, sent).write(path)
            except OSError as error:  # neither may change then; what was found is stored all the same
                unwritable = error
            else:
                set_note(connection, EPOCH, new, now)
        self._misfit = found if unwritable is not None else None  # what cannot be made to fit is found every minute
        is_news = found is not None and not is_known
        self._ledger.database.tell_moved(self._tell if not is_news else lambda _: None)
        if is_news:
            self._tell(LedgerError(found))
        if unwritable is not None:
            raise unwritable

    def _confirm(self, new: str) -> None:
        with self._ledger.deliver_lane().transaction() as connection:
            if note(connection, EPOCH) == new:  # else another process was faster, and the file is its
                Sidecar(new, "", self._ledger.now()).write(sidecar_path(self._ledger))

    @property
    def _is_opening(self) -> bool:
        """Whether it was opened since an epoch was begun: it may be another file."""
        return self._opening != self._ledger.database.openings

    def _was_killed_long_ago(self, theirs: Sidecar, now: int) -> bool:
        """Whether a courier before this one sent something, never said that it ended, and Stripe forgets by now."""
        return self._is_opening and theirs.sent and now - theirs.at >= SAFE_WINDOW


def _is_unmarked(path: Path) -> bool:
    known = Sidecar.read(path)
    return known is not None and not known.sent


def sidecar_path(ledger: Ledger) -> Path:
    """The file beside a SQLite ledger that holds its epoch."""
    return sidecar_of(ledger.database.url)


def _unwritable(ledger: Ledger, error: OSError) -> str:
    return (
        f"{sidecar_path(ledger)} cannot be read or written ({error.strerror}), so it would not be noticed if the "
        "ledger were restored from a backup. Make it, and its folder, writable."
    )


def compare(ours: str, theirs: Sidecar | None) -> str | None:
    """What an operator must know: how the database's epoch (or ``""``) and the file's do not fit; None if they do."""
    if theirs is None:
        if not ours:
            return None
        return (
            "The ledger is here without its .epoch file: it was restored or copied from elsewhere. "
            "What it holds as unsent and older than 23 hours is compared with Stripe's sums before it is sent."
        )
    if ours in ((theirs.epoch, theirs.next) if ours else (theirs.epoch,)):
        return None
    if not ours:
        return (
            "The ledger is new, but an earlier one was here: it was deleted or replaced. Restore it from a backup, "
            "else what it had not delivered is lost."
        )
    return (
        "The ledger was restored from a backup, or replaced by another. What it holds as unsent and older than 23 "
        "hours is compared with Stripe's sums before it is sent; usage recorded after the backup is not in it."
    )


def put_in_doubt(connection: Connection, now: int, why: str, until: int | None = None) -> None:
    """Treat all that is unsent here as if its outcome were unknown since it was recorded.

    So it goes out under its identifier while Stripe surely remembers that, and becomes doubtful after. Readings that
    are no event yet are treated so when they become one; with ``until`` (Unix seconds), only those of up to then. Where
    usage is rolled up, what is unsent here may have gone out in another event, under another identifier, which Stripe
    would not refuse: all of it is doubtful at once.
    """
    rolled = and_(events.c.identifier >= "rollup-", events.c.identifier < "rollup.")
    rolled_up = connection.execute(select(events.c.id).where(rolled).limit(1)).first() is not None
    known = case((events.c.first_unknown_at < events.c.at, events.c.first_unknown_at), else_=events.c.at)
    unknown = literal(0) if rolled_up else known
    unsent = update(events).where(events.c.state.in_(_MAY_HAVE_BEEN_SENT))
    connection.execute(unsent.values(first_unknown_at=unknown))
    doubtful = update(events).where(events.c.state == EventState.DOUBTFUL.value)
    connection.execute(doubtful.values(seen_value=None, seen_at=None))
    newest = select(func.max(readings.c.id))
    reading = connection.execute(newest if until is None else newest.where(readings.c.at <= until)).scalar() or 0
    set_note(connection, RESTORED, json.dumps({"reading": reading, "rolled_up": rolled_up, "why": why}), now)


def _has_unsent(connection: Connection, until: int) -> bool:
    unsent = (
        select(events.c.id).where(events.c.state.in_(_MAY_HAVE_BEEN_SENT)),
        select(readings.c.id).where(readings.c.state.in_(_MAY_BE_SENT), readings.c.at <= until),
    )
    return any(connection.execute(query.limit(1)).first() is not None for query in unsent)


def restored(ledger: Ledger) -> None:
    """An operator says that the ledger was restored from a backup: for PostgreSQL, or where it was not noticed."""
    with ledger.write() as connection:
        put_in_doubt(connection, ledger.now(), "An operator said that the ledger was restored from a backup.")


def restored_up_to(ledger: Ledger, connection: Connection) -> int:
    """The id of the last reading that stood in the ledger when it came back from the past, 0 if it never did.

    That counts, too, where no courier has noticed it yet. Raises ``LedgerError`` where the file cannot be read.
    """
    try:
        if ledger.database.is_sqlite and compare(note(connection, EPOCH) or "", Sidecar.read(sidecar_path(ledger))):
            return int(connection.execute(select(func.max(readings.c.id))).scalar() or 0)
    except OSError as error:
        raise LedgerError(_unwritable(ledger, error)) from error
    return int(json.loads(note(connection, RESTORED) or '{"reading": 0}')["reading"])


def rows_are_gone(connection: Connection) -> None:
    """After readings were deleted, in that transaction: SQLite gives the numbers above its last row again, and what
    gets one of them does not come from the past."""
    text = note(connection, RESTORED)
    if text is None:
        return
    past, newest = json.loads(text), connection.execute(select(func.max(readings.c.id))).scalar() or 0
    if newest < past["reading"]:
        value = json.dumps({**past, "reading": newest})
        connection.execute(update(notes).where(notes.c.name == RESTORED).values(value=value))


_CAME_BACK = select(notes).where(notes.c.name == RESTORED)


def told(connection: Connection) -> str | None:
    """When the ledger last came back from the past, and why that was believed; None if it never did."""
    row: Any = connection.execute(_CAME_BACK).first()
    if row is None:
        return None
    return f"{datetime.fromtimestamp(row.at, UTC):%Y-%m-%d %H:%M} UTC: {json.loads(row.value)['why']}"


# -- a copy while it is in use

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
