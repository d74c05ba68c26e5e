"""What couriers do to events: claim, settle, reap. Each function works inside its caller's transaction, which may be a
shared one."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    and_,
    bindparam,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
    tuple_,
    update,
)

from langchain_stripe_meter.core.doubts import KNOWN_THERE
from langchain_stripe_meter.core.events import MeterEvent
from langchain_stripe_meter.core.states import (
    CLOCK_MARGIN,
    STALE_AFTER,
    Attempt,
    EventState,
    Move,
    Outcome,
    ReadingState,
    next_event_state,
    out_of_window,
    safe_window,
    settle,
)
from langchain_stripe_meter.errors import logger
from langchain_stripe_meter.ledger.schema import IS_PENDING, IS_SENDING, KNOWN_TO_STRIPE, events, readings
from langchain_stripe_meter.ledger.sealing import MALFORMED, meter_event, unseal, withdraw_stale
from langchain_stripe_meter.ledger.store import write_act

LEASE_SECONDS = 120
"""How long a courier may take for one event before another takes it for dead; longer than any HTTP timeout."""

_BOOT = f"{time.time_ns():x}"
_CLAIMS = itertools.count(1)
_CLAIM_LOCK = text("SELECT pg_advisory_xact_lock(7382910546)")
"""PostgreSQL couriers claim one after the other: two that look at the same time would not see each other's claims, and
could both send for one customer and meter."""

Line = tuple[str, str, str]
"""An account, a customer on it and a meter's event name: Stripe wants one call at a time for them."""

LINES_AT_ONCE = 1000
"""How many lines a claim looks at before it leaves the others to the next one."""
_CAME_BACK = "it may have been sent before the ledger was restored or its courier was killed"
"""Why an event is in doubt whose outcome was never unknown: see ``put_in_doubt``."""
_PAGE = 20
_FIRST: Line = ("", "", "")
_PENDING: ColumnElement[str] = literal_column("'pending'")


@dataclass(frozen=True, slots=True)
class Claimed:
    """An event whose intent to be sent is stored; ``lease`` is the right to settle it."""

    id: int
    event: MeterEvent
    attempt: Attempt
    lease: str

    @property
    def line(self) -> Line:
        """What must not be sent for meanwhile."""
        return self.event.account, self.event.customer, self.event.event_name


def owner() -> str:
    """This process, as leases name it: where it runs, its id, and the start that tells a reused process id apart."""
    return f"{_where()}/{os.getpid()}/{_BOOT}"


def _where() -> str:
    """The host, its kernel and this container's namespace of processes: only there does a process id mean the same."""
    kernel = processes = ""
    if sys.platform == "linux":
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            processes = os.readlink("/proc/self/ns/pid")
        except OSError:  # hidden from us: then nobody else's process id means anything here
            processes = f"{os.getpid()}-{_BOOT}"
    return f"{socket.gethostname()}|{kernel}|{processes}"


@dataclass(slots=True)
class Round:
    """Where a courier's next claim goes on among the lines that wait, so that each has its turn."""

    after: Line = _FIRST


def claim(
    connection: Connection, slots: int, now: int, resting: Collection[Line | str] = (), at: Round | None = None
) -> list[Claimed]:
    """Take up to ``slots`` due events, one per customer and meter, and store the intent to send them.

    What is ``resting``, an account or one customer and meter of it, is left alone. What Stripe may have forgotten
    becomes doubtful instead of being sent again; what is too old for it, and which it surely does not have, is held.
    """
    if slots <= 0:
        return []
    if connection.dialect.name == "postgresql":
        connection.execute(_CLAIM_LOCK)
    _doubt_forgotten(connection, now)
    due = connection.execute(_FIRST_DUE).scalar()
    if due is None or due > now:
        return []
    at, lease = at or Round(), owner()
    claimed: list[Claimed] = []
    for heads in _pages(connection, at, now):
        free = [
            head
            for head in heads
            if head.is_free
            and head.account not in resting
            and (head.account, head.customer, head.event_name) not in resting
        ]
        chosen = free[: slots - len(claimed)]
        claimed += _take(connection, [head.id for head in chosen], lease, now)
        if len(claimed) >= slots:
            at.after = (chosen[-1].account, chosen[-1].customer, chosen[-1].event_name)
            break
    return claimed


def _pages(connection: Connection, at: Round, now: int) -> Iterator[Sequence[Any]]:
    """The first event of each line that waits, a page at a time: once around, unless there are very many."""
    seen, ends = 0, 1 if at.after == _FIRST else 2
    while ends and seen < LINES_AT_ONCE:
        account, customer, event_name = at.after
        bound = {"account": account, "customer": customer, "event_name": event_name, "now": now}
        heads = connection.execute(_HEADS, bound).all()
        seen += len(heads)
        if len(heads) < _PAGE:
            ends -= 1
            at.after = _FIRST
        else:
            at.after = (heads[-1].account, heads[-1].customer, heads[-1].event_name)
        yield heads


def _head_after(account: Any, customer: Any, event_name: Any) -> ScalarSelect[int]:
    """Of the line that follows, the event that has been due for longest.

    SQLite seeks an index by all columns of such a comparison only where no column is on its right side, and begins at
    what equals it: so the line's last possible event is named.
    """
    its = events.alias("its")
    index = (its.c.account, its.c.customer, its.c.event_name, its.c.due)
    last = tuple_(account, customer, event_name, literal_column(str(2**63 - 1)))
    query = select(its.c.id).where(its.c.state == _PENDING, tuple_(*index) > last)
    return query.order_by(*index, its.c.id).limit(1).scalar_subquery()


def _heads() -> Select[Any]:
    """From line to line through the index, however many events each has waiting."""
    first = _head_after(bindparam("account"), bindparam("customer"), bindparam("event_name"))
    steps = select(literal(1).label("step"), first.label("id")).cte("steps", recursive=True)
    here = events.alias("here")
    following = _head_after(here.c.account + "", here.c.customer + "", here.c.event_name + "")
    further = select(steps.c.step + 1, following).join_from(steps, here, here.c.id == steps.c.id)
    steps = steps.union_all(further.where(steps.c.step < _PAGE))
    other = events.alias("other")
    line = [other.c[name] == events.c[name] for name in ("account", "customer", "event_name")]
    is_busy = select(other.c.id).where(other.c.state == literal_column("'sending'"), *line).exists()
    is_free = and_(events.c.due <= bindparam("now"), ~is_busy)
    query = select(events.c.id, events.c.account, events.c.customer, events.c.event_name, is_free.label("is_free"))
    return query.join_from(steps, events, events.c.id == steps.c.id).order_by(steps.c.step)


_HEADS = _heads()
_FIRST_DUE = select(func.min(events.c.due)).where(IS_PENDING)

_SEND = (
    update(events)
    .where(events.c.id == bindparam("row_id"))
    .values(
        state=next_event_state(EventState.PENDING, Move.SEND).value,
        sent_at=bindparam("now"),
        lease=bindparam("new_lease"),
        lease_until=bindparam("until"),
    )
)


def _take(connection: Connection, ids: Sequence[int], lease: str, now: int) -> list[Claimed]:
    """Claim them, unless another transaction is at one of them."""
    if not ids:
        return []
    query = select(events).where(events.c.id.in_(ids), IS_PENDING).order_by(events.c.id)
    rows = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
    batch = [item for row in rows if (item := _claimed(connection, row, lease, now)) is not None]
    if batch:
        until = now + LEASE_SECONDS
        connection.execute(
            _SEND, [{"row_id": item.id, "now": now, "new_lease": item.lease, "until": until} for item in batch]
        )
    return batch


_FORGOTTEN = (
    select(events)
    .where(IS_PENDING, events.c.first_unknown_at.is_not(None))
    .where(or_(events.c.first_unknown_at <= bindparam("old"), events.c.first_unknown_at >= bindparam("ahead")))
    .limit(LINES_AT_ONCE)
    .with_for_update(skip_locked=True)
)


def _doubt_forgotten(connection: Connection, now: int) -> None:
    """Put in doubt what Stripe may have forgotten, before it is due.

    Our clock may have run back since an outcome became unknown: by the time that it has caught up, an old doubt would
    look young.
    """
    since, until = safe_window(now)
    for row in connection.execute(_FORGOTTEN, {"old": since, "ahead": until}).mappings().all():
        _doubt(connection, row, now)


def _doubt(connection: Connection, row: Mapping[Any, Any], now: int) -> None:
    doubtful = next_event_state(EventState.PENDING, Move.OUT_OF_WINDOW)
    _set_aside(connection, row, doubtful, row["error"] or _CAME_BACK, now)


def _claimed(connection: Connection, row: Mapping[Any, Any], lease: str, now: int) -> Claimed | None:
    """The claim on an event; None where it must not, or can never, be sent."""
    if row["first_unknown_at"] is not None and out_of_window(row["first_unknown_at"], now):
        _doubt(connection, row, now)
        return None
    if row["first_unknown_at"] is None and row["at"] < now - STALE_AFTER:
        its_line = [events.c[name] == row[name] for name in ("account", "customer", "event_name")]
        withdraw_stale(connection, and_(IS_PENDING, *its_line), now)
        return None
    try:
        event = meter_event(row, row["identifier"])
    except MALFORMED as error:
        sending = next_event_state(EventState.PENDING, Move.SEND)
        _set_aside(connection, row, next_event_state(sending, Move.REFUSED), str(error)[:300], now)
        return None
    was_absent = row["seen_at"] is not None
    attempt = Attempt(row["identifier"], row["attempts"], now, row["first_unknown_at"], was_absent)
    return Claimed(row["id"], event, attempt, f"{lease}/{next(_CLAIMS)}")


def _set_aside(connection: Connection, row: Mapping[Any, Any], state: EventState, why: str | None, now: int) -> None:
    logger.warning("stripe-meter: meter event %s is %s: %s", row["identifier"], state, why)
    statement = update(events).where(events.c.id == row["id"])
    connection.execute(statement.values(state=state.value, error=why, settled_at=now))


_SETTLE = (
    update(events)
    .where(events.c.id == bindparam("row_id"), events.c.lease == bindparam("its_lease"), IS_SENDING)
    .values(
        state=bindparam("new_state"),
        attempts=bindparam("tries"),
        due=bindparam("next_due"),
        first_unknown_at=bindparam("unknown_at"),
        settled_at=bindparam("final_at"),
        error=bindparam("why"),
        request_id=bindparam("request"),
        lease=None,
        lease_until=None,
    )
)
"""Built once: SQLAlchemy takes longer to build it than SQLite to do it."""


def finish(connection: Connection, results: Iterable[tuple[Claimed, Outcome]], now: int) -> list[EventState | None]:
    """Store what attempts came to; None where the lease was lost, so that a late answer changes nothing."""
    return [
        _finish(connection, (claimed.id, claimed.lease), claimed.attempt, outcome, now) for claimed, outcome in results
    ]


def _finish(
    connection: Connection, claim: tuple[int, str], attempt: Attempt, outcome: Outcome, now: int
) -> EventState | None:
    row_id, lease = claim
    after = settle(attempt, outcome, now)
    is_contradicted = after.move is Move.CONTRADICTED
    bound = {
        "row_id": row_id,
        "its_lease": lease,
        "new_state": after.state.value,
        "tries": after.attempts,
        "next_due": after.due,
        "unknown_at": after.first_unknown_at,
        "final_at": None if after.state is EventState.PENDING else now,
        "why": KNOWN_THERE if is_contradicted else outcome.message or None,
        "request": outcome.request_id,
    }
    if not connection.execute(_SETTLE, bound).rowcount:
        return None
    if is_contradicted:
        write_act(connection, KNOWN_TO_STRIPE, attempt.identifier, KNOWN_THERE, now)
    if after.state is EventState.WITHDRAWN:
        unseal(connection, row_id, outcome.message, now)
    return after.state


def reap(connection: Connection, now: int) -> int:
    """Events that somebody began to send and never settled: their outcome is unknown."""
    query = select(events).where(IS_SENDING)
    dead = [row for row in connection.execute(query).mappings() if _is_dead(row["lease"], row["lease_until"], now)]
    if dead and connection.dialect.name == "postgresql":  # another courier may be at it: leave those to that one
        mine = select(events.c.id).where(events.c.id.in_([row["id"] for row in dead]))
        taken = set(connection.execute(mine.with_for_update(skip_locked=True)).scalars())
        dead = [row for row in dead if row["id"] in taken]
    outcome = Outcome(Move.UNKNOWN, "the courier that was sending it died")
    return sum(_reap(connection, row, outcome, now) for row in dead)


def _reap(connection: Connection, row: Mapping[Any, Any], outcome: Outcome, now: int) -> bool:
    attempt = Attempt(row["identifier"], row["attempts"], row["sent_at"], row["first_unknown_at"])
    state = _finish(connection, (row["id"], row["lease"]), attempt, outcome, now)
    if state is EventState.DOUBTFUL:
        logger.warning("stripe-meter: meter event %s is %s: %s", row["identifier"], state, outcome.message)
        if row["sent_at"] > now:  # by a clock that was ahead: else nobody would look at Stripe's sum before then
            connection.execute(update(events).where(events.c.id == row["id"]).values(sent_at=now))
    return state is not None


def is_over(lease_until: int, now: int) -> bool:
    """Whether nobody may send on such a lease any more. One that ends later than any could was taken by a clock that
    was ahead: what was sent on it has an unknown age, so it is out of the safe window at once."""
    return not now <= lease_until <= now + LEASE_SECONDS + CLOCK_MARGIN


def _is_dead(lease: str, lease_until: int, now: int) -> bool:
    if is_over(lease_until, now):
        return True
    where, pid, boot, *_ = lease.split("/")
    if where != _where():
        return False
    if int(pid) == os.getpid():
        return boot != _BOOT
    return not _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 is Ctrl-C: wait for the lease to end instead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def next_due(connection: Connection) -> int | None:
    """When the next pending event or held reading wants attention; None where nothing waits."""
    dues: Sequence[int | None] = [
        connection.execute(_FIRST_DUE).scalar(),
        connection.execute(
            select(func.min(readings.c.due)).where(readings.c.state == ReadingState.HELD.value)
        ).scalar(),
    ]
    return min((due for due in dues if due is not None), default=None)
