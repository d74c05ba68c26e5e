"""What a clock that was ahead has left in the ledger is put right once it is right again."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Table, Update, and_, bindparam, case, or_, select, update

from langchain_stripe_meter.core.doubts import MINUTE
from langchain_stripe_meter.core.states import (
    CLOCK_MARGIN,
    LONGEST_WAIT,
    STALE_AFTER,
    Move,
    ReadingState,
    next_reading_state,
)
from langchain_stripe_meter.ledger.resolving import HELD, free
from langchain_stripe_meter.ledger.schema import IS_DOUBTFUL, IS_PENDING, events, readings
from langchain_stripe_meter.ledger.sealing import TOO_OLD


def _put_off(table: Table, condition: ColumnElement[bool]) -> Update:
    too_late = and_(condition, table.c.due > bindparam("latest"))
    mine = select(table.c.id).where(too_late).with_for_update(skip_locked=True)
    return update(table).where(table.c.id.in_(mine)).values(due=bindparam("at_once"))


_PUT_OFF = _put_off(events, and_(IS_PENDING)), _put_off(readings, HELD)


def recall(connection: Connection, now: int) -> None:
    """What a clock that was ahead has put off, for longer than anything waits, is due now."""
    for statement in _PUT_OFF:
        connection.execute(statement, {"latest": now + LONGEST_WAIT, "at_once": now})


def _settled_ahead() -> Update:
    """Of the minutes that are in doubt, the events whose moments lie ahead: Stripe's sums would not be looked at before
    then. What is on its way is left alone, for its own age follows from when it was sent."""
    line = ("account", "customer", "event_name")
    minute = (events.c.at - events.c.at % MINUTE).label("minute")
    places = select(*(events.c[name] for name in line), minute).where(IS_DOUBTFUL).distinct().subquery()
    its = events.alias("its")
    inside = (its.c.at >= places.c.minute, its.c.at < places.c.minute + MINUTE)  # a range, which an index has
    moments = ("sent_at", "settled_at", "seen_at")
    is_ahead = or_(*(its.c[name] > bindparam("latest") for name in moments))
    mine = select(its.c.id).join(places, and_(*(its.c[name] == places.c[name] for name in line), *inside))
    mine = mine.where(its.c.settled_at.is_not(None), is_ahead).with_for_update(of=its, skip_locked=True)
    brought = {name: case((events.c[name] > bindparam("latest"), bindparam("at_once")), else_=events.c[name])
               for name in moments}  # fmt: skip
    return update(events).where(events.c.id.in_(mine)).values(brought)


_SETTLED_AHEAD = _settled_ahead()
_YOUNG = and_(
    HELD,
    readings.c.due.is_(None),
    readings.c.reason == TOO_OLD,
    readings.c.at >= bindparam("oldest"),
    readings.c.customer.is_not(None),
    readings.c.value.is_not(None),
)
_NOT_TOO_OLD = (
    update(readings)
    .where(free(_YOUNG))
    .values(state=next_reading_state(ReadingState.HELD, Move.ASSIGN).value, reason=None)
)


def recall_rest(connection: Connection, now: int) -> None:
    """What is not due by itself: doubts whose sums seem to have changed later than ``now``, and what seemed too old for
    Stripe, and is not. ``now`` must be no earlier than Stripe's own date: a clock that is behind would find both."""
    connection.execute(_SETTLED_AHEAD, {"latest": now + CLOCK_MARGIN, "at_once": now})
    connection.execute(_NOT_TOO_OLD, {"oldest": now - STALE_AFTER})
