"""What went unbilled because a run named nobody: how often, how much, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import func, select

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.values import EXACT
from langchain_stripe_meter.ledger.schema import pruned, readings
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.ledger.views import html_table

DAY = 86_400
PRUNED = "no longer known: the readings were pruned"


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
        head = tuple(one.name for one in fields(Skipped))
        return html_table(head, [tuple(getattr(item, name) for name in head) for item in self])


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
    total = Decimal(0)
    for _, value, times in parts:
        if value is not None:
            total = EXACT.add(total, EXACT.multiply(Decimal(value), Decimal(times)))
    return Skipped(
        day=datetime.fromtimestamp(key[0], UTC).date().isoformat(),
        event_name=key[1],
        reason=key[2],
        readings=sum(count for count, _, _ in parts),
        value=total,
        unknown=sum(count for count, value, _ in parts if value is None),
    )
