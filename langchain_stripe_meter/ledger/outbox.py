"""What couriers do to the ledger: resolve, seal, claim, settle. Each function works inside its caller's transaction."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, and_, bindparam, func, insert, or_, select, text, tuple_, update

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.core.events import FUTURE_LIMIT, MeterEvent
from langchain_stripe_meter.core.states import (
    STALE_AFTER,
    Attempt,
    EventState,
    Move,
    Outcome,
    ReadingState,
    next_event_state,
    next_reading_state,
    out_of_window,
    settle,
)
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.ledger.schema import events, readings

LEASE_SECONDS = 120
"""How long a courier may take for one event before another takes it for dead; longer than any HTTP timeout."""
SEAL_AT_MOST = 1000
RESOLVE_AT_MOST = 100
HELD_RETRY = (60, 300, 900, 3600)
"""Seconds between looks at a held reading whose customer Stripe did not know."""

_BOOT = f"{time.time_ns():x}"
_CLAIMS = itertools.count(1)
_CLAIM_LOCK = text("SELECT pg_advisory_xact_lock(7382910546)")
"""PostgreSQL couriers claim one after the other: two that look at the same time would not see each other's claims, and
could both send for one customer and meter."""
_MALFORMED = (ValueError, ArithmeticError, MeteringError)

logger = logging.getLogger("langchain_stripe_meter")
_OPEN_READINGS = readings.c.state.in_([ReadingState.RECORDED.value, ReadingState.RESOLVED.value])


@dataclass(frozen=True, slots=True)
class Claimed:
    """An event whose intent to be sent is stored; ``lease`` is the right to settle it."""

    id: int
    event: MeterEvent
    attempt: Attempt
    lease: str


def owner() -> str:
    """This process, as leases name it: host, process, and the boot that tells a reused process id apart."""
    return f"{socket.gethostname()}/{os.getpid()}/{_BOOT}"


def unresolved(connection: Connection, now: int) -> list[Reference]:
    """References that must be looked up at Stripe now, oldest first."""
    due_again = and_(
        readings.c.state == ReadingState.HELD.value, readings.c.due <= now, readings.c.reference.is_not(None)
    )
    newly = and_(_OPEN_READINGS, readings.c.state == ReadingState.RECORDED.value)
    found: list[str] = []
    for condition in (newly, due_again):
        query = select(readings.c.reference).where(condition).group_by(readings.c.reference)
        found += connection.execute(query.order_by(func.min(readings.c.id)).limit(RESOLVE_AT_MOST)).scalars()
    return [reference for told in dict.fromkeys(found) if (reference := _reference(connection, told)) is not None]


def _reference(connection: Connection, told: str) -> Reference | None:
    """The reference in a reading; one that is none can only be settled by a person."""
    by, _, value = told.partition(":")
    try:
        return Reference(by, value)  # type: ignore[arg-type]
    except MeteringError:
        held = next_reading_state(ReadingState.RECORDED, Move.HOLD).value
        waiting = readings.c.state.in_([ReadingState.RECORDED.value, ReadingState.HELD.value])
        statement = update(readings).where(readings.c.reference == told, waiting)
        connection.execute(statement.values(state=held, reason="the customer's name is malformed", due=None))
        return None


def resolve(connection: Connection, reference: Reference, customer: str) -> int:
    """Every waiting reading of ``reference`` belongs to ``customer``; the reference itself is erased."""
    moved = 0
    for state, move in ((ReadingState.RECORDED, Move.FOUND), (ReadingState.HELD, Move.ASSIGN)):
        statement = (
            update(readings)
            .where(readings.c.state == state.value, readings.c.reference == _text(reference))
            .where(readings.c.value.is_not(None))
            .values(
                state=next_reading_state(state, move).value, customer=customer, reference=None, reason=None, due=None
            )
        )
        moved += connection.execute(statement).rowcount
    return moved


def hold(connection: Connection, reference: Reference, reason: str, now: int) -> int:
    """Nobody, or several, at Stripe: hold the readings of ``reference`` and look again later."""
    waiting = or_(
        readings.c.state == ReadingState.RECORDED.value,
        and_(readings.c.state == ReadingState.HELD.value, readings.c.due <= now),
    )
    tries = connection.execute(
        select(func.max(readings.c.tries)).where(waiting, readings.c.reference == _text(reference))
    ).scalar()
    delay = HELD_RETRY[min(int(tries or 0), len(HELD_RETRY) - 1)]
    statement = (
        update(readings)
        .where(waiting, readings.c.reference == _text(reference))
        .values(
            state=next_reading_state(ReadingState.RECORDED, Move.NOT_FOUND).value,
            reason=reason,
            due=now + delay,
            tries=readings.c.tries + 1,
        )
    )
    return connection.execute(statement).rowcount


def hold_meter(connection: Connection, event_name: str, reason: str, now: int) -> int:
    """A meter that cannot take events stops, and only it: its resolved readings wait."""
    statement = (
        update(readings)
        .where(readings.c.state == ReadingState.RESOLVED.value, readings.c.event_name == event_name)
        .values(
            state=next_reading_state(ReadingState.RESOLVED, Move.HOLD).value, reason=reason, due=now + HELD_RETRY[0]
        )
    )
    return connection.execute(statement).rowcount


def release_held(connection: Connection, now: int) -> int:
    """Readings that were held for their meter's sake are tried again when they are due."""
    statement = (
        update(readings)
        .where(readings.c.state == ReadingState.HELD.value, readings.c.due <= now, readings.c.customer.is_not(None))
        .where(readings.c.value.is_not(None))
        .values(state=next_reading_state(ReadingState.HELD, Move.ASSIGN).value, reason=None, due=None)
    )
    return connection.execute(statement).rowcount


def _text(reference: Reference) -> str:
    return f"{reference.by}:{reference.value}"


def open_meters(connection: Connection) -> list[str]:
    """Event names of the readings that could be sealed."""
    query = select(readings.c.event_name).where(_OPEN_READINGS, readings.c.state == ReadingState.RESOLVED.value)
    return list(connection.execute(query.distinct()).scalars())


def seal(connection: Connection, now: int) -> int:
    """Make meter events of resolved readings; what is too old for Stripe is held, what lies ahead waits."""
    _hold_stale(connection, now)
    query = (
        select(readings)
        .where(_OPEN_READINGS, readings.c.state == ReadingState.RESOLVED.value)
        .where(readings.c.at <= now + FUTURE_LIMIT)
        .order_by(readings.c.id)
        .limit(SEAL_AT_MOST)
    )
    if connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    rows = connection.execute(query).mappings().all()
    sound = [row for row in rows if _is_sound(connection, row)]
    if sound:
        connection.execute(insert(events), [_event_row(row, now) for row in sound])
        sealed = next_reading_state(ReadingState.RESOLVED, Move.SEAL).value
        connection.execute(
            update(readings).where(readings.c.id == bindparam("row_id")).values(state=sealed),
            [{"row_id": row["id"]} for row in sound],
        )
    return len(rows)


def _is_sound(connection: Connection, row: Mapping[Any, Any]) -> bool:
    """Whether Stripe could take it at all; what it could not is held, and stops nobody else."""
    try:
        _meter_event(row, row["key"])
    except _MALFORMED as error:
        held = next_reading_state(ReadingState.RESOLVED, Move.HOLD).value
        statement = update(readings).where(readings.c.id == row["id"])
        connection.execute(statement.values(state=held, reason=str(error)[:300], due=None))
        logger.warning("stripe-meter: the reading %s is held: %s", row["key"], error)
        return False
    return True


def _meter_event(row: Mapping[Any, Any], identifier: str) -> MeterEvent:
    return MeterEvent(
        event_name=row["event_name"],
        customer=row["customer"],
        value=Decimal(row["value"]),
        identifier=identifier,
        timestamp=row["at"],
        dimensions=json.loads(row["dimensions"]) if row["dimensions"] else {},
    )


def _event_row(row: Mapping[Any, Any], now: int) -> dict[str, Any]:
    same = {name: row[name] for name in ("event_name", "customer", "value", "dimensions", "at")}
    return {**same, "identifier": row["key"], "state": EventState.PENDING.value, "due": now}


def _hold_stale(connection: Connection, now: int) -> None:
    statement = (
        update(readings)
        .where(readings.c.state == ReadingState.RESOLVED.value, readings.c.at < now - STALE_AFTER)
        .values(
            state=next_reading_state(ReadingState.RESOLVED, Move.HOLD).value,
            reason="older than 34 days: Stripe would refuse it; re-time it or write it off",
            due=None,
        )
    )
    connection.execute(statement)


def claim(connection: Connection, slots: int, now: int, resting: Collection[tuple[str, str]] = ()) -> list[Claimed]:
    """Take up to ``slots`` due events, one per customer and meter, and store the intent to send them.

    ``resting`` are customers and meters (event names) that are left alone. What Stripe may have forgotten becomes
    doubtful instead of being sent again.
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


def _claimable(
    connection: Connection, most: int, now: int, resting: Collection[tuple[str, str]]
) -> list[Mapping[Any, Any]]:
    """Due events of customers and meters that nobody is sending for, at most one each."""
    other = events.alias("other")
    busy = select(other.c.id).where(
        other.c.state == EventState.SENDING.value,
        other.c.customer == events.c.customer,
        other.c.event_name == events.c.event_name,
    )
    query = (
        select(events)
        .where(events.c.state == EventState.PENDING.value, events.c.due <= now, ~busy.exists())
        .order_by(events.c.id)
        .limit(most)
    )
    if resting:
        query = query.where(tuple_(events.c.customer, events.c.event_name).not_in(resting))
    if connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    first: dict[tuple[str, str], Mapping[Any, Any]] = {}
    for row in connection.execute(query).mappings():
        first.setdefault((row["customer"], row["event_name"]), row)
    return list(first.values())


def _claimed(connection: Connection, row: Mapping[Any, Any], lease: str, now: int) -> Claimed | None:
    """The claim on an event; None where it must not, or can never, be sent."""
    if row["first_unknown_at"] is not None and out_of_window(row["first_unknown_at"], now):
        _set_aside(connection, row, next_event_state(EventState.PENDING, Move.OUT_OF_WINDOW), row["error"], now)
        return None
    try:
        event = _meter_event(row, row["identifier"])
    except _MALFORMED as error:
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
    return after.state if connection.execute(statement).rowcount else None


def reap(connection: Connection, now: int) -> int:
    """Events that somebody began to send and never settled: their outcome is unknown."""
    query = select(events).where(events.c.state == EventState.SENDING.value)
    dead = [row for row in connection.execute(query).mappings() if _is_dead(row["lease"], row["lease_until"], now)]
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
