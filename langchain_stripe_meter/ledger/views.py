"""What the ledger shows to a person: counts and ages, what is held or was skipped and why, single readings, totals."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, bindparam, func, null, or_, select, union, union_all

from langchain_stripe_meter.core.events import FUTURE_LIMIT, LAST_SECOND
from langchain_stripe_meter.core.periods import DAY
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.tables import NotebookTable, table_of
from langchain_stripe_meter.core.values import EXACT, exact_sum
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.epoch import told
from langchain_stripe_meter.ledger.schema import (
    CANCELLED_AT,
    IS_DOUBTFUL,
    IS_PENDING,
    IS_SENDING,
    OPEN_READINGS,
    events,
    notes,
    pruned,
    readings,
)
from langchain_stripe_meter.ledger.store import Ledger

PRUNED = "no longer known: the readings were pruned"
"""Why something was skipped of which only the sum is left."""
_SHOWN = ("paused", "waits", "clock")
WAITS_SECONDS = 900
"""How long a status shows why Stripe took nothing: longer than the courier waits between two tries."""
WHAT_TO_RUN = (
    "To do: stripe-meter assign IDS --customer cus_… (who pays) or --value 7 (how much each); stripe-meter retry (once "
    "Stripe has the customer or the meter); stripe-meter retime IDS (what is too old); stripe-meter write-off IDS "
    "--reason '…' (not billed)."
)
"""What a person can do about held readings, below their table."""
_WHAT_TO_CALL = (
    "To do: assign(held, 'cus_…') (who pays) or assign(held, value=7) (how much each); retry() (once Stripe has the "
    "customer or the meter); retime(held) (what is too old); write_off(held, reason='…') (not billed)."
)


@dataclass(frozen=True, slots=True)
class FlushReport(NotebookTable):
    """``delivered``, ``skipped`` and ``rejected`` since the handler was made; ``pending``, ``held`` and ``doubtful``
    as its ledger stands now. Readings and events are counted, one for each run and meter."""

    delivered: int
    pending: int
    held: int
    skipped: int
    rejected: int
    doubtful: int


@dataclass(frozen=True, slots=True)
class Status(NotebookTable):
    """The ledger as it stands: counts, and the age of the oldest pending usage in seconds.

    ``open_runs``, ``abandoned`` (runs that never said they ended), ``unrecorded`` (readings that could not be stored,
    and were not recorded again) and ``unrecorded_amounts`` (what these come to, by meter) are those of this handler;
    ``paused`` says why nothing is sent, ``waits`` why Stripe takes nothing for now. ``ahead`` counts usage that is
    dated more than five minutes ahead, and waits until Stripe takes it; ``alarms`` says what grows too old;
    ``restored`` when and why the ledger was taken for one that came back from a backup; ``clock`` how wrong the clock
    of a machine that delivers is. ``pruned`` readings are in none of the counts.
    """

    delivered: int
    pending: int
    held: int
    skipped: int
    rejected: int
    doubtful: int
    written_off: int
    estimated: int
    oldest_pending_seconds: int | None
    paused: str | None
    open_runs: int = 0
    abandoned: int = 0
    unrecorded: int = 0
    ahead: int = 0
    alarms: tuple[str, ...] = ()
    pruned: int = 0
    restored: str | None = None
    clock: str | None = None
    unrecorded_amounts: Mapping[str, Decimal] = field(default_factory=dict)
    waits: str | None = None


@dataclass(frozen=True, slots=True)
class Held(NotebookTable):
    """One group of held readings: ``ids`` of the readings, what they wait for, and how much they come to.

    ``reference`` is how the customer was named; ``value`` is None where no amount is known; ``account`` is the
    connected account whose usage it is ("" for the key's own).
    """

    ids: tuple[int, ...]
    event_name: str
    reference: str | None = field(repr=False)
    customer: str | None
    value: Decimal | None
    reason: str
    account: str = ""


class HeldList(list[Held]):
    """Held readings; a table in a notebook, and below it what can be done about them."""

    def _repr_html_(self) -> str:
        table = table_of(Held, self, hide=() if any(one.account for one in self) else ("account",))
        return f"{table}<p>{html.escape(_WHAT_TO_CALL)}</p>" if self else table


Readings = Held | int | Iterable[Held | int]
"""Held readings, as ``held()`` returns them (all, a group, some groups) or by their ids."""


def named(what: object, act: str, *kinds: type) -> list[Any]:
    """What a person gave to ``act``: ids and, where ``kinds`` has ``str``, identifiers, each once."""
    given = what if isinstance(what, Iterable) and not isinstance(what, str | bytes) else (what,)
    found = [each for one in given for each in (one.ids if isinstance(one, Held) else (one,))]
    for one in found:
        if not isinstance(one, kinds) or isinstance(one, bool):
            also = " and identifiers" if str in kinds else ""
            raise ConfigurationError(f"{act}() takes what held() returns or ids{also}, not {type(one).__name__}.")
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Row(NotebookTable):
    """One reading and the event it became; ``state`` is the event's where there is one, ``account`` the connected
    account ("" for the key's own), ``dimensions`` what else the payload says, such as the kind of tokens."""

    identifier: str
    at: int
    event_name: str
    customer: str | None
    value: Decimal | None
    state: str
    estimated: bool
    reason: str | None
    account: str
    dimensions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Readings of one day (``2026-01-31``, UTC) on one meter that were skipped for one reason.

    ``value`` is what they come to, in the meter's unit; ``unknown`` of the ``readings`` have no known amount.
    """

    day: str
    event_name: str
    reason: str
    readings: int
    value: Decimal
    unknown: int


class SkipList(list[Skipped]):
    """Skipped readings, oldest day first; a table in a notebook."""

    def _repr_html_(self) -> str:
        return table_of(Skipped, self)


_COUNTS = tuple(select(table.c.state, func.count()).group_by(table.c.state) for table in (readings, events))
_WAITING, _UNSENT, _SENDING = (
    select(func.count()).select_from(table).where(condition).scalar_subquery()
    for table, condition in ((readings, OPEN_READINGS), (events, IS_PENDING), (events, IS_SENDING))
)
_ON_ITS_WAY = select(_WAITING + _UNSENT + _SENDING)
_OLDEST = (
    select(func.min(readings.c.at)).where(OPEN_READINGS),
    select(func.min(events.c.at)).where(IS_PENDING),
    select(func.min(events.c.at)).where(IS_SENDING),
)
_ESTIMATED = select(func.count()).where(readings.c.estimated == 1)
_IS_NEWS = or_(notes.c.name != "waits", notes.c.at > bindparam("fresh"))
_SAID = select(notes.c.name, notes.c.value).where(notes.c.name.in_(_SHOWN), _IS_NEWS)
_AHEAD = select(func.count()).where(OPEN_READINGS, readings.c.state == "resolved", readings.c.at > bindparam("latest"))
_PRUNED = select(func.sum(pruned.c.readings))
_ROWS = select(readings, events.c.state.label("event_state"), events.c.error).select_from(
    readings.outerjoin(events, events.c.id == readings.c.event_id)
)


def counts(connection: Connection) -> Mapping[str, int]:
    """How many readings (not yet sealed) and events are in each state."""
    total: dict[str, int] = {}
    for query in _COUNTS:
        for state, count in connection.execute(query):
            if state != ReadingState.SEALED:
                total[state] = total.get(state, 0) + count
    return total


def pending(connection: Connection) -> int:
    """How many readings and events are on their way: neither final nor waiting for a person.

    One statement, so that what moves meanwhile is neither missed nor counted twice.
    """
    return int(connection.execute(_ON_ITS_WAY).scalar_one())


def attention(connection: Connection) -> tuple[int, int]:
    """How many readings are held, and how many events are in doubt."""
    held = select(func.count()).where(readings.c.state == "held")
    doubtful = select(func.count()).where(IS_DOUBTFUL)
    return int(connection.execute(held).scalar_one()), int(connection.execute(doubtful).scalar_one())


def status(ledger: Ledger) -> Status:
    """The ledger as it stands."""
    with ledger.read() as connection:
        count = counts(connection)
        oldest = [connection.execute(query) for query in _OLDEST]
        at = min((value for result in oldest if (value := result.scalar()) is not None), default=None)
        estimated = connection.execute(_ESTIMATED).scalar_one()
        said = dict(iter(connection.execute(_SAID, {"fresh": ledger.now() - WAITS_SECONDS})))
        ahead = connection.execute(_AHEAD, {"latest": ledger.now() + FUTURE_LIMIT}).scalar_one()
        gone = connection.execute(_PRUNED).scalar()
        restored = told(connection)
    return Status(
        delivered=count.get("delivered", 0),
        pending=sum(count.get(state, 0) for state in ("recorded", "resolved", "pending", "sending")),
        held=count.get("held", 0),
        skipped=count.get("skipped", 0),
        rejected=count.get("rejected", 0),
        doubtful=count.get("doubtful", 0),
        written_off=count.get("written_off", 0),
        estimated=int(estimated),
        oldest_pending_seconds=None if at is None else max(ledger.now() - at, 0),
        paused=said.get("paused"),
        waits=said.get("waits") if at is not None else None,
        clock=said.get("clock"),
        ahead=int(ahead),
        pruned=int(gone or 0),
        restored=restored,
    )


def why_skipped(ledger: Ledger) -> dict[str, int]:
    """Why runs were not billed, and how often."""
    query = select(readings.c.reason, func.count()).where(readings.c.state == "skipped").group_by(readings.c.reason)
    with ledger.read() as connection:
        return {str(reason): int(count) for reason, count in connection.execute(query)}


def skips(ledger: Ledger, since: int = 0) -> SkipList:
    """What was skipped since ``since`` (Unix seconds); days are UTC's. Reasons name fields, never people."""
    sums: dict[tuple[int, str, str], list[tuple[int, str | None, int]]] = {}
    for day, name, reason, value, count, amount_of in _rows(ledger, since):
        sums.setdefault((day, name, reason or ""), []).append((count, value, amount_of))
    return SkipList(_skipped(key, sums[key]) for key in sorted(sums))


def _rows(ledger: Ledger, since: int) -> list[tuple[int, str, str | None, str | None, int, int]]:
    """Day, meter, reason, amount, how many readings, and how many of them the amount counts for."""
    day = readings.c.at - readings.c.at % DAY
    columns = (day, readings.c.event_name, readings.c.reason, readings.c.value)
    query = select(*columns, func.count()).where(readings.c.state == ReadingState.SKIPPED.value, readings.c.at >= since)
    before = select(pruned).where(pruned.c.state == ReadingState.SKIPPED.value, pruned.c.day >= since)
    with ledger.read() as connection:
        kept = [(*row, row[-1]) for row in connection.execute(query.group_by(*columns))]
        gone = [(row.day, row.event_name, PRUNED, row.amount, row.readings, 1) for row in connection.execute(before)]
    return [*kept, *gone]


def _skipped(key: tuple[int, str, str], parts: list[tuple[int, str | None, int]]) -> Skipped:
    return Skipped(
        day=datetime.fromtimestamp(key[0], UTC).date().isoformat(),
        event_name=key[1],
        reason=key[2],
        readings=sum(count for count, _, _ in parts),
        value=exact_sum(EXACT.multiply(Decimal(value), times) for _, value, times in parts if value is not None),
        unknown=sum(count for count, value, _ in parts if value is None),
    )


def held(ledger: Ledger) -> HeldList:
    """What is held, grouped by what it waits for."""
    query = select(readings).where(readings.c.state == ReadingState.HELD.value).order_by(readings.c.id)
    groups: dict[tuple[Any, ...], list[Any]] = {}
    with ledger.read() as connection:
        for row in connection.execute(query):
            key = (row.account, row.event_name, row.reference, row.customer, row.reason, row.value is None)
            groups.setdefault(key, []).append(row)
    return HeldList(_held(rows) for rows in groups.values())


def _held(rows: list[Any]) -> Held:
    first = rows[0]
    value = None if first.value is None else exact_sum(Decimal(row.value) for row in rows)
    ids = tuple(row.id for row in rows)
    return Held(ids, first.event_name, first.reference, first.customer, value, first.reason or "", first.account)


def tail(ledger: Ledger, most: int = 20) -> list[Row]:
    """The newest readings, oldest first."""
    with ledger.read() as connection:
        rows = connection.execute(_ROWS.order_by(readings.c.id.desc()).limit(most)).all()
    return [_row(row) for row in reversed(rows)]


def every(ledger: Ledger) -> Iterator[Row]:
    """All readings, oldest first, without holding them all in memory."""
    with ledger.read() as connection:
        for row in connection.execution_options(yield_per=1000).execute(_ROWS.order_by(readings.c.id)):
            yield _row(row)


def _row(row: Any) -> Row:
    return Row(
        identifier=row.key,
        at=row.at,
        event_name=row.event_name,
        customer=row.customer,
        value=None if row.value is None else Decimal(row.value),
        state=row.event_state or row.state,
        estimated=bool(row.estimated),
        reason=row.error or row.reason,
        account=row.account,
        dimensions=json.loads(row.dimensions or "{}"),
    )


def accounts(ledger: Ledger) -> list[str]:
    """The connected accounts that have usage here; ``""`` is the key's own."""
    with ledger.read() as connection:
        return sorted(connection.execute(union(select(readings.c.account), select(pruned.c.account))).scalars())


def totals(ledger: Ledger, since: int = 0, account: str = "") -> dict[tuple[str, str], dict[str, Decimal]]:
    """The ``amounts`` by (event name, customer) and state."""
    found: dict[tuple[str, str], dict[str, Decimal]] = {}
    for row in amounts(ledger, since, account=account):
        by_state = found.setdefault((row.event_name, row.customer or "?"), {})
        by_state[row.state] = EXACT.add(by_state.get(row.state, Decimal(0)), Decimal(row.value))
    return found


def amounts(ledger: Ledger, since: int = 0, until: int = LAST_SECOND, account: str = "") -> Iterator[Any]:
    """What was used of an account from ``since`` to before ``until`` (Unix seconds), row by row, as of one moment.

    Each has ``event_name``, ``customer``, ``value``, ``state``, and when its event was settled, first unknown and asked
    to be cancelled. Sums of pruned days are in them: ``ConfigurationError`` where a time lies inside such a day.
    """
    _check_unpruned(ledger, "since", since, account)
    _check_unpruned(ledger, "until", until, account)
    at = func.coalesce(events.c.at, readings.c.at)  # what was rolled up is Stripe's at the event's time
    of_rows = (
        select(
            readings.c.event_name, readings.c.customer, readings.c.value,
            func.coalesce(events.c.state, readings.c.state).label("state"), events.c.settled_at,
            events.c.first_unknown_at, CANCELLED_AT,
        )
        .select_from(readings.outerjoin(events, events.c.id == readings.c.event_id))
        .where(readings.c.account == account, at >= since, at < until)
        .where(readings.c.value.is_not(None), readings.c.state != ReadingState.SKIPPED.value)
    )  # fmt: skip
    columns = (pruned.c.event_name, pruned.c.customer, pruned.c.amount, pruned.c.state, null(), null(), null())
    of_pruned = select(*columns).where(pruned.c.account == account, pruned.c.day >= since, pruned.c.day < until)
    of_pruned = of_pruned.where(pruned.c.state != ReadingState.SKIPPED.value)
    with ledger.read() as connection:
        yield from connection.execution_options(yield_per=1000).execute(union_all(of_rows, of_pruned))


def _check_unpruned(ledger: Ledger, name: str, moment: int, account: str) -> None:
    day = moment - moment % DAY
    query = select(pruned.c.day).where(pruned.c.account == account, pruned.c.day == day).limit(1)
    with ledger.read() as connection:
        if day != moment and connection.execute(query).first() is not None:
            raise ConfigurationError(
                f"{name}={moment} lies inside a day that was pruned, of which only the sum is left. "
                f"Use that day's midnight, {day}, or the next, {day + DAY} (UTC)."
            )
