"""Readings on the way to their customer: who must be looked up, what was found, what waits for whom.

A reading forgets its lead's reference when Stripe's customer is found. So that a limit still knows what that lead has
used, the table ``payers`` leads from a digest of the reference to the customer. The digest is keyed with a secret of
this ledger: somebody who only has a list of addresses cannot try them against another copy of the table.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    or_,
    select,
    text,
    update,
)

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import Move, ReadingState, next_reading_state
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.ledger.schema import OPEN_READINGS, payers, readings
from langchain_stripe_meter.ledger.store import Ledger, dialect_insert, first_note, note, write_act

RESOLVE_AT_MOST = 100
HELD_RETRY = (60, 300, 900, 3600)
"""Seconds between looks at a held reading whose customer, or whose meter, Stripe did not have."""
RECORDED = and_(OPEN_READINGS, readings.c.state == ReadingState.RECORDED.value)
RESOLVED = and_(OPEN_READINGS, readings.c.state == ReadingState.RESOLVED.value)
SECRET = "payers_secret"  # noqa: S105 - the name of a note
"""The note that holds the secret of this ledger. Without it, nobody's digest can be worked out again."""
FOLDED = 32
_NOW: BindParameter[int] = bindparam("now")
HELD = and_(text("readings.state = 'held'"))


def _due(now: int | BindParameter[int]) -> ColumnElement[bool]:
    return and_(HELD, readings.c.due <= now)


def _due_for_meter(now: int | BindParameter[int]) -> ColumnElement[bool]:
    """What was held for the sake of its meter, or of its account."""
    return and_(_due(now), readings.c.customer.is_not(None), readings.c.value.is_not(None))


class Unknown(NamedTuple):
    """Somebody who must be looked up: on which account, and how a run named them."""

    account: str
    reference: Reference


def _by(column: Column[str], condition: ColumnElement[bool]) -> Select[Any]:
    """What runs at every turn is put together once: that costs more than to carry it out."""
    query = select(readings.c.account, column, func.max(readings.c.tries).label("tries")).where(condition)
    return query.group_by(readings.c.account, column).order_by(func.min(readings.c.id))


_NOT_AT_REST = readings.c.account.not_in(bindparam("resting", expanding=True))
_NAMED, _NAMED_DUE = (
    _by(readings.c.reference, and_(condition, _NOT_AT_REST)).limit(bindparam("most", type_=Integer))
    for condition in (RECORDED, and_(_due(_NOW), readings.c.reference.is_not(None)))
)


def unresolved(
    connection: Connection, now: int, resting: Sequence[str] = (), most: int = RESOLVE_AT_MOST
) -> dict[Unknown, bool]:
    """Who must be looked up at Stripe now, oldest first, and whether somebody wants it done again at once: usage that
    was held before and is on its way again. Accounts that are ``resting`` are left out; of what is held, and of what
    is not, there are at ``most`` so many."""
    found: dict[tuple[str, str | None], bool] = {}
    for row in connection.execute(_NAMED, {"resting": resting, "most": most}):
        found[row.account, row.reference] = row.tries > 0
    for row in connection.execute(_NAMED_DUE, {"now": now, "resting": resting, "most": most}):
        found.setdefault((row.account, row.reference), False)
    asked = (((account, _reference(connection, told)), again) for (account, told), again in found.items())
    return {Unknown(account, reference): again for (account, reference), again in asked if reference is not None}


def _of(unknown: Unknown) -> Any:
    return and_(readings.c.account == unknown.account, readings.c.reference == unknown.reference.text)


_read = lru_cache(maxsize=10_000)(Reference.of)
"""Whose lookups keep failing are read in every turn, while recording waits, and to check an address takes long."""


def _reference(connection: Connection, told: str | None) -> Reference | None:
    """The reference in a reading; one that is none can only be settled by a person."""
    try:
        return _read(told or "")
    except MeteringError:
        held = next_reading_state(ReadingState.RECORDED, Move.HOLD).value
        waiting = RECORDED if told is None else or_(RECORDED, HELD)
        statement = update(readings).where(free(and_(readings.c.reference == told, waiting)))
        connection.execute(statement.values(state=held, reason="the customer's name is malformed", due=None))
        return None


def resolve(connection: Connection, unknown: Unknown, customer: str, now: int) -> int:
    """Every waiting reading of ``unknown`` belongs to ``customer``; the reference itself is erased.

    A keyed digest of it is kept, by which the spend limits know whose it was; not where nothing waits, for the person
    may have been forgotten since Stripe was asked.
    """
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
    if moved:
        remember(connection, unknown.account, unknown.reference.text, customer, now)
    return moved


def hold(connection: Connection, unknown: Unknown, reason: str, now: int) -> int:
    """Nobody, or several, at Stripe: hold the readings of ``unknown`` and look again later."""
    next_reading_state(ReadingState.RECORDED, Move.NOT_FOUND)
    return _hold(connection, [and_(RECORDED, _of(unknown)), and_(_due(now), _of(unknown))], reason, now)[0]


def held_delay(tries: int | None) -> int:
    """Seconds until the next look, after so many."""
    return HELD_RETRY[min(int(tries or 0), len(HELD_RETRY) - 1)]


class Waiting(NamedTuple):
    """A meter that usage waits for: ``is_due`` where some was held for its sake and is due, ``again`` where somebody
    has put some on its way again that had been held."""

    is_due: bool
    again: bool


_WAITING = _by(readings.c.event_name, RESOLVED)
_HELD_DUE = _by(readings.c.event_name, _due_for_meter(_NOW))


def waiting_meters(connection: Connection, now: int) -> dict[str, dict[str, Waiting]]:
    """By account and event name, the meters of what could be sealed, and of what was held for their sake and is due."""
    found: dict[str, dict[str, Waiting]] = {}
    for row in connection.execute(_WAITING):
        found.setdefault(row.account, {})[row.event_name] = Waiting(is_due=False, again=row.tries > 0)
    for row in connection.execute(_HELD_DUE, {"now": now}):
        meters = found.setdefault(row.account, {})
        new = meters.get(row.event_name)
        meters[row.event_name] = Waiting(is_due=True, again=new is not None and new.again)
    return found


def hold_usage(
    connection: Connection, of: tuple[str, str | None], reason: str, now: int, due: int | None = None
) -> tuple[int, int]:
    """A meter (account and event name) or a whole account (and None) that cannot take events stops, and only it: what
    is resolved waits.

    Returns how many readings were not held before, and when they are looked at again: at ``due``, by default after
    the longer the more often they were held.
    """
    next_reading_state(ReadingState.RESOLVED, Move.HOLD)
    account, event_name = of
    mine = readings.c.account == account
    if event_name is not None:
        mine = and_(mine, readings.c.event_name == event_name)
    before = connection.execute(select(func.count()).where(RESOLVED, mine)).scalar_one()
    _, due = _hold(connection, [and_(RESOLVED, mine), and_(_due_for_meter(now), mine)], reason, now, due)
    return int(before), due


def _hold(
    connection: Connection, waiting: Sequence[ColumnElement[bool]], reason: str, now: int, due: int | None = None
) -> tuple[int, int]:
    """Hold what is ``waiting`` (apart, since each has its own index); returns how many and until when."""
    if due is None:
        tries = [connection.execute(select(func.max(readings.c.tries)).where(each)).scalar() for each in waiting]
        due = now + held_delay(max(each or 0 for each in tries))
    changes = {"state": ReadingState.HELD.value, "reason": reason[:300], "due": due, "tries": readings.c.tries + 1}
    # The held ones first: those that become held now are not due again.
    held = [connection.execute(update(readings).where(each).values(**changes)).rowcount for each in reversed(waiting)]
    return sum(held), due


def release(connection: Connection, account: str, event_name: str, now: int) -> int:
    """Readings that were held for their meter's or their account's sake are on their way again."""
    due = and_(_due_for_meter(now), readings.c.account == account, readings.c.event_name == event_name)
    changes = {"state": next_reading_state(ReadingState.HELD, Move.ASSIGN).value, "reason": None, "due": None}
    return connection.execute(update(readings).where(due).values(**changes)).rowcount


def free(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """``condition``, without the readings that another transaction holds on PostgreSQL: a shared one must not wait for
    them."""
    return readings.c.id.in_(select(readings.c.id).where(condition).with_for_update(skip_locked=True))


# -- to whom a lead led, for as long as a limit must remember it, without keeping the person


def secret(connection: Connection, now: int) -> bytes:
    """The ledger's own secret, made when it is first needed; inside the caller's transaction."""
    return bytes.fromhex(note(connection, SECRET) or first_note(connection, SECRET, secrets.token_hex(32), now))


def secret_of(ledger: Ledger) -> bytes:
    """The secret, in a transaction of its own: a run may ask, so it does not wait for couriers."""
    with ledger.write("record") as connection:
        return secret(connection, ledger.now())


def digest(key: bytes, account: str, reference: str) -> str:
    """A keyed digest of somebody whom runs of ``account`` name by ``reference`` (``email:…``), letter by letter."""
    return hmac.digest(key, f"{account}\0{reference}".encode(), "sha256").hex()


def known_by(key: bytes, account: str, reference: str) -> str:
    """The digest in the table. Its first ``FOLDED`` characters are the same however the letters of an e-mail are
    written, so that it can be forgotten; the others are not, for Stripe tells ``Ann@`` from ``ann@``."""
    exact = digest(key, account, reference)
    folded = reference.lower() if reference.startswith("email:") else reference
    return exact if folded == reference else digest(key, account, folded)[:FOLDED] + exact[FOLDED:]


def remember(connection: Connection, account: str, reference: str, customer: str, now: int) -> None:
    """``reference`` leads to ``customer``, as of now.

    Where it led to another one before, that is left as an act: some process may have counted by it.
    """
    known = known_by(secret(connection, now), account, reference)
    before = connection.execute(select(payers.c.customer).where(payers.c.digest == known)).scalar()
    if before == customer:
        return
    if before is not None:
        by = reference.partition(":")[0]
        write_act(connection, "another customer", f"a customer's {by}", "Stripe finds another customer by it now", now)
    values = {"account": account, "customer": customer, "at": now}
    statement = dialect_insert(connection, payers).values(digest=known, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))
