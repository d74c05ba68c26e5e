"""What the ledger keeps of Stripe's error reports: which were taken in, and what is still to be found out about each.

A report names samples only. What else it is about is kept as a *window*, a note, until Stripe's sums can tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, and_, delete, exists, func, or_, select, true, tuple_

from langchain_stripe_meter.core.doubts import LOOK_AGAIN, MINUTE, SUMS_LAG
from langchain_stripe_meter.core.states import STALE_AFTER, EventState, ReadingState
from langchain_stripe_meter.core.totals import NO_CUSTOMER, SKEW_SECONDS, Minute, Report, Sample, is_settled
from langchain_stripe_meter.ledger.reversals import reject_later
from langchain_stripe_meter.ledger.schema import (
    CANCELLED_AT,
    IS_CONTRADICTED,
    IS_PENDING,
    IS_SENDING,
    acts,
    events,
    notes,
    readings,
    webhook_events,
)
from langchain_stripe_meter.ledger.sealing import REJECTED_LATER
from langchain_stripe_meter.ledger.store import insert_or_ignore, note, own_account

_WINDOW = "window:"
_ON_THE_WAY = (EventState.PENDING.value, EventState.SENDING.value, EventState.DOUBTFUL.value)
_UNSEALED = (ReadingState.RECORDED.value, ReadingState.RESOLVED.value, ReadingState.HELD.value)
_first_sent = func.coalesce(events.c.first_unknown_at, events.c.sent_at)
"""What Stripe was sent again while it surely knew the identifier is what it was sent first."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A minute in which Stripe has another sum of a customer's usage than was delivered, as ``said`` tells with both.

    ``identifiers`` are the events that it took; ``is_absent`` says that it has nothing of them.
    """

    event_name: str
    customer: str
    said: str
    identifiers: tuple[str, ...]
    is_absent: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What a report leaves open. ``remaining`` is how many refused events Stripe did not name; ``waiting`` maps named
    ones whose own answer is still awaited to their code.

    ``customer_missing`` says that Stripe gave an unknown customer as a reason. ``found`` is what a look at the sums of
    all customers has found up to the meter and customer ``after``; ``seen`` is what the look before it found, which
    ended at ``seen_at`` (Unix seconds).
    """

    name: str
    account: str
    event_names: tuple[str, ...]
    start: int
    end: int
    remaining: int
    customer_missing: bool
    waiting: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, str] = ("", "")
    found: tuple[Difference, ...] = ()
    seen: tuple[Difference, ...] = ()
    seen_at: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to find out."""
        return self.remaining <= 0 and not self.waiting


@dataclass(frozen=True, slots=True)
class Taken:
    """What the samples of a report came to. ``rejected`` maps identifiers to those that they have now; ``waiting``
    are still being sent; ``late`` were sent again after the report, so it may be about an earlier attempt; ``unknown``
    are not this ledger's, or have moved on before."""

    rejected: Mapping[str, str]
    waiting: Mapping[str, str]
    late: tuple[str, ...]
    unknown: int


def window_name(event_id: str) -> str:
    """The note's name; Stripe's ids may be longer than a name."""
    return _WINDOW + hashlib.sha256(event_id.encode()).hexdigest()[:32]


def is_new(connection: Connection, event_id: str, now: int) -> bool:
    """Remember a notification; False where it was taken in before."""
    return insert_or_ignore(connection, webhook_events, {"id": event_id, "at": now})


def was_seen(connection: Connection, event_id: str) -> bool:
    """Whether a notification was taken in."""
    return bool(connection.execute(select(exists().where(webhook_events.c.id == event_id))).scalar())


def take(connection: Connection, samples: Iterable[Sample], account: str, end: int, now: int) -> Taken:
    """Reject what was delivered; what is still on its way is looked at again once its own answer is in. (After a
    restore, that may be what this ledger has not sent yet, or not even sealed.)"""
    rejected: dict[str, str] = {}
    waiting: dict[str, str] = {}
    late: list[str] = []
    unknown = 0
    for sample in samples:
        row = _named(connection, sample.identifier, account)
        if row is None and _is_open(connection, sample.identifier, account, now):
            waiting[sample.identifier] = sample.code
        elif row is None or row.state not in (*_ON_THE_WAY, EventState.DELIVERED.value):
            unknown += 1
        elif not _is_answered(row):
            waiting[sample.identifier] = sample.code
        elif row.state == EventState.DELIVERED.value and (row.first_sent or 0) > end + SKEW_SECONDS:
            late.append(sample.identifier)
        elif (fresh := reject_later(connection, row, sample.code, now)) is not None:
            rejected[sample.identifier] = fresh
    return Taken(rejected, waiting, tuple(late), unknown)


def _is_answered(row: Any) -> bool:
    """Whether Stripe has taken it, or knew its identifier though it was said to lack it, and cannot have taken it
    since."""
    is_known = row.state == EventState.DOUBTFUL.value and row.is_contradicted and row.first_unknown_at == row.sent_at
    return bool(is_known or row.state == EventState.DELIVERED.value)


def _named(connection: Connection, identifier: str, account: str) -> Any:
    query = select(events, _first_sent.label("first_sent"), IS_CONTRADICTED)
    mine = (events.c.identifier == identifier, _is_on(connection, events.c.account, account))
    return connection.execute(query.where(*mine)).first()


def _is_on(connection: Connection, column: Column[str], account: str) -> ColumnElement[bool]:
    """Whether it is on the ``account`` of a report. Which one is the key's own, a key may not be allowed to know: then
    it may be any that was named. (What reports of the own account name, nobody else has sent.)"""
    if account:
        return column == account
    own = own_account(connection)
    return true() if own is None else column.in_(("", own))


def _is_open(connection: Connection, identifier: str, account: str, now: int) -> bool:
    """Whether a reading of this name may still be sealed and sent, once it is assigned or its lead is captured."""
    mine = (readings.c.key == identifier, _is_on(connection, readings.c.account, account))
    is_new = and_(readings.c.session.is_not(None), readings.c.at > now - STALE_AFTER)
    claimable = and_(readings.c.state == ReadingState.SKIPPED.value, is_new)
    found = select(readings.c.id).where(*mine, or_(readings.c.state.in_(_UNSEALED), claimable))
    return connection.execute(found).first() is not None


def event_names(connection: Connection, samples: Iterable[Sample], account: str) -> set[str]:
    """The meters of the samples that are this ledger's, also under identifiers that they had before."""
    names = [sample.identifier for sample in samples]
    now_called = select(acts.c.detail).where(acts.c.subject.in_(names), acts.c.act == REJECTED_LATER)
    names += [str(detail).rpartition(" ")[2] for detail in connection.execute(now_called).scalars()]
    query = select(events.c.event_name).where(events.c.identifier.in_(names), events.c.account == account)
    return set(connection.execute(query.distinct()).scalars())


def open_window(event_id: str, account: str, names: Iterable[str], report: Report, taken: Taken) -> Window:
    """What the report leaves open."""
    names = tuple(sorted(names))
    return Window(
        name=window_name(event_id),
        account=account,
        event_names=names,
        start=report.start,
        end=report.end,
        remaining=max(report.errors - len(report.samples), 0) if names else 0,
        customer_missing=NO_CUSTOMER in report.codes,
        waiting=taken.waiting,
    )


def keep(connection: Connection, window: Window, now: int) -> None:
    """Store what is open, or forget the window when nothing is."""
    connection.execute(delete(notes).where(notes.c.name == window.name))
    if not window.is_done:
        text = json.dumps(asdict(window))
        insert_or_ignore(connection, notes, {"name": window.name, "value": text, "at": now})


def windows(connection: Connection) -> list[str]:
    """The names of what is open, oldest first."""
    query = select(notes.c.name).where(notes.c.name.startswith(_WINDOW)).order_by(notes.c.at, notes.c.name)
    return list(connection.execute(query).scalars())


def window(connection: Connection, name: str) -> Window | None:
    """What is open, as it stands."""
    text = note(connection, name)
    if text is None:
        return None
    stored = json.loads(text)
    stored |= {part: tuple(stored[part]) for part in ("event_names", "after")}
    stored |= {part: tuple(map(_difference, stored.get(part, ()))) for part in ("found", "seen")}
    return Window(**stored)


def remaining(connection: Connection, one: Window) -> int:
    """How many refused events Stripe did not name, in this report and in those that may be about the same events."""
    others = (window(connection, name) for name in windows(connection))
    return sum(other.remaining for other in others if other is not None and _overlap(one, other))


def _overlap(one: Window, other: Window) -> bool:
    meets = one.start <= other.end + 2 * SKEW_SECONDS and other.start <= one.end + 2 * SKEW_SECONDS
    return meets and one.account == other.account and not set(one.event_names).isdisjoint(other.event_names)


def _difference(stored: Mapping[str, Any]) -> Difference:
    return Difference(**{**stored, "identifiers": tuple(stored["identifiers"])})


def _inside(one: Window) -> ColumnElement[bool]:
    return and_(
        events.c.account == one.account,
        events.c.event_name.in_(one.event_names),
        events.c.state == EventState.DELIVERED.value,
        _first_sent <= one.end + SKEW_SECONDS,
        events.c.settled_at >= one.start - SKEW_SECONDS,
    )


def is_readable(connection: Connection, one: Window, now: int) -> bool:
    """Whether Stripe's sums can be trusted now to show all that was delivered in the window, and are due for a look.

    What is still to be sent, or sent again, though Stripe may have it, may be what it refused: its answer comes first.
    """
    latest, meters = one.end + SKEW_SECONDS, select(events.c.account, events.c.event_name)
    again = meters.where(IS_PENDING, events.c.first_unknown_at <= latest)  # an index of its own, if asked for no more
    for awaited in (again, meters.where(IS_SENDING, _first_sent <= latest)):
        if any(row.account == one.account and row.event_name in one.event_names for row in connection.execute(awaited)):
            return False
    newest = connection.execute(select(func.max(events.c.settled_at)).where(_inside(one))).scalar()
    had_time = newest is None or now - newest >= SUMS_LAG
    return had_time and (one.seen_at is None or now - one.seen_at >= LOOK_AGAIN)


def customers(connection: Connection, one: Window, most: int) -> list[tuple[str, str]]:
    """The next meters and customers that are to be looked at, in order: those that differed, all of the window where
    none did."""
    if one.seen:
        return sorted({its for seen in one.seen if (its := (seen.event_name, seen.customer)) > one.after})[:most]
    pair = tuple_(events.c.event_name, events.c.customer)
    query = select(events.c.event_name, events.c.customer).where(_inside(one)).distinct()
    query = query.where(pair > one.after).order_by(events.c.event_name, events.c.customer).limit(most)
    return [(row.event_name, row.customer) for row in connection.execute(query)]


def minutes(connection: Connection, one: Window, event_name: str, customer: str, now: int) -> list[Minute]:
    """Everything that a customer used of a meter in the minutes that the window touches, in order."""
    mine = (events.c.account == one.account, events.c.event_name == event_name, events.c.customer == customer)
    touched = {row.at // MINUTE for row in connection.execute(select(events.c.at).where(*mine, _inside(one)))}
    if not touched:
        return []
    span = (events.c.at >= min(touched) * MINUTE, events.c.at < (max(touched) + 1) * MINUTE)
    by_minute: dict[int, list[Any]] = {}
    taken = events.c.state != EventState.REJECTED.value
    for row in connection.execute(select(events, CANCELLED_AT).where(*mine, *span, taken)):
        by_minute.setdefault(row.at // MINUTE, []).append(row)
    return [_minute(start, by_minute[start], now) for start in sorted(by_minute)]


def _minute(start: int, rows: Sequence[Any], now: int) -> Minute:
    """What was asked to be cancelled, and is delivered for all that is known, Stripe may bill or not: uncertain."""
    sure: dict[str, Decimal] = {}
    unsure: list[Decimal] = []
    is_changing = False
    for row in rows:
        settled = is_settled(row.state, now, row.settled_at, row.first_unknown_at, row.cancelled_at)
        delivered = row.state == EventState.DELIVERED.value
        if settled and delivered and row.cancelled_at is None:
            sure[row.identifier] = Decimal(row.value)
        elif delivered or not settled:
            unsure.append(Decimal(row.value))
        is_changing |= not settled and row.state != EventState.DOUBTFUL.value
    return Minute(start * MINUTE, sure, tuple(unsure), is_changing)


def is_changing(connection: Connection, one: Window, named: Iterable[tuple[str, str]], now: int) -> bool:
    """Whether Stripe's sums of what these (meter, customer) used will tell more by themselves, in hours.

    What is in doubt is not waited for: its own looks show a person a sum that does not add up.
    """
    return any(minute.is_changing for its in named for minute in minutes(connection, one, *its, now))


def reject_absent(connection: Connection, identifiers: Iterable[str], account: str, code: str, now: int) -> list[str]:
    """Reject events of which Stripe has nothing; those that have moved on meanwhile are left alone."""
    done = []
    for identifier in identifiers:
        row = _named(connection, identifier, account)
        if row is not None and row.state == EventState.DELIVERED.value:
            done += [identifier] if reject_later(connection, row, code, now) else []
    return done
