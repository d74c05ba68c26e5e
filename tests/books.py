"""A ledger with a clock of its own, and what is recorded in it: what the tests of the limits share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, insert, update

from langchain_stripe_meter.core.periods import Period
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger import resolving
from langchain_stripe_meter.ledger.counters import Counters
from langchain_stripe_meter.ledger.resolving import Unknown
from langchain_stripe_meter.ledger.schema import acts, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger

ANN = Reference("email", "ann@example.com")
CUS_1 = Reference("id", "cus_1")
MONTH = Period("month")


def seconds(text: str) -> int:
    """Unix seconds of a time in UTC, such as ``"2026-05-31 23:59:59"``."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


class Clock:
    """Stands still until it is moved."""

    def __init__(self, text: str = "2026-05-20 12:00:00") -> None:
        self.now = seconds(text)

    def __call__(self) -> float:
        return self.now

    def set(self, text: str) -> None:
        self.now = seconds(text)


def entry(key: str, value: object = 1, who: Reference | None = CUS_1, **changes: Any) -> Entry:
    """A reading of ``ai_tokens`` in the state that it has when it is new."""
    by_id = who is not None and who.by == "id"
    state = ReadingState.RESOLVED if by_id else ReadingState.RECORDED if who else ReadingState.SKIPPED
    facts: dict[str, Any] = {"event_name": "ai_tokens", "state": state, "at": 0, **changes}
    facts |= {"customer": who.value} if who and by_id else {"reference": who}
    return Entry(key, value=None if value is None else Decimal(str(value)), **facts)


class Books:
    """A ledger, and what somebody has used by it according to one process's counters."""

    def __init__(self, url: str, clock: Clock, *periods: Period) -> None:
        self.clock = clock
        self.ledger = Ledger(url, clock=clock)
        self.counters = Counters(self.ledger, periods or (MONTH,))

    def record(self, *entries: Entry) -> None:
        """Record; what has no time of its own happens now."""
        self.ledger.record([one if one.at else replace(one, at=self.ledger.now()) for one in entries])

    def used(self, who: Reference = CUS_1, period: Period = MONTH, event_name: str = "ai_tokens") -> Decimal:
        (amount,) = self.counters.used(who, [(event_name, period)])
        return amount

    def do(self, act: Callable[..., Any], *arguments: Any) -> Any:
        with self.ledger.deliver_lane().transaction() as connection:
            return act(connection, *arguments)

    def resolve(self, who: Reference, customer: str) -> None:
        """As where something of theirs waited, for only then Stripe is asked."""
        self.do(resolving.resolve, Unknown("", who), customer, self.ledger.now())
        self.do(resolving.remember, "", who.text, customer, self.ledger.now())

    def change(self, key: str, act: str = "changed", **values: Any) -> None:
        """Change a reading as a person's act does."""
        with self.ledger.deliver_lane().transaction() as connection:
            connection.execute(update(readings).where(readings.c.key == key).values(**values))
            connection.execute(insert(acts).values(at=self.ledger.now(), act=act, subject=key))

    def remove(self, *keys: str) -> None:
        with self.ledger.deliver_lane().transaction() as connection:
            connection.execute(delete(readings).where(readings.c.key.in_(keys)))

    def close(self) -> None:
        self.ledger.close()
