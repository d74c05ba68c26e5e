"""What a person or a webhook decides about usage that is recorded already. Every act is written down where it happens.

Each function that changes something takes all that it is given, or refuses by name and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from langchain_stripe_meter.core.events import (
    check_account,
    check_customer_id,
    check_event_name,
    check_timestamp,
    check_value,
    derive_identifier,
    number_text,
)
from langchain_stripe_meter.core.states import (
    STALE_AFTER,
    EventState,
    Move,
    ReadingState,
    next_event_state,
    next_reading_state,
)
from langchain_stripe_meter.core.tables import table_of
from langchain_stripe_meter.core.tenants import NO_TENANT
from langchain_stripe_meter.errors import ConfigurationError, IllegalMoveError, InvalidValueError
from langchain_stripe_meter.ledger.epoch import restored_up_to
from langchain_stripe_meter.ledger.jobs import check_same
from langchain_stripe_meter.ledger.reversals import MAX_REASON, cancel, event_of, may_be_cancelled, named_move
from langchain_stripe_meter.ledger.schema import acts, events, readings
from langchain_stripe_meter.ledger.store import ASSIGNED, CORRECTED, Entry, Ledger, insert_or_ignore, write_act
from langchain_stripe_meter.ledger.views import Held, Readings, named

RETIMED, WRITTEN_OFF = "re-timed", "written off"
UNEXPLAINED = "unexplained"
_IDS_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Act:
    """One decision: ``at`` is Unix seconds, ``subject`` the identifier of the reading or event that it concerns."""

    at: int
    act: str
    subject: str
    detail: str


class ActList(list[Act]):
    """Acts, oldest first; a table in a notebook."""

    def _repr_html_(self) -> str:
        return table_of(Act, self)


def every_act(ledger: Ledger, most: int = 1000) -> ActList:
    """The newest acts, oldest first."""
    with ledger.read() as connection:
        rows = connection.execute(select(acts).order_by(acts.c.id.desc()).limit(most)).all()
    return ActList(Act(row.at, row.act, row.subject, row.detail or "") for row in reversed(rows))


# -- corrected


def correct(
    ledger: Ledger,
    customer: str,
    event_name: str,
    value: object,
    *,
    reason: str,
    id: str,
    at: int | None = None,
    account: str = "",
) -> str:
    """Record a correction, a reading of its own, and the act; returns its identifier.

    The same ``id`` again changes nothing, and is refused where it stands for something else.
    """
    if not isinstance(id, str) or not id:
        raise ConfigurationError("correct() needs id=, the name of the correction, so that it is billed once.")
    amount = check_value(value)
    if not amount:
        raise InvalidValueError("A correction by 0 changes nothing. Give the difference, such as -500.")
    now = ledger.now()
    entry = Entry(
        key=derive_identifier(f"correction/{id}", check_event_name(event_name), account=check_account(account)),
        event_name=event_name,
        value=amount,
        at=now if at is None else check_timestamp(at, now),
        state=ReadingState.RESOLVED,
        customer=check_customer_id(customer),
        account=account,
    )
    said = check_reason(reason)
    with ledger.write() as connection:
        if insert_or_ignore(connection, readings, entry.columns()):
            detail = f"{event_name} of {customer} by {number_text(amount)}: {said}"
            write_act(connection, CORRECTED, entry.key, detail, now)
        else:
            check_same(connection, [entry], id)
    return entry.key


def check_reason(reason: object) -> str:
    """Why a person did something, in one line. It is kept and shown: it must name nobody."""
    if not isinstance(reason, str) or not reason.strip() or not reason.isprintable() or len(reason) > MAX_REASON:
        raise ConfigurationError(f"reason= must be one line of 1 to {MAX_REASON} characters that names nobody.")
    return reason.strip()


# -- assigned, re-timed and written off


def assign(
    ledger: Ledger,
    held: Readings,
    customer: str | None = None,
    value: object = None,
    account: str | None = None,
) -> int:
    """A person says who pays for held readings, how much each where no amount is known, and on which ``account`` where
    ``tenant=`` could not tell it.

    Returns how many moved. Whom a reading names is looked up once it has its amount; what still lacks its customer or
    its amount stays held. Raises, by name, and changes nothing where one is not held (``IllegalMoveError``), is not
    there or lacks its account, or where one customer would pay on several accounts (``ConfigurationError``).
    """
    if customer is None and value is None:
        raise ConfigurationError("assign() takes a customer ('cus_…'), a value, or both.")
    ids = named(held, "assign", int)
    changes: dict[str, Any] = {} if account is None else {"account": check_account(account)}
    if customer is not None:
        changes |= {"customer": check_customer_id(customer), "reference": None}
    amount = None if value is None else number_text(check_value(value))
    with ledger.write() as connection:
        rows = _readings(connection, ids)
        for row in rows:
            _check_assigned(row, account, customer)
        accounts = sorted({row.account or "the key's own" for row in rows})
        if customer is not None and account is None and len(accounts) > 1:
            raise ConfigurationError(
                f"{customer} is a customer of one account, but these readings are of {' and '.join(accounts)}. Assign "
                "those of each account by themselves."
            )
        moved = sum(_assign(connection, part, changes, amount) for part in _parts(ids))
        said = ", ".join(str(one) for one in (customer, amount, account) if one)
        write_act(connection, ASSIGNED, f"{len(ids)} held readings", said, ledger.now())
        return moved


def _check_assigned(row: Any, account: str | None, customer: str | None) -> None:
    name = f"The reading {row.id} ({row.key})"
    if row.state != ReadingState.HELD.value:
        raise IllegalMoveError(f"{name} is {row.state}, not held. See: stripe-meter held")
    if not (row.reason or "").startswith(NO_TENANT):
        if account not in (None, row.account):
            raise ConfigurationError(f"{name} is on {row.account or 'the account of the key'}, and stays there.")
    elif account is None and customer is not None:
        raise ConfigurationError(
            f"{name} has no account ({row.reason}). Say whose it is with account='acct_…' ('' for the key's own)."
        )


def _assign(connection: Connection, ids: Sequence[int], changes: Mapping[str, Any], amount: str | None) -> int:
    mine = update(readings).where(readings.c.id.in_(ids), readings.c.state == ReadingState.HELD.value)
    unknown, moved = mine.where(readings.c.value.is_(None)), 0
    if changes:
        connection.execute(mine.values(**changes))
    if amount is not None:
        recorded = next_reading_state(ReadingState.HELD, Move.TRY_AGAIN).value
        named = unknown.where(readings.c.reference.is_not(None))
        moved = connection.execute(named.values(value=amount, state=recorded, reason=None)).rowcount
        connection.execute(unknown.values(value=amount))
    ready = mine.where(readings.c.customer.is_not(None), readings.c.value.is_not(None))
    resolved = next_reading_state(ReadingState.HELD, Move.ASSIGN).value
    return moved + connection.execute(ready.values(state=resolved, reason=None, due=None)).rowcount


def retime(ledger: Ledger, held: Readings, at: int | None = None, *, not_billed: bool = False) -> int:
    """Give held readings that are too old for Stripe a new time (Unix seconds, default now). Returns how many.

    ``not_billed``: a person says that Stripe has none of them. What comes from a backup may have been billed before.
    """
    ids = named(held, "retime", int)
    with ledger.write() as connection:
        now = ledger.now()
        when = now if at is None else check_timestamp(at, now)
        if when < now - STALE_AFTER:
            raise InvalidValueError(f"The time {when} is more than 34 days ago: the usage would be held again.")
        unsure = 0 if not_billed else restored_up_to(ledger, connection)
        for row in _readings(connection, ids):
            values = {"state": _retimed(row, now, unsure), "at": when, "reason": None, "due": None}
            connection.execute(update(readings).where(readings.c.id == row.id).values(**values))
            write_act(connection, RETIMED, row.key, f"from {row.at} to {when}", now)
    return len(ids)


def _retimed(row: Any, now: int, unsure: int) -> str:
    name = f"The reading {row.id} ({row.key})"
    state = named_move(next_reading_state, ReadingState(row.state), Move.RETIME, name)
    if row.at >= now - STALE_AFTER:
        raise IllegalMoveError(f"{name} is not too old for Stripe; it is held for another reason: {row.reason}.")
    if row.customer is None or row.value is None:
        raise IllegalMoveError(f"{name} lacks {'its customer' if row.customer is None else 'its amount'}: assign() it.")
    if row.id <= unsure:
        raise IllegalMoveError(
            f"{name} comes from a backup and may have been billed before that was restored. Look at Stripe (verify()); "
            "then write_off() what it has, and re-time the rest with not_billed=True (--not-billed)."
        )
    return state


def write_off(ledger: Ledger, what: Readings | str | Iterable[Held | int | str], *, reason: str) -> int:
    """A person decides not to bill: held readings, by id or identifier; rejected or doubtful events, by identifier, and
    those that may have been cancelled. Returns how many.
    """
    said = check_reason(reason)
    given = named(what, "write_off", int, str)
    names = [one for one in given if isinstance(one, str)]
    with ledger.write() as connection:
        now = ledger.now()
        rows = _readings(connection, [one for one in given if isinstance(one, int)])
        held = [_held_reading(connection, name) for name in names]
        for row in dict.fromkeys([*rows, *(row for row in held if row is not None)]):
            name = f"The reading {row.id} ({row.key})"
            state = named_move(next_reading_state, ReadingState(row.state), Move.WRITE_OFF, name)
            values = {"state": state, "reason": said, "due": None, "reference": None}
            connection.execute(update(readings).where(readings.c.id == row.id).values(**values))
            write_act(connection, WRITTEN_OFF, row.key, said, now)
        for name in (name for name, row in zip(names, held, strict=True) if row is None):
            _write_off_event(connection, name, said, now)
    return len(given)


def _held_reading(connection: Connection, name: str) -> Any:
    """The reading of this name, unless what it became decides."""
    return connection.execute(select(readings).where(readings.c.key == name, readings.c.event_id.is_(None))).first()


def _write_off_event(connection: Connection, identifier: str, reason: str, now: int) -> None:
    row = event_of(connection, identifier)
    if may_be_cancelled(connection, row, now):  # nobody knew; the person has looked
        cancel(connection, row.id, row.identifier, reason, now)
        return
    name = f"The meter event {row.identifier}"
    state = named_move(next_event_state, EventState(row.state), Move.WRITE_OFF, name)
    connection.execute(update(events).where(events.c.id == row.id).values(state=state, settled_at=now))
    write_act(connection, WRITTEN_OFF, row.identifier, reason, now)


def _readings(connection: Connection, ids: Sequence[int]) -> list[Any]:
    """The readings with these ids; a refusal that names one that is not there."""
    by_id = (select(readings).where(readings.c.id.in_(part)).order_by(readings.c.id) for part in _parts(ids))
    rows = [row for query in by_id for row in connection.execute(query)]
    missing = sorted(set(ids) - {row.id for row in rows})
    if missing:
        raise ConfigurationError(f"The ledger has no reading {missing[0]}. See: stripe-meter held")
    return rows


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """As many at once as a statement takes values."""
    return (ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE))
