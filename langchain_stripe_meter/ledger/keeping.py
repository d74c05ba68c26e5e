"""What a ledger holds for long: what is final and old is pruned, and its sums stay; what grows old before Stripe has it
is counted, and what was told of it is remembered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from decimal import Decimal
from operator import add
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, func, or_, select, text, tuple_

from langchain_stripe_meter.core.events import number_text
from langchain_stripe_meter.core.periods import DAY, ON_ITS_WAY_SECONDS, Late, Span
from langchain_stripe_meter.core.states import EventState, ReadingState
from langchain_stripe_meter.core.tables import NotebookTable
from langchain_stripe_meter.core.values import EXACT
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.ledger.epoch import rows_are_gone
from langchain_stripe_meter.ledger.lanes import clear_errors
from langchain_stripe_meter.ledger.schema import (
    CANCELLED_AT,
    acts,
    events,
    leads,
    notes,
    pruned,
    readings,
    webhook_events,
)
from langchain_stripe_meter.ledger.store import Ledger, dialect_insert, insert_or_ignore
from langchain_stripe_meter.reentry import inside

LEAST_DAYS = 36
"""Stripe takes usage of up to 35 days; nothing younger is pruned, so that it can still be compared and corrected."""
LEAD_DAYS = 365
"""A lead that nothing has asked for in so many days is pruned: a person is not kept for ever."""
WALK = 5_000
"""Rows that are looked at in one go."""
BATCH = 500
"""Rows that are deleted in one transaction: some milliseconds."""
CHORE_SECONDS = 1.0
"""How long a courier prunes at a time, and how long it rests once it is through."""
CHORE_EVERY = 3600

_WRITTEN_OFF = events.c.state == EventState.WRITTEN_OFF.value
_IS_DELIVERED = and_(events.c.state == EventState.DELIVERED.value, CANCELLED_AT.element.is_(None))
"""For good: of what may have been cancelled, a person must still see what came of it."""
_FINAL_EVENTS = or_(_WRITTEN_OFF, _IS_DELIVERED)
_FINAL_READINGS = readings.c.state.in_([ReadingState.SKIPPED.value, ReadingState.WRITTEN_OFF.value])

Progress = Callable[[int, int], None]
Sums = dict[tuple[str, str, str, int, str], tuple[Decimal, int]]


@dataclass(frozen=True, slots=True)
class Pruned(NotebookTable):
    """How many rows were deleted; the sums of the readings are kept."""

    readings: int = 0
    events: int = 0
    notifications: int = 0
    acts: int = 0
    leads: int = 0

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(*map(add, astuple(self), astuple(other)))


def prune(ledger: Ledger, older_than_days: int = 40, *, progress: Progress | None = None) -> Pruned:
    """Delete what is final and older than so many days (36 at least), and keep its sums per customer, meter and day;
    and leads that nothing has asked for in a year.

    Small transactions with rests between them, so that others can write; killed at any point, rows and sums still
    add up. ``progress`` is told how many of how many rows were looked at. The file does not shrink, its space is used
    again; see ``shrink``. A run that is recorded again after its row was pruned is recorded as new.
    """
    total = Pruned()
    for done, (looked_at, all_) in _steps(ledger, older_than_days, ledger.now()):
        total += done
        if progress is not None:
            progress(looked_at, all_)
    _truncate_log(ledger)
    return total


def shrink(ledger: Ledger) -> None:
    """Give free space back to the file system. Nobody can write meanwhile, so do it while nothing runs."""
    if ledger.database.is_sqlite:
        lane = ledger.deliver_lane()
        with inside(), lane.lock, clear_errors():
            lane.connection.exec_driver_sql("VACUUM")
        _truncate_log(ledger)


class PruneChore:
    """Prunes a little whenever a courier calls it; starts over an hour after it came to the end.

    Nothing is old for it before it is by ``stripes_date`` too (Unix seconds; None: not known yet): a run whose row a
    clock that is ahead had pruned would be billed again when it is repeated.
    """

    def __init__(self, ledger: Ledger, older_than_days: int, stripes_date: Callable[[], int | None]) -> None:
        self._ledger = ledger
        self._days = check_days(older_than_days)
        self._stripes_date = stripes_date
        self._after = 0
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A child starts over: the parent may have been in the middle of a step."""
        self._steps: Iterator[Any] | None = None

    def __call__(self, now: int) -> None:
        """Prune for about a second."""
        date = self._stripes_date()
        if date is None or self._after - CHORE_EVERY <= now < self._after:
            return
        steps = self._steps = self._steps or _steps(self._ledger, self._days, min(now, date))
        deadline = time.monotonic() + CHORE_SECONDS
        try:
            for _ in steps:
                if time.monotonic() > deadline:
                    return
            _truncate_log(self._ledger)
            self._after = now + CHORE_EVERY
        except Exception:
            self._after = now + CHORE_EVERY
            self._steps = None
            raise
        self._steps = None


def check_days(days: int) -> int:
    """``days``, if nothing is lost by it."""
    if not isinstance(days, int) or isinstance(days, bool) or days < LEAST_DAYS:
        raise ConfigurationError(
            f"Only what is at least {LEAST_DAYS} days old can be pruned, not {days!r}: Stripe takes usage of 35 days, "
            "and till then it may still be compared or corrected."
        )
    return days


def _steps(ledger: Ledger, older_than_days: int, now: int) -> Iterator[tuple[Pruned, tuple[int, int]]]:
    """Each step is one transaction, or one look at rows of which none is final."""
    before = now - check_days(older_than_days) * DAY
    final_events = and_(_FINAL_EVENTS, events.c.at < before, func.coalesce(events.c.settled_at, 0) < before)
    final_readings = and_(_FINAL_READINGS, readings.c.event_id.is_(None), readings.c.at < before)
    spans = [_span(ledger, events), _span(ledger, readings)]
    all_ = sum(last - first + 1 for first, last in spans)
    for looked_at, ids in _walk(ledger, events, final_events, spans[0]):
        for portion in _portions(_sizes(ledger, ids)):
            yield _in_one_go(ledger, _prune_events, portion, final_events), (looked_at, all_)
        yield Pruned(), (looked_at, all_)
    seen = spans[0][1] - spans[0][0] + 1
    for looked_at, ids in _walk(ledger, readings, final_readings, spans[1]):
        for portion in _portions([(one, 1) for one in ids]):
            yield _in_one_go(ledger, _prune_readings, portion, final_readings), (seen + looked_at, all_)
        yield Pruned(), (seen + looked_at, all_)
    unused = now - LEAD_DAYS * DAY
    for remove, older in ((_prune_notifications, before), (_prune_acts, before), (_prune_leads, unused)):
        while (done := _in_one_go(ledger, remove, older)) != Pruned():
            yield done, (all_, all_)


def _in_one_go(ledger: Ledger, work: Callable[..., Pruned], *arguments: Any) -> Pruned:
    """One transaction; then a rest as long as it took, in which others get their turn."""
    began = time.monotonic()
    with ledger.write() as connection:
        done = work(connection, *arguments)
    time.sleep(min(time.monotonic() - began, 1))
    return done


def _span(ledger: Ledger, table: Any) -> tuple[int, int]:
    with ledger.read() as connection:
        first, last = connection.execute(select(func.min(table.c.id), func.max(table.c.id))).one()
    return (1, 0) if first is None else (first, last)


def _walk(ledger: Ledger, table: Any, final: Any, span: tuple[int, int]) -> Iterator[tuple[int, list[int]]]:
    """Ids of what is final, part by part, without any lock; and how many rows that makes so far."""
    for start in range(span[0], span[1] + 1, WALK):
        query = select(table.c.id).where(table.c.id.between(start, start + WALK - 1), final).order_by(table.c.id)
        with ledger.read() as connection:
            ids = list(connection.execute(query).scalars())
        yield min(start + WALK, span[1] + 1) - span[0], ids


def _sizes(ledger: Ledger, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Of how many readings each event was made."""
    if not ids:
        return []
    query = select(readings.c.event_id, func.count()).where(readings.c.event_id.in_(ids))
    with ledger.read() as connection:
        known = {row[0]: row[1] for row in connection.execute(query.group_by(readings.c.event_id))}
    return [(event, known.get(event, 0) + 1) for event in ids]


def _portions(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Ids of about ``BATCH`` rows at a time; an event goes with all its readings."""
    portion: list[int] = []
    rows = 0
    for one, size in sizes:
        if portion and rows + size > BATCH:
            yield portion
            portion, rows = [], 0
        portion.append(one)
        rows += size
    if portion:
        yield portion


def _prune_events(connection: Connection, ids: Sequence[int], final: Any) -> Pruned:
    query = select(events.c.id).where(events.c.id.in_(ids), final)  # again: a webhook may have rejected one meanwhile
    sure = list(connection.execute(query).scalars())
    mine = readings.c.event_id.in_(sure)
    joined = readings.join(events, events.c.id == readings.c.event_id)
    columns = (readings.c.account, readings.c.event_name, readings.c.customer, readings.c.value)
    _keep_sums(connection, select(*columns, events.c.at, events.c.state).select_from(joined).where(mine))
    gone = connection.execute(delete(readings).where(mine)).rowcount
    rows_are_gone(connection)
    return Pruned(gone, connection.execute(delete(events).where(events.c.id.in_(sure))).rowcount)


def _prune_readings(connection: Connection, ids: Sequence[int], final: Any) -> Pruned:
    query = select(readings.c.id).where(readings.c.id.in_(ids), final)  # again: a lead may have claimed one meanwhile
    if connection.dialect.name == "postgresql":
        query = query.with_for_update()
    mine = readings.c.id.in_(list(connection.execute(query).scalars()))
    columns = (readings.c.account, readings.c.event_name, readings.c.customer, readings.c.value)
    _keep_sums(connection, select(*columns, readings.c.at, readings.c.state).where(mine))
    gone = connection.execute(delete(readings).where(mine)).rowcount
    rows_are_gone(connection)
    return Pruned(gone)


def _keep_sums(connection: Connection, query: Any) -> None:
    """Add the rows of ``query`` to the sums of their day, exactly."""
    sums: Sums = {}
    for account, event_name, customer, value, at, state in connection.execute(query):
        key = (account, event_name, customer or "", at - at % DAY, state)
        amount, count = sums.get(key, (Decimal(0), 0))
        sums[key] = EXACT.add(amount, Decimal(value or 0)), count + 1
    if not sums:
        return
    keyed = tuple_(*pruned.primary_key)
    known = {tuple(row)[:5]: row for row in connection.execute(select(pruned).where(keyed.in_(list(sums))))}
    upsert = dialect_insert(connection, pruned)
    new = {"amount": upsert.excluded.amount, "readings": upsert.excluded.readings}
    rows = [_sum_row(key, known.get(key), added) for key, added in sums.items()]
    connection.execute(upsert.on_conflict_do_update(index_elements=[*pruned.primary_key], set_=new), rows)


def _sum_row(key: tuple[str, str, str, int, str], known: Any, added: tuple[Decimal, int]) -> dict[str, Any]:
    amount, count = (Decimal(known.amount), known.readings) if known is not None else (Decimal(0), 0)
    names = dict(zip(pruned.primary_key.columns.keys(), key, strict=True))
    return {**names, "amount": number_text(EXACT.add(amount, added[0])), "readings": count + added[1]}


def _prune_notifications(connection: Connection, before: int) -> Pruned:
    old = select(webhook_events.c.id).where(webhook_events.c.at < before).limit(BATCH)
    return Pruned(notifications=connection.execute(delete(webhook_events).where(webhook_events.c.id.in_(old))).rowcount)


def _prune_acts(connection: Connection, before: int) -> Pruned:
    """What a person decided goes when what it was about has gone."""
    still = exists().where(readings.c.key == acts.c.subject) | exists().where(events.c.identifier == acts.c.subject)
    old = select(acts.c.id).where(acts.c.at < before, ~still).limit(BATCH)
    return Pruned(acts=connection.execute(delete(acts).where(acts.c.id.in_(old))).rowcount)


def _prune_leads(connection: Connection, before: int) -> Pruned:
    old = select(leads.c.account, leads.c.session).where(leads.c.captured_at < before).limit(BATCH)
    mine = tuple_(leads.c.account, leads.c.session).in_(old)
    return Pruned(leads=connection.execute(delete(leads).where(mine)).rowcount)


def _truncate_log(ledger: Ledger) -> None:
    """Give SQLite's write-ahead log back to the file system, unless somebody needs it just now."""
    if not ledger.database.is_sqlite:
        return
    with ledger.read() as connection:  # a connection of its own, which waits for nobody
        connection.exec_driver_sql("PRAGMA busy_timeout=0")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


# -- what grows old

_ALARM = "alarm:"
# In the words of the partial indexes, so that they serve; a bound value would not.
_WAITING = ((readings, "state = 'held'"), (events, "state IN ('doubtful', 'rejected')"))
_MOVING = (
    (readings, "state IN ('recorded', 'resolved')"), (events, "state = 'pending'"), (events, "state = 'sending'"),
)  # fmt: skip


def undelivered(connection: Connection, span: Span, now: int) -> list[Late]:
    """By meter, what is undelivered within the span; what is just moving counts once it is late."""
    found: dict[str, Late] = {}
    parts = [(*part, span.before) for part in _WAITING]
    parts += [(*part, min(span.before, now - ON_ITS_WAY_SECONDS)) for part in _MOVING]
    for table, waiting, before in parts:
        for row in connection.execute(_query(table, waiting, span.since, before)):
            meter = f"{row.event_name} ({row.account})" if row.account else row.event_name
            one = Late(meter, row.number, row.oldest, row.newest)
            found[meter] = _together(found.get(meter), one)
    return [found[meter] for meter in sorted(found)]


def _query(table: Any, waiting: str, since: int, before: int) -> Any:
    ages = (func.count().label("number"), func.min(table.c.at).label("oldest"), func.max(table.c.at).label("newest"))
    query = select(table.c.account, table.c.event_name, *ages).where(text(waiting))
    return query.where(table.c.at >= since, table.c.at < before).group_by(table.c.account, table.c.event_name)


def _together(one: Late | None, other: Late) -> Late:
    if one is None:
        return other
    return Late(one.meter, one.count + other.count, min(one.oldest, other.oldest), max(one.newest, other.newest))


def alarms_told(connection: Connection) -> dict[str, dict[str, int]]:
    """By threshold, when each meter was last told."""
    rows = connection.execute(select(notes.c.name, notes.c.value).where(notes.c.name.startswith(_ALARM)))
    return {row.name.removeprefix(_ALARM): json.loads(row.value) for row in rows}


def remember_alarm(connection: Connection, name: str, when: Mapping[str, int], now: int) -> None:
    """Remember when each meter was told of a threshold; nothing to remember forgets it."""
    connection.execute(delete(notes).where(notes.c.name == _ALARM + name))
    if when:
        insert_or_ignore(connection, notes, {"name": _ALARM + name, "value": json.dumps(dict(when)), "at": now})
