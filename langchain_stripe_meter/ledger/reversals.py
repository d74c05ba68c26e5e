"""What may become of an event after Stripe took it: Stripe refuses it later, or we take it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select, update

from langchain_stripe_meter.core.states import EventState, Move, ReadingState, next_event_state
from langchain_stripe_meter.errors import ConfigurationError, IllegalMoveError
from langchain_stripe_meter.ledger.schema import (
    CANCEL_ASKED,
    CANCEL_REFUSED,
    CANCELLED,
    CANCELLED_AT,
    WISHES,
    acts,
    events,
    readings,
)
from langchain_stripe_meter.ledger.sealing import REJECTED_LATER, fresh_identifier
from langchain_stripe_meter.ledger.store import Ledger, write_act

CANCEL_SECONDS = 86_400
"""Stripe cancels an event within 24 hours of receiving it."""
MAX_REASON = 300


def reject_later(connection: Connection, row: Any, code: str, now: int) -> str | None:
    """Stripe refused an event after it took it: rejected, and under an identifier that Stripe has not seen.

    Returns the new identifier; None where the event has moved on meanwhile, or was being cancelled: it is, then.
    """
    if cancelling(connection, row.identifier) == CANCEL_ASKED:
        cancel(connection, row.id, row.identifier, f"Stripe rejected it: {code}"[:MAX_REASON], now)
        return None
    state = next_event_state(EventState(row.state), Move.REJECTED_LATER)
    number, identifier = fresh_identifier(connection, row.identifier, row.resent)
    changed = connection.execute(
        update(events)
        .where(events.c.id == row.id, events.c.state == row.state, events.c.identifier == row.identifier)
        .values(
            state=state.value,
            identifier=identifier,
            resent=number,
            error=code[:MAX_REASON],
            settled_at=now,
            due=now,
            attempts=0,  # a new identifier: nothing that is known of the old one holds for it
            sent_at=None,
            first_unknown_at=None,
            seen_value=None,
            seen_at=None,
            request_id=None,
        )
    ).rowcount
    if not changed:
        return None
    write_act(connection, REJECTED_LATER, row.identifier, f"{code}; it is now {identifier}", now)
    return identifier


@dataclass(frozen=True, slots=True)
class Cancellable:
    """A delivered event that Stripe may still cancel, or may have cancelled: ``was_asked`` says that what came of an
    earlier wish is unknown."""

    id: int
    identifier: str
    event_name: str
    account: str
    was_asked: bool


def ask_to_cancel(ledger: Ledger, identifier: str) -> Cancellable | None:
    """Write down that Stripe is about to be asked, so that nothing else concludes from what it then lacks.

    None where it is cancelled already.
    """
    with ledger.write() as connection:
        now = ledger.now()
        row = event_of(connection, identifier)
        if (known := cancelling(connection, row.identifier)) == CANCELLED:
            return None
        named_move(next_event_state, EventState(row.state), Move.CANCEL, f"The meter event {row.identifier}")
        was_asked = known == CANCEL_ASKED
        if not was_asked:
            if now - row.settled_at > CANCEL_SECONDS:
                raise IllegalMoveError(
                    f"{row.identifier} was delivered more than 24 hours ago, and Stripe no longer cancels it. Correct "
                    "the customer's total instead: correct(...)."
                )
            write_act(connection, CANCEL_ASKED, row.identifier, "", now)
        return Cancellable(row.id, row.identifier, row.event_name, row.account, was_asked)


def may_be_cancelled(connection: Connection, row: Any, now: int) -> bool:
    """Whether an event that is delivered, for all that is known, was to be cancelled, and Stripe no longer does that:
    a person must see what came of it."""
    may_ask = 0 <= now - row.settled_at <= CANCEL_SECONDS  # not by a clock that was ahead
    return (
        row.state == EventState.DELIVERED.value
        and not may_ask
        and cancelling(connection, row.identifier) == CANCEL_ASKED
    )


def maybe_cancelled(ledger: Ledger, since: int, until: int) -> list[Any]:
    """The delivered events dated from ``since`` to before ``until`` (Unix seconds) of which nobody knows whether they
    are cancelled: each with ``account``, ``event_name``, ``customer`` and ``identifier``, in order."""
    columns = (events.c.account, events.c.event_name, events.c.customer, events.c.identifier)
    asked = select(acts.c.subject).where(acts.c.act == CANCEL_ASKED)
    standing = (events.c.identifier.in_(asked), CANCELLED_AT.element.is_not(None))
    query = select(*columns).where(events.c.state == EventState.DELIVERED.value, *standing)
    with ledger.read() as connection:
        dated = query.where(events.c.at >= since, events.c.at < until).order_by(events.c.id)
        return list(connection.execute(dated))


def settle_cancel(ledger: Ledger, event: Cancellable, refused: str | None) -> bool:
    """Write down what Stripe said to the wish to cancel: ``refused`` is its definite no, which says nothing of an
    earlier wish. Returns whether the event is cancelled, which it also is if Stripe rejected it meanwhile."""
    with ledger.write() as connection:
        if cancelling(connection, event.identifier) == CANCELLED:
            return True
        if refused is not None:
            if not event.was_asked:
                write_act(connection, CANCEL_REFUSED, event.identifier, refused[:MAX_REASON], ledger.now())
            return False
        if not cancel(connection, event.id, event.identifier, "", ledger.now()):
            raise IllegalMoveError(f"{event.identifier} was rejected while it was being cancelled: write it off.")
        return True


def cancel(connection: Connection, event_id: int, identifier: str, detail: str, now: int) -> bool:
    """Write down that a delivered event is cancelled; False where it has moved on meanwhile."""
    delivered = (events.c.state == EventState.DELIVERED.value, events.c.identifier == identifier)
    state = next_event_state(EventState.DELIVERED, Move.CANCEL).value
    changed = connection.execute(update(events).where(events.c.id == event_id, *delivered).values(state=state)).rowcount
    if changed:
        write_act(connection, CANCELLED, identifier, detail, now)
    return changed > 0


def cancelling(connection: Connection, identifier: str) -> str | None:
    """The last of what is written down of the wish to cancel it: CANCEL_ASKED, CANCELLED or CANCEL_REFUSED."""
    wish = (acts.c.subject == identifier, acts.c.act.in_(WISHES))
    return connection.execute(select(acts.c.act).where(*wish).order_by(acts.c.id.desc()).limit(1)).scalar()


def event_of(connection: Connection, identifier: str) -> Any:
    """The event with this identifier, or the one that a reading with this identifier became."""
    row = connection.execute(select(events).where(events.c.identifier == identifier)).first()
    if row is not None:
        return row
    reading = connection.execute(select(readings).where(readings.c.key == identifier)).first()
    if reading is None:
        raise ConfigurationError(
            f"The ledger has nothing with the identifier {identifier!r:.120}. See: stripe-meter tail"
        )
    if reading.event_id is None:
        raise IllegalMoveError(f"The reading {identifier} is {reading.state} and was not sent to Stripe.")
    row = connection.execute(select(events).where(events.c.id == reading.event_id)).one()
    parts = select(func.count()).where(readings.c.event_id == reading.event_id)
    if (count := connection.execute(parts).scalar_one()) > 1:
        raise IllegalMoveError(
            f"The reading {identifier} is one of {count} in the meter event {row.identifier}, which only goes whole."
        )
    return row


_INSTEAD = {
    ReadingState.SEALED.value: "It is part of a meter event (stripe-meter tail): correct() what that bills wrongly.",
    EventState.PENDING.value: "It is still to be sent: flush(), and look again.",
    EventState.SENDING.value: "It is being sent: flush(), and look again.",
    EventState.DELIVERED.value: "It is billed: cancel() it within 24 hours, or correct() the customer's total.",
    EventState.DOUBTFUL.value: "See: stripe-meter doubtful",
}
"""What can be done with what is in a state in which something else cannot."""


def named_move(table: Callable[[Any, Move], Any], state: Any, move: Move, name: str) -> str:
    """The state after ``move``; a refusal that names what it is about."""
    try:
        return str(table(state, move).value)
    except IllegalMoveError:
        instead = f" {_INSTEAD[state]}" if state in _INSTEAD else ""
        raise IllegalMoveError(f"{name} is {state}, so it cannot be changed this way ({move}).{instead}") from None
