"""What couriers do to events: claim, settle, reap. Each function works inside its caller's transaction, which may be a
shared one."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, or_, select, text, tuple_, update

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
    settle,
)
from langchain_stripe_meter.ledger.schema import events, readings
from langchain_stripe_meter.ledger.sealing import MALFORMED, meter_event, unseal, withdraw_stale

LEASE_SECONDS = 120
"""How long a courier may take for one event before another takes it for dead; longer than any HTTP timeout."""

_BOOT = f"{time.time_ns():x}"
_CLAIMS = itertools.count(1)
_CLAIM_LOCK = text("SELECT pg_advisory_xact_lock(7382910546)")
"""PostgreSQL couriers claim one after the other: two that look at the same time would not see each other's claims, and
could both send for one customer and meter."""

logger = logging.getLogger("langchain_stripe_meter")


Line = tuple[str, str, str]
"""An account, a customer on it and a meter's event name: Stripe wants one call at a time for them."""


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
    """This process, as leases name it: host, process, and the boot that tells a reused process id apart."""
    return f"{socket.gethostname()}/{os.getpid()}/{_BOOT}"


def claim(connection: Connection, slots: int, now: int, resting: Collection[Line] = ()) -> list[Claimed]:
    """Take up to ``slots`` due events, one per customer and meter, and store the intent to send them.

    ``resting`` are left alone. What Stripe may have forgotten becomes doubtful instead of being sent again; what is
    too old for it, and which it surely does not have, is held.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_CLAIM_LOCK)
    lease = owner()
    claimed: list[Claimed] = []
    while len(claimed) < slots:
        rows = _claimable(connection, slots - len(claimed), now, resting)
        if not rows:
            break
        batch = [item for row in rows if (item := _claimed(connection, row, lease, now)) is not None]
        if not batch:
            continue
        connection.execute(
            update(events)
            .where(events.c.id == bindparam("row_id"))
            .values(
                state=next_event_state(EventState.PENDING, Move.SEND).value,
                sent_at=now,
                lease=bindparam("new_lease"),
                lease_until=now + LEASE_SECONDS,
            ),
            [{"row_id": item.id, "new_lease": item.lease} for item in batch],
        )
        claimed += batch
    return claimed


def _claimable(connection: Connection, most: int, now: int, resting: Collection[Line]) -> list[Mapping[Any, Any]]:
    """Due events of customers and meters that nobody is sending for, at most one each."""
    other = events.alias("other")
    busy = select(other.c.id).where(
        other.c.state == EventState.SENDING.value,
        other.c.account == events.c.account,
        other.c.customer == events.c.customer,
        other.c.event_name == events.c.event_name,
    )
    query = (
        select(events)
        .where(events.c.state == EventState.PENDING.value, or_(events.c.due <= now, _ran_back(now)), ~busy.exists())
        .order_by(events.c.id)
        .limit(most)
    )
    if resting:
        query = query.where(tuple_(events.c.account, events.c.customer, events.c.event_name).not_in(resting))
    if connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    first: dict[Line, Mapping[Any, Any]] = {}
    for row in connection.execute(query).mappings():
        first.setdefault((row["account"], row["customer"], row["event_name"]), row)
    return list(first.values())


def _ran_back(now: int) -> ColumnElement[bool]:
    """Our clock has run back since an event's outcome became unknown. It must be looked at before the clock has caught
    up with when it is due: by then, an old doubt would look young."""
    return events.c.first_unknown_at >= now + CLOCK_MARGIN


def _claimed(connection: Connection, row: Mapping[Any, Any], lease: str, now: int) -> Claimed | None:
    """The claim on an event; None where it must not, or can never, be sent."""
    if row["first_unknown_at"] is not None and out_of_window(row["first_unknown_at"], now):
        _set_aside(connection, row, next_event_state(EventState.PENDING, Move.OUT_OF_WINDOW), row["error"], now)
        return None
    if row["first_unknown_at"] is None and row["at"] < now - STALE_AFTER:
        its_line = [events.c[name] == row[name] for name in ("account", "customer", "event_name")]
        withdraw_stale(connection, and_(events.c.state == EventState.PENDING.value, *its_line), now)
        return None
    try:
        event = meter_event(row, row["identifier"])
    except MALFORMED as error:
        sending = next_event_state(EventState.PENDING, Move.SEND)
        _set_aside(connection, row, next_event_state(sending, Move.REFUSED), str(error)[:300], now)
        return None
    attempt = Attempt(row["identifier"], row["attempts"], now, row["first_unknown_at"])
    return Claimed(row["id"], event, attempt, f"{lease}/{next(_CLAIMS)}")


def _set_aside(connection: Connection, row: Mapping[Any, Any], state: EventState, why: str | None, now: int) -> None:
    logger.warning("stripe-meter: meter event %s is %s: %s", row["identifier"], state, why)
    statement = update(events).where(events.c.id == row["id"])
    connection.execute(statement.values(state=state.value, error=why, settled_at=now))


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
    statement = (
        update(events)
        .where(events.c.id == row_id, events.c.lease == lease, events.c.state == EventState.SENDING.value)
        .values(
            state=after.state.value,
            attempts=after.attempts,
            due=after.due,
            first_unknown_at=after.first_unknown_at,
            settled_at=None if after.state is EventState.PENDING else now,
            error=outcome.message or None,
            request_id=outcome.request_id,
            lease=None,
            lease_until=None,
        )
    )
    if not connection.execute(statement).rowcount:
        return None
    if after.state is EventState.WITHDRAWN:
        unseal(connection, row_id, outcome.message, now)
    return after.state


def reap(connection: Connection, now: int) -> int:
    """Events that somebody began to send and never settled: their outcome is unknown."""
    query = select(events).where(events.c.state == EventState.SENDING.value)
    dead = [row for row in connection.execute(query).mappings() if _is_dead(row["lease"], row["lease_until"], now)]
    if dead and connection.dialect.name == "postgresql":  # another courier may be at it: leave those to that one
        mine = select(events.c.id).where(events.c.id.in_([row["id"] for row in dead]))
        taken = set(connection.execute(mine.with_for_update(skip_locked=True)).scalars())
        dead = [row for row in dead if row["id"] in taken]
    outcome = Outcome(Move.UNKNOWN, "the courier that was sending it died")
    orphans = [
        (
            (row["id"], row["lease"]),
            Attempt(row["identifier"], row["attempts"], row["sent_at"], row["first_unknown_at"]),
        )
        for row in dead
    ]
    return sum(_finish(connection, *orphan, outcome, now) is not None for orphan in orphans)


def _is_dead(lease: str, lease_until: int, now: int) -> bool:
    if lease_until < now:
        return True
    host, pid, boot, *_ = lease.split("/")
    if host != socket.gethostname():
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
        connection.execute(select(func.min(events.c.due)).where(events.c.state == EventState.PENDING.value)).scalar(),
        connection.execute(
            select(func.min(readings.c.due)).where(readings.c.state == ReadingState.HELD.value)
        ).scalar(),
    ]
    return min((due for due in dues if due is not None), default=None)
