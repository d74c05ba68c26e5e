"""Doubtful events in the ledger: what is known of their minutes, and the moves that end the doubt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, bindparam, or_, select, update

from langchain_stripe_meter.core.doubts import (
    KNOWN_THERE,
    LOOK_AGAIN,
    MINUTE,
    PERSON,
    SUMS_LAG,
    Facts,
    Look,
    Trace,
    Verdict,
)
from langchain_stripe_meter.core.events import number_text
from langchain_stripe_meter.core.periods import DAY
from langchain_stripe_meter.core.states import EventState, Move, next_event_state
from langchain_stripe_meter.core.tables import table_of
from langchain_stripe_meter.errors import ConfigurationError, IllegalMoveError, logger
from langchain_stripe_meter.ledger.reversals import reject_later
from langchain_stripe_meter.ledger.schema import (
    ABSENT_AT_STRIPE,
    CANCELLED_AT,
    IS_CONTRADICTED,
    IS_DOUBTFUL,
    events,
    pruned,
)
from langchain_stripe_meter.ledger.store import Ledger, own_account, write_act


class Place(NamedTuple):
    """Whose usage, on which meter, in which minute (Unix seconds of its beginning)."""

    account: str
    customer: str
    event_name: str
    minute: int


@dataclass(frozen=True, slots=True)
class Doubtful:
    """One doubtful event: Stripe may have it or not. ``reason`` says why, and what a person must know.

    ``at`` is when it was used, ``unknown_since`` when it was first sent with an unknown outcome, in Unix seconds.
    """

    identifier: str
    event_name: str
    customer: str
    value: Decimal
    at: int
    unknown_since: int | None
    reason: str
    account: str = ""


class DoubtfulList(list[Doubtful]):
    """Doubtful events; a table in a notebook."""

    def _repr_html_(self) -> str:
        return table_of(Doubtful, self)


def doubtful(ledger: Ledger) -> DoubtfulList:
    """Every doubtful event, oldest first."""
    with ledger.read() as connection:
        rows = connection.execute(select(events).where(IS_DOUBTFUL).order_by(events.c.id)).all()
    return DoubtfulList(
        Doubtful(
            identifier=row.identifier,
            event_name=row.event_name,
            customer=row.customer,
            value=Decimal(row.value),
            at=row.at,
            unknown_since=row.first_unknown_at,
            reason=row.error or "",
            account=row.account,
        )
        for row in rows
    )


def settle_doubt(ledger: Ledger, identifiers: Collection[str], *, delivered: bool) -> int:
    """A person says whether Stripe has these doubtful events; those that it does not have are sent again, or held where
    they are too old for it.

    Returns how many moved. Moves none and raises, by name, ``IllegalMoveError`` where one is not in doubt, or Stripe
    knew it though it was called absent, and its sums were not read since; ``ConfigurationError`` where the ledger does
    not have it.
    """
    now, moved = ledger.now(), 0
    with ledger.write() as connection:
        for identifier in dict.fromkeys(identifiers):
            row = _doubted(connection, identifier)
            if row.is_contradicted and not delivered:
                _send_anew(connection, row, now)
            else:
                _move(connection, row, Move.SEEN_AT_STRIPE if delivered else Move.ABSENT_AT_STRIPE, now)
            said = "Stripe has it" if delivered else "Stripe does not have it"
            write_act(connection, "doubt settled", identifier, said, now)
            moved += 1
    return moved


def _doubted(connection: Connection, identifier: str) -> Any:
    """The doubtful event with this identifier; a refusal that names it where there is none."""
    query = select(events, IS_CONTRADICTED).where(events.c.identifier == identifier)
    row = connection.execute(query).first()
    if row is None:
        raise ConfigurationError(
            f"The ledger has no meter event with the identifier {identifier!r:.120}. See: stripe-meter doubtful"
        )
    if row.state != EventState.DOUBTFUL.value:
        raise IllegalMoveError(f"The meter event {identifier} is {row.state}, not in doubt. See: stripe-meter doubtful")
    return row


_IS_DUE = (
    select(events.c.id)
    .where(IS_DOUBTFUL, or_(events.c.seen_at.is_(None), events.c.seen_at <= bindparam("seen")))
    .where(or_(events.c.settled_at.is_(None), events.c.settled_at <= bindparam("settled")))
    .limit(1)
)


def any_due(connection: Connection, now: int) -> bool:
    """Whether there is a doubtful event that could be looked at; quick, since there hardly ever is."""
    return connection.execute(_IS_DUE, {"seen": now - LOOK_AGAIN, "settled": now - SUMS_LAG}).first() is not None


def _neighbours() -> Select[Any]:
    minute = events.c.at - events.c.at % MINUTE
    line = (events.c.account, events.c.customer, events.c.event_name)
    places = select(*line, minute.label("minute")).where(IS_DOUBTFUL).distinct().subquery()
    same = [column == places.c[column.name] for column in line]
    query = select(events, places.c.minute, CANCELLED_AT, IS_CONTRADICTED)
    inside = (events.c.at >= places.c.minute, events.c.at < places.c.minute + MINUTE)  # a range, which an index has
    return query.join(places, and_(*same, *inside)).order_by(events.c.id)


_NEIGHBOURS = _neighbours()


def facts(connection: Connection) -> dict[Place, Facts]:
    """What is known of every minute that has a doubtful event."""
    found: dict[Place, list[Trace]] = {}
    for row in connection.execute(_NEIGHBOURS):
        found.setdefault(Place(row.account, row.customer, row.event_name, row.minute), []).append(_trace(row))
    return {place: Facts(tuple(traces), _is_pruned(connection, place)) for place, traces in found.items()}


def _trace(row: Any) -> Trace:
    return Trace(
        id=row.id,
        identifier=row.identifier,
        value=Decimal(row.value),
        state=EventState(row.state),
        at=row.at,
        sent_at=row.sent_at,
        settled_at=row.settled_at,
        first_unknown_at=row.first_unknown_at,
        seen_value=None if row.seen_value is None else Decimal(row.seen_value),
        seen_at=row.seen_at,
        error=row.error,
        cancelled_at=row.cancelled_at,
        is_contradicted=row.is_contradicted,
    )


_PRUNED = select(pruned.c.day).where(
    pruned.c.account.in_(bindparam("accounts", expanding=True)),
    pruned.c.event_name == bindparam("event_name"),
    pruned.c.customer == bindparam("customer"),
    pruned.c.day == bindparam("day"),
    pruned.c.state.in_((EventState.DELIVERED.value, EventState.WRITTEN_OFF.value)),  # Stripe may have the latter, too
)


def _is_pruned(connection: Connection, place: Place) -> bool:
    names = [place.account] if place.account else ["", own_account(connection) or ""]
    asked = {**place._asdict(), "accounts": names, "day": place.minute - place.minute % DAY}
    return connection.execute(_PRUNED, asked).first() is not None


def store(ledger: Ledger, doubts: tuple[Trace, ...], look: Look, verdict: Verdict, now: int) -> list[str]:
    """Remember a look and carry out its verdict, unless a doubt has changed meanwhile: then nothing is changed. Returns
    for what reasons a person is needed, where those are new."""
    new = []
    with ledger.write() as connection:
        query = select(events.c.id, events.c.seen_at).where(IS_DOUBTFUL, events.c.id.in_([one.id for one in doubts]))
        known = {row.id: row.seen_at for row in connection.execute(query)}
        if known != {one.id: one.seen_at for one in doubts}:
            return []
        for one in doubts:
            if verdict.move is None:
                reason = verdict.reason_of(one)
                _remember(connection, one, look, reason, now)
                if reason is not None and reason != one.error:
                    new.append(reason)
            else:
                _move(connection, one, verdict.move, now)
                logger.info("stripe-meter: the doubtful meter event %s is %s", one.identifier, verdict.move)
    return new


def _remember(connection: Connection, doubt: Trace, look: Look, reason: str | None, now: int) -> None:
    seen = {"seen_value": None if look.value is None else number_text(look.value), "seen_at": now}
    told = {} if reason is None else {"error": reason}
    connection.execute(update(events).where(events.c.id == doubt.id).values(**seen, **told))


def _move(connection: Connection, doubt: Any, move: Move, now: int) -> None:
    """Out of doubt. What Stripe does not have has no unknown outcome any more: its safe window begins anew. What it
    has is as if sent now: no report of before is about it."""
    state = next_event_state(EventState.DOUBTFUL, move)
    values: Mapping[str, Any] = {"state": state.value, "seen_value": None, "seen_at": None, "error": None}
    if state is EventState.PENDING:  # it stays known that somebody has looked, also if it must be sealed anew
        write_act(connection, ABSENT_AT_STRIPE, doubt.identifier, "", now)
        values = {**values, "seen_at": now, "first_unknown_at": None, "settled_at": None, "due": now}
    else:
        values = {**values, "first_unknown_at": None, "sent_at": now, "settled_at": now}
    connection.execute(update(events).where(events.c.id == doubt.id).values(**values))


def _send_anew(connection: Connection, row: Any, now: int) -> None:
    """Send what Stripe refused later, under an identifier that it does not know."""
    if not (row.error or "").startswith(PERSON):
        raise IllegalMoveError(
            f"Stripe knows the identifier of {row.identifier}, which was called absent before. Wait until its sums are "
            "read twice, after about two hours (stripe-meter doubtful says what they tell), or settle it as delivered."
        )
    reject_later(connection, row, KNOWN_THERE, now)
    pending = next_event_state(EventState.REJECTED, Move.TRY_AGAIN).value
    again = {"state": pending, "error": None, "settled_at": None}
    connection.execute(update(events).where(events.c.id == row.id).values(**again))
