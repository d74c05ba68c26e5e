"""Which usage Stripe does not have yet, by age, and which alarms about it were told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, select, text

from langchain_stripe_meter.core.periods import ON_ITS_WAY_SECONDS, Late, Span
from langchain_stripe_meter.ledger.schema import events, notes, readings
from langchain_stripe_meter.ledger.store import insert_or_ignore

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


def told(connection: Connection) -> dict[str, dict[str, int]]:
    """By threshold, when each meter was last told."""
    rows = connection.execute(select(notes.c.name, notes.c.value).where(notes.c.name.startswith(_ALARM)))
    return {row.name.removeprefix(_ALARM): json.loads(row.value) for row in rows}


def remember(connection: Connection, name: str, when: Mapping[str, int], now: int) -> None:
    """Remember when each meter was told of a threshold; nothing to remember forgets it."""
    connection.execute(delete(notes).where(notes.c.name == _ALARM + name))
    if when:
        insert_or_ignore(connection, notes, {"name": _ALARM + name, "value": json.dumps(dict(when)), "at": now})
