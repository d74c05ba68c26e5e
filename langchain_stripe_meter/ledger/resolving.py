"""Readings on the way to their customer: who must be looked up, what was found, what waits for whom."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, func, or_, select, update

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.core.states import Move, ReadingState, next_reading_state
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.ledger import payers
from langchain_stripe_meter.ledger.schema import OPEN_READINGS, readings

RESOLVE_AT_MOST = 100
HELD_RETRY = (60, 300, 900, 3600)
"""Seconds between looks at a held reading whose customer, or whose meter, Stripe did not have."""
RECORDED = and_(OPEN_READINGS, readings.c.state == ReadingState.RECORDED.value)
RESOLVED = and_(OPEN_READINGS, readings.c.state == ReadingState.RESOLVED.value)
HELD = readings.c.state == ReadingState.HELD.value
IS_DUE = and_(HELD, readings.c.due <= bindparam("now"))


class Unknown(NamedTuple):
    """Somebody who must be looked up: on which account, and how a run named them."""

    account: str
    reference: Reference


def _named(condition: ColumnElement[bool]) -> Select[Any]:
    query = select(readings.c.account, readings.c.reference).where(condition)
    query = query.group_by(readings.c.account, readings.c.reference).order_by(func.min(readings.c.id))
    return query.limit(RESOLVE_AT_MOST)


_NAMED = _named(RECORDED), _named(and_(IS_DUE, readings.c.reference.is_not(None)))


def unresolved(connection: Connection, now: int) -> list[Unknown]:
    """Who must be looked up at Stripe now, oldest first."""
    found: list[tuple[str, str | None]] = []
    for query in _NAMED:
        found += [(row.account, row.reference) for row in connection.execute(query, {"now": now})]
    asked = ((account, _reference(connection, told)) for account, told in dict.fromkeys(found))
    return [Unknown(account, reference) for account, reference in asked if reference is not None]


def _of(unknown: Unknown) -> Any:
    return and_(readings.c.account == unknown.account, readings.c.reference == unknown.reference.text)


def _reference(connection: Connection, told: str | None) -> Reference | None:
    """The reference in a reading; one that is none can only be settled by a person."""
    try:
        return Reference.of(told or "")
    except MeteringError:
        held = next_reading_state(ReadingState.RECORDED, Move.HOLD).value
        waiting = RECORDED if told is None else or_(RECORDED, HELD)
        statement = update(readings).where(free(and_(readings.c.reference == told, waiting)))
        connection.execute(statement.values(state=held, reason="the customer's name is malformed", due=None))
        return None


def resolve(connection: Connection, unknown: Unknown, customer: str, now: int) -> int:
    """Every waiting reading of ``unknown`` belongs to ``customer``; the reference itself is erased.

    A keyed digest of it is kept, by which the spend limits know whose it was.
    """
    payers.remember(connection, unknown.account, unknown.reference.text, customer, now)
    moved = 0
    for waiting, state, move in (
        (RECORDED, ReadingState.RECORDED, Move.FOUND),
        (HELD, ReadingState.HELD, Move.ASSIGN),
    ):
        statement = (
            update(readings)
            .where(waiting, _of(unknown))
            .where(readings.c.value.is_not(None))
            .values(
                state=next_reading_state(state, move).value, customer=customer, reference=None, reason=None, due=None
            )
        )
        moved += connection.execute(statement).rowcount
    return moved


def hold(connection: Connection, unknown: Unknown, reason: str, now: int) -> int:
    """Nobody, or several, at Stripe: hold the readings of ``unknown`` and look again later."""
    waiting = [(RECORDED, _of(unknown)), (HELD, readings.c.due <= now, _of(unknown))]  # apart: each has its own index
    tries = [connection.execute(select(func.max(readings.c.tries)).where(*each)).scalar() for each in waiting]
    changes = {
        "state": next_reading_state(ReadingState.RECORDED, Move.NOT_FOUND).value,
        "reason": reason,
        "due": now + held_delay(max(each or 0 for each in tries)),
        "tries": readings.c.tries + 1,
    }
    # The held ones first: those that become held now are not due again.
    return sum(
        connection.execute(update(readings).where(*each).values(**changes)).rowcount for each in reversed(waiting)
    )


def held_delay(tries: int | None) -> int:
    """Seconds until the next look, after so many."""
    return HELD_RETRY[min(int(tries or 0), len(HELD_RETRY) - 1)]


def hold_meter(connection: Connection, account: str, event_name: str, reason: str, now: int) -> int:
    """A meter that cannot take events stops, and only it: its resolved readings wait."""
    statement = (
        update(readings)
        .where(RESOLVED)
        .where(readings.c.account == account, readings.c.event_name == event_name)
        .values(
            state=next_reading_state(ReadingState.RESOLVED, Move.HOLD).value, reason=reason, due=now + HELD_RETRY[0]
        )
    )
    return connection.execute(statement).rowcount


def release_held(connection: Connection, now: int) -> int:
    """Readings that were held for their meter's sake are tried again when they are due."""
    return connection.execute(_RELEASE, {"now": now}).rowcount


def free(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """``condition``, without the readings that another transaction holds on PostgreSQL: a shared one must not wait for
    them."""
    return readings.c.id.in_(select(readings.c.id).where(condition).with_for_update(skip_locked=True))


_RELEASE = (
    update(readings)
    .where(free(and_(IS_DUE, readings.c.customer.is_not(None), readings.c.value.is_not(None))))
    .values(state=next_reading_state(ReadingState.HELD, Move.ASSIGN).value, reason=None, due=None)
)
"""What runs at every turn is put together once: that costs more than to carry it out."""
