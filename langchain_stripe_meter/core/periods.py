"""Periods, all in UTC: those that a limit counts in, with what was spent in them; and billing periods, with the usage
that grows old before Stripe has it.

Stripe refuses usage of 35 days, and finalises an invoice about an hour after its period has ended.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal

from langchain_stripe_meter.core.states import STALE_AFTER
from langchain_stripe_meter.core.values import EXACT, exact_sum
from langchain_stripe_meter.errors import ConfigurationError

DAY = 86_400
HELD_DAYS = STALE_AFTER // DAY
DAYS = (HELD_DAYS, 30, 21, 7)
"""Ages that are alarms, the worst first."""
CLOSING_SECONDS = DAY
"""How long before the end of a billing period its undelivered usage is an alarm."""
FINAL_SECONDS = 3600
"""How long after its end Stripe's invoice still takes usage, unless the account says otherwise."""
ON_ITS_WAY_SECONDS = 600
"""How old usage must be to be late for a period that closes, unless it waits for a person: the rest is just moving."""
Per = Literal["day", "week", "month", "ever"] | timedelta
_SECONDS = {"day": DAY, "week": 7 * DAY}
_NOTHING = Decimal(0)
_MONDAY = 4 * DAY
"""The first Monday after the Unix epoch, which was a Thursday."""


@dataclass(frozen=True, slots=True)
class Period:
    """Calendar days, weeks (from Monday) or months in UTC, all time, or spans of a fixed length.

    Spans follow each other without a gap from the Unix epoch on, so that every process has the same ones: with
    ``timedelta(hours=1)`` they are the full hours. Months begin on ``billing_day``. What was used in a period counts on
    in the next one for ``settled_after`` seconds.
    """

    per: Per
    billing_day: int = 1
    settled_after: int = 0

    def __post_init__(self) -> None:
        if check_billing_day(self.billing_day) != 1 and self.per != "month":
            raise ConfigurationError(f"billing_day={self.billing_day}: only per='month' has one.")
        if isinstance(self.per, timedelta):
            if self.per < timedelta(seconds=1) or self.per % timedelta(seconds=1):
                raise ConfigurationError(f"per={self.per!r}: a span is a whole number of seconds, at least one.")
        elif self.per not in ("day", "week", "month", "ever"):
            raise ConfigurationError(f"per={self.per!r}: use 'day', 'week', 'month', 'ever' or a timedelta.")
        if self.per != "ever" and self.settled_after >= self._shortest:
            raise ConfigurationError(f"settled_after={self.settled_after} seconds is no shorter than a {self.per!r}.")

    @property
    def _shortest(self) -> int:
        """How many seconds the shortest one has."""
        if isinstance(self.per, timedelta):
            return int(self.per.total_seconds())
        return _SECONDS.get(self.per, 28 * DAY)

    def bounds(self, at: int) -> tuple[int, int | None]:
        """The first second of the period that ``at`` is in, and that of the next one; None where none follows."""
        if self.per == "ever":
            return 0, None
        if self.per == "month":
            return billing_period(at, self.billing_day)
        start = at - (at - (_MONDAY if self.per == "week" else 0)) % self._shortest
        return start, start + self._shortest

    def begins(self, at: int) -> int:
        """The first second of what counts at ``at``."""
        start, _ = self.bounds(at)
        return self.bounds(start - 1)[0] if self._is_unsettled(at) else start

    def resets_at(self, at: int) -> int | None:
        """When less than now may count; None where that will never be."""
        start, end = self.bounds(at)
        return start + self.settled_after if self._is_unsettled(at) else end

    def _is_unsettled(self, at: int) -> bool:
        start, end = self.bounds(at)
        return end is not None and at - start < self.settled_after


What = tuple[str, str]
"""Account and event name."""


class Spent:
    """Exact sums by payer, account and event name, for the present of each period and whatever comes after it.

    What lies before is dropped, but for one period, in case the clock is set back over a boundary.
    """

    def __init__(self, periods: Sequence[Period]) -> None:
        self._sums: dict[Period, dict[int, dict[str, dict[What, Decimal]]]] = {period: {} for period in periods}

    def add(self, amounts: Iterable[tuple[str, What, int, Decimal]], now: int) -> None:
        """Add to what was used: by whom, of what, when, and how much."""
        bounds = [
            (period, by_start, period.begins(now), *period.bounds(now)) for period, by_start in self._sums.items()
        ]
        for name, what, at, amount in amounts:
            for period, by_start, first, start, end in bounds:
                if at < first:
                    continue
                its_start = start if start <= at and (end is None or at < end) else period.bounds(at)[0]
                of_payer = _bucket(by_start, its_start, present=start).setdefault(name, {})
                of_payer[what] = EXACT.add(of_payer.get(what, _NOTHING), amount)

    def move(self, old: str, new: str) -> None:
        """What ``old`` has used is what ``new`` has used."""
        for by_start in self._sums.values():
            for by_name in by_start.values():
                for what, amount in by_name.pop(old, {}).items():
                    of_payer = by_name.setdefault(new, {})
                    of_payer[what] = EXACT.add(of_payer.get(what, _NOTHING), amount)

    def of(self, names: Iterable[str], what: What, period: Period, now: int) -> Decimal:
        """How much of what all ``names`` together have used counts ``now``."""
        by_start = self._sums[period]
        starts = {period.begins(now), period.bounds(now)[0]}
        return exact_sum(by_start.get(one, {}).get(name, {}).get(what, _NOTHING) for one in starts for name in names)


def _bucket(
    by_start: dict[int, dict[str, dict[What, Decimal]]], start: int, *, present: int
) -> dict[str, dict[What, Decimal]]:
    if start not in by_start:
        by_start[start] = {}
        for old in sorted(known for known in by_start if known < present)[:-1]:
            del by_start[old]
    return by_start[start]


# -- billing periods, and ages


@dataclass(frozen=True, slots=True)
class Span:
    """Usage that a threshold is about: of ``since <= at < before``, in Unix seconds."""

    threshold: str
    since: int
    before: int
    crossed_after: int
    """Seconds from when usage happened until it crosses the threshold."""
    ends: int | None = None
    """When the billing period ends, where it is about one."""

    @property
    def name(self) -> str:
        """What is remembered of it: an alarm of one period says nothing of the next."""
        return self.threshold if self.ends is None else f"{self.threshold} {self.ends}"


@dataclass(frozen=True, slots=True)
class Late:
    """How much of one meter is undelivered within a span, and when the oldest and newest of it happened."""

    meter: str
    count: int
    oldest: int
    newest: int


def check_billing_day(day: object) -> int:
    """The day of the month on which billing periods begin: 1 to 31 (the last day, where a month is shorter)."""
    if isinstance(day, bool) or not isinstance(day, int) or not 1 <= day <= 31:
        raise ConfigurationError(f"billing_day={day!r}: the day of the month on which periods begin, 1 to 31.")
    return day


def billing_period(now: int, billing_day: int = 1) -> tuple[int, int]:
    """The beginning and end (Unix seconds) of the billing period that ``now`` lies in, by UTC."""
    moment = datetime.fromtimestamp(now, UTC)
    month = moment.year * 12 + moment.month - 1
    if now < _begins(month, billing_day):
        month -= 1
    return _begins(month, billing_day), _begins(month + 1, billing_day)


def _begins(month: int, billing_day: int) -> int:
    year, index = divmod(month, 12)
    day = min(billing_day, monthrange(year, index + 1)[1])
    return int(datetime(year, index + 1, day, tzinfo=UTC).timestamp())


def spans(now: int, billing_day: int = 1) -> list[Span]:
    """What is an alarm at ``now``; usage belongs to the first age that it has reached, the worst first."""
    since, found = 0, []
    for days in DAYS:
        before = now - days * DAY
        found.append(Span(f"{days} days", since, before, days * DAY))
        since = before
    start, end = billing_period(now, billing_day)
    if end - now <= CLOSING_SECONDS:
        found.append(Span("closing", start, end, ON_ITS_WAY_SECONDS, end))
    if now - start < FINAL_SECONDS:
        found.append(Span("closed", billing_period(start - 1, billing_day)[0], start, ON_ITS_WAY_SECONDS, start))
    return found


def untold(span: Span, late: Iterable[Late], told: Mapping[str, int], now: int) -> list[Late]:
    """What must be told now: of meters that have just crossed the threshold, and of those where more has crossed it
    since they were told, a day ago or longer."""
    return [
        one
        for one in late
        if one.meter not in told or (one.newest + span.crossed_after > told[one.meter] and now - told[one.meter] >= DAY)
    ]


def sentence(span: Span, late: Iterable[Late]) -> str:
    """An alarm in words."""
    late = list(late)
    what = ", ".join(f"{one.count:,} on {one.meter}" for one in late)
    if span.ends is None:
        said = f"Undelivered usage is older than {span.threshold}: {what}."
        if span.crossed_after < HELD_DAYS * DAY:
            return f"{said} Stripe refuses it at 35 days."
        return f"{said} It is not sent, for Stripe refuses it at 35 days: retime() it or write_off() it."
    when = datetime.fromtimestamp(span.ends, UTC).strftime("%Y-%m-%d %H:%M UTC")
    verb = "closes" if span.threshold == "closing" else "closed"
    return f"A billing period {verb} at {when}, and usage of it is undelivered: {what}."
