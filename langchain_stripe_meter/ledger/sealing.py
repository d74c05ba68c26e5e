"""From readings to meter events: one each, or one for all of a customer's on a meter in some seconds. What was held or
rejected begins again here, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, exists, func, insert, or_, select, update

from langchain_stripe_meter.core.events import (
    FUTURE_LIMIT,
    MAX_DIGITS,
    MAX_NAME_LENGTH,
    MeterEvent,
    number_text,
    significant_digits,
)
from langchain_stripe_meter.core.periods import DAY
from langchain_stripe_meter.core.states import (
    STALE_AFTER,
    EventState,
    Move,
    ReadingState,
    next_event_state,
    next_reading_state,
)
from langchain_stripe_meter.core.values import exact_sum
from langchain_stripe_meter.errors import MeteringError, logger
from langchain_stripe_meter.ledger.resolving import RESOLVED, free, held_delay
from langchain_stripe_meter.ledger.schema import ABSENT_AT_STRIPE, IS_PENDING, acts, events, readings
from langchain_stripe_meter.ledger.store import CORRECTED, Ledger, note, own_account

SEAL_AT_MOST = 1000
REJECTED_LATER = "rejected later"
"""The act that says that Stripe refused an event which it had taken."""
_RESENT = re.compile(r"-r\d+\Z")
TOO_OLD = "older than 34 days: Stripe would refuse it; re-time it or write it off"
MALFORMED = (ValueError, ArithmeticError, MeteringError)
"""What a row raises that no reading of ours could have become: a person must look at it."""

Row = Mapping[Any, Any]

_SEALABLE = (
    select(readings)
    .where(RESOLVED, readings.c.at <= bindparam("latest"))
    .where(readings.c.account.in_(bindparam("accounts", expanding=True)))
    .order_by(readings.c.id)
    .limit(SEAL_AT_MOST)
    .with_for_update(skip_locked=True)
)
_HOLD_STALE = (
    update(readings)
    .where(free(and_(RESOLVED, readings.c.at < bindparam("oldest"))))
    .values(state=next_reading_state(ReadingState.RESOLVED, Move.HOLD).value, reason=TOO_OLD, due=None)
)


def seal(connection: Connection, now: int, roll_up: int | None = None, accounts: Sequence[str] = ("",)) -> int:
    """Make meter events of resolved readings; what is too old for Stripe is held, what lies ahead waits.

    With ``roll_up`` (seconds), a customer's readings on one meter within such a span become one event, once the span
    is over. ``accounts`` are those that may be sealed.
    """
    connection.execute(_HOLD_STALE, {"oldest": now - STALE_AFTER})
    latest = now + FUTURE_LIMIT if roll_up is None else now - now % roll_up - 1
    rows = connection.execute(_SEALABLE, {"latest": latest, "accounts": accounts}).mappings().all() if accounts else []
    sound = _nameless(connection, [row for row in rows if _is_sound(connection, row)])
    past = _from_the_past(connection) if sound else None
    last = past["reading"] if past else 0
    old, new = [row for row in sound if row["id"] <= last], [row for row in sound if row["id"] > last]
    alone = _corrections(connection, sound) if roll_up else set()
    _seal(connection, rolled_up(new, roll_up, alone), now)
    _seal(connection, rolled_up(old, roll_up, alone), now, past, rolls_up=roll_up is not None)
    return len(rows)


def _corrections(connection: Connection, rows: list[Row]) -> set[str]:
    """The keys of what a person corrected by, and may take back."""
    mine = acts.c.subject.in_([row["key"] for row in rows])
    return set(connection.execute(select(acts.c.subject).where(acts.c.act == CORRECTED, mine)).scalars())


def _nameless(connection: Connection, rows: list[Row]) -> list[Row]:
    """The rows, those of the key's own account without its name, as Stripe's reports have it."""
    own = own_account(connection) if any(row["account"] for row in rows) else None
    return rows if own is None else [{**row, "account": ""} if row["account"] == own else row for row in rows]


def _from_the_past(connection: Connection) -> dict[str, Any] | None:
    """The last time that the ledger was restored from a backup, if it ever was (see ledger/epoch.py)."""
    found = note(connection, "restored")
    return None if found is None else json.loads(found)


def _unknown_since(group: list[Row], past: Mapping[str, Any], *, rolls_up: bool) -> int:
    """Since when a restored reading may have been sent under this identifier; 0 if it may have had another one."""
    return 0 if rolls_up or past["rolled_up"] else min(row["at"] for row in group)


def _seal(
    connection: Connection,
    groups: list[list[Row]],
    now: int,
    past: Mapping[str, Any] | None = None,
    *,
    rolls_up: bool = False,
) -> None:
    if not groups:
        return
    made = [_event_row(group, now) for group in groups]
    _heed_acts(connection, made, now)
    if past is not None:
        for event, group in zip(made, groups, strict=True):
            event["first_unknown_at"] = _unknown_since(group, past, rolls_up=rolls_up)
    connection.execute(insert(events), made)
    event_id = select(events.c.id).where(events.c.identifier == bindparam("its_event")).scalar_subquery()
    sealed = next_reading_state(ReadingState.RESOLVED, Move.SEAL).value
    connection.execute(
        update(readings).where(readings.c.id == bindparam("row_id")).values(state=sealed, event_id=event_id),
        [
            {"row_id": row["id"], "its_event": event["identifier"]}
            for event, group in zip(made, groups, strict=True)
            for row in group
        ],
    )


def rolled_up(rows: Iterable[Row], seconds: int | None, corrections: Collection[str] = ()) -> list[list[Row]]:
    """Readings that become one event: of one customer, meter, kind and span, which ends at midnight (UTC) at the
    latest, as a billing period may. What takes back, and the ``corrections`` with these keys, stay by themselves."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        alone = seconds is None or Decimal(row["value"]) <= 0 or row["key"] in corrections
        same = (row["account"], row["customer"], row["event_name"], row["dimensions"])
        span = (row["at"] // DAY, row["at"] // (seconds or 1))
        groups.setdefault((row["id"],) if alone else (*same, *span), []).append(row)
    return [part for group in groups.values() for part in _billable(group)]


def _billable(group: list[Row]) -> list[list[Row]]:
    """The group, unless its sum has more digits than Stripe takes."""
    fits = len(group) == 1 or significant_digits(_sum(group)) <= MAX_DIGITS
    return [group] if fits else [[row] for row in group]


def _sum(group: list[Row]) -> Decimal:
    return exact_sum(Decimal(row["value"]) for row in group)


def _is_sound(connection: Connection, row: Row) -> bool:
    """Whether Stripe could take it at all; what it could not is held, and stops nobody else."""
    try:
        meter_event(row, row["key"])
    except MALFORMED as error:
        held = next_reading_state(ReadingState.RESOLVED, Move.HOLD).value
        statement = update(readings).where(readings.c.id == row["id"])
        connection.execute(statement.values(state=held, reason=str(error)[:300], due=None))
        logger.warning("stripe-meter: the reading %s is held: %s", row["key"], error)
        return False
    return True


def meter_event(row: Row, identifier: str) -> MeterEvent:
    """The event that a row stands for; raises one of ``MALFORMED`` where it can be none."""
    return MeterEvent(
        event_name=row["event_name"],
        customer=row["customer"],
        value=Decimal(row["value"]),
        identifier=identifier,
        timestamp=row["at"],
        dimensions=json.loads(row["dimensions"]) if row["dimensions"] else {},
        account=row["account"],
    )


def _heed_acts(connection: Connection, made: list[dict[str, Any]], now: int) -> None:
    """Give those a fresh identifier whose own Stripe took and then refused: by that, it would bill nothing again. And
    mind those of which it was said that Stripe lacks them.

    (They come back when the customer of such an event was gone, so that its readings were held and assigned anew.)
    """
    ours = [event["identifier"] for event in made]
    query = select(acts.c.subject, acts.c.act).where(
        acts.c.act.in_((REJECTED_LATER, ABSENT_AT_STRIPE)), acts.c.subject.in_(ours)
    )
    found = {(row.subject, row.act) for row in connection.execute(query)}
    taken = set(ours)
    for event in made:
        identifier = event["identifier"]
        event["resent"], event["seen_at"] = 0, now if (identifier, ABSENT_AT_STRIPE) in found else None
        if (identifier, REJECTED_LATER) in found:
            event["resent"], event["identifier"] = fresh_identifier(connection, identifier, 0, taken)
            event["seen_at"] = None
            taken.add(event["identifier"])


def fresh_identifier(
    connection: Connection, identifier: str, resent: int, taken: Collection[str] = ()
) -> tuple[int, str]:
    """How often the event got a new identifier by now, and one that Stripe has never been sent, nor is among those
    ``taken``."""
    lead = _RESENT.sub("", identifier) if resent else identifier
    number = resent
    while True:
        number += 1
        end = f"-r{number}"
        fresh = f"{lead[: MAX_NAME_LENGTH - len(end)]}{end}"
        used = exists().where(events.c.identifier == fresh)
        refused = exists().where(acts.c.act == REJECTED_LATER, acts.c.subject == fresh)
        if fresh not in taken and not connection.execute(select(or_(used, refused))).scalar():
            return number, fresh


def _event_row(group: list[Row], now: int) -> dict[str, Any]:
    first = group[0]
    same = {name: first[name] for name in ("account", "event_name", "customer", "dimensions", "at")}
    value, identifier = (
        (first["value"], first["key"]) if len(group) == 1 else (number_text(_sum(group)), _identifier(group))
    )
    return {**same, "value": value, "identifier": identifier, "state": EventState.PENDING.value, "due": now}


def _identifier(group: list[Row]) -> str:
    """The same for the same readings, whoever seals them."""
    keys = "/".join(sorted(row["key"] for row in group))
    return f"rollup-{hashlib.sha256(keys.encode()).hexdigest()[:40]}"


def unseal(connection: Connection, event_id: int, reason: str, now: int) -> None:
    """Stripe has not taken an event because its customer or meter is gone: its readings are held, the event is removed.

    They keep the customer, and are tried again when they are due or assigned to somebody else by a person.
    """
    tries = connection.execute(select(func.max(readings.c.tries)).where(readings.c.event_id == event_id)).scalar()
    _remove(connection, [event_id], Move.UNSEAL, reason, now + held_delay(tries))


def withdraw(connection: Connection, account: str, reason: str, due: int) -> None:
    """An account is closed to us: of what is to be sent there, all that Stripe surely has not is held instead."""
    next_event_state(EventState.PENDING, Move.NO_ACCESS)
    mine = (IS_PENDING, events.c.account == account, events.c.first_unknown_at.is_(None))
    query = select(events.c.id).where(*mine).limit(SEAL_AT_MOST)
    while ids := connection.execute(query).scalars().all():
        _remove(connection, ids, Move.UNSEAL, reason, due)


def _remove(connection: Connection, ids: Sequence[int], move: Move, reason: str, due: int | None) -> None:
    """Remove events, and hold their readings instead."""
    held = next_reading_state(ReadingState.SEALED, move).value
    changes = {"state": held, "event_id": None, "reason": reason[:300], "due": due, "tries": readings.c.tries + 1}
    connection.execute(update(readings).where(readings.c.event_id.in_(ids)).values(**changes))
    connection.execute(delete(events).where(events.c.id.in_(ids)))


def withdraw_stale(connection: Connection, which: ColumnElement[bool], now: int) -> int:
    """Of the pending or rejected events that are ``which``, remove some that Stripe surely has not and would refuse
    for their age; their readings are held for a person. Returns how many."""
    is_stale = and_(events.c.at < now - STALE_AFTER, events.c.first_unknown_at.is_(None))
    query = select(events.c.id).where(which, is_stale).limit(SEAL_AT_MOST).with_for_update(skip_locked=True)
    ids = connection.execute(query).scalars().all()
    if ids:
        _remove(connection, ids, Move.TOO_OLD, TOO_OLD, None)
        logger.warning("stripe-meter: %d meter events are held: %s", len(ids), TOO_OLD)
    return len(ids)


def look_again(ledger: Ledger) -> int:
    """Put back on their way the held readings that are due for their next look, and those whose meter was wrong.

    The latter are known by their reason, which is ours. What Stripe itself refused when it was sent, and whoever it did
    not know, wait until they are due: asking for them at every call would be many requests. Returns how many.
    """
    due = readings.c.due <= ledger.now()
    with ledger.write() as connection:
        moved = 0
        for known, wanted, move in (
            (readings.c.reference, due, Move.TRY_AGAIN),
            (readings.c.customer, or_(due, ~readings.c.reason.startswith("HTTP ")), Move.ASSIGN),
        ):
            again = update(readings).where(readings.c.state == ReadingState.HELD.value, known.is_not(None))
            again = again.where(readings.c.value.is_not(None), readings.c.due.is_not(None), wanted)
            state = next_reading_state(ReadingState.HELD, move).value
            moved += connection.execute(again.values(state=state, due=None)).rowcount
        return moved


def retry(ledger: Ledger) -> int:
    """Try everything again that waits for something outside: unknown customers, and rejected events.

    A rejected event is known not to be billed, so it may go out again under its own identifier. What is too old for
    Stripe is not tried, but held for a person to re-time it or write it off.
    """
    with ledger.write() as connection:
        now, moved = ledger.now(), 0
        held = update(readings).where(readings.c.state == ReadingState.HELD.value, readings.c.value.is_not(None))
        named = held.where(readings.c.reference.is_not(None))
        of_customers = held.where(readings.c.customer.is_not(None))
        connection.execute(of_customers.where(readings.c.at < now - STALE_AFTER).values(reason=TOO_OLD, due=None))
        young = of_customers.where(readings.c.at >= now - STALE_AFTER)
        for again, move in ((named, Move.TRY_AGAIN), (young, Move.ASSIGN)):
            state = next_reading_state(ReadingState.HELD, move).value
            moved += connection.execute(again.values(state=state, due=None)).rowcount
        rejected = events.c.state == EventState.REJECTED.value
        while withdraw_stale(connection, rejected, now):
            continue
        pending_again = next_event_state(EventState.REJECTED, Move.TRY_AGAIN).value
        resend = update(events).where(rejected).values(state=pending_again, due=now, settled_at=None)
        return moved + connection.execute(resend).rowcount
