"""The periods that a limit counts in, all in UTC, and what was spent in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal

from langchain_stripe_meter.core.exact import EXACT, exact_sum
from langchain_stripe_meter.errors import ConfigurationError

Per = Literal["day", "week", "month", "ever"] | timedelta
_SECONDS = {"day": 86_400, "week": 7 * 86_400}
_NOTHING = Decimal(0)
_MONDAY = 4 * 86_400
"""The first Monday after the Unix epoch, which was a Thursday."""


@dataclass(frozen=True, slots=True)
class Period:
    """Calendar days, weeks (from Monday) or months in UTC, all time, or spans of a fixed length.

    Spans follow each other without a gap from the Unix epoch on, so that every process has the same ones: with
    ``timedelta(hours=1)`` they are the full hours.
    """

    per: Per

    def __post_init__(self) -> None:
        if isinstance(self.per, timedelta):
            if self.per < timedelta(seconds=1) or self.per % timedelta(seconds=1):
                raise ConfigurationError(f"per={self.per!r}: a span is a whole number of seconds, at least one.")
        elif self.per not in ("day", "week", "month", "ever"):
            raise ConfigurationError(f"per={self.per!r}: use 'day', 'week', 'month', 'ever' or a timedelta.")

    def bounds(self, at: int) -> tuple[int, int | None]:
        """The first second of the period that ``at`` is in, and that of the next one; None where none follows."""
        if self.per == "ever":
            return 0, None
        if self.per == "month":
            return _month(at)
        length = int(self.per.total_seconds()) if isinstance(self.per, timedelta) else _SECONDS[self.per]
        start = at - (at - (_MONDAY if self.per == "week" else 0)) % length
        return start, start + length


def _month(at: int) -> tuple[int, int]:
    moment = datetime.fromtimestamp(at, UTC)
    first = datetime(moment.year, moment.month, 1, tzinfo=UTC)
    following = (first + timedelta(days=31)).replace(day=1)
    return int(first.timestamp()), int(following.timestamp())


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
        spans = [(period, by_start, *period.bounds(now)) for period, by_start in self._sums.items()]
        for name, what, at, amount in amounts:
            for period, by_start, start, end in spans:
                if at < start:
                    continue
                its_start = start if end is None or at < end else period.bounds(at)[0]
                of_payer = _bucket(by_start, its_start).setdefault(name, {})
                of_payer[what] = EXACT.add(of_payer.get(what, _NOTHING), amount)

    def move(self, old: str, new: str) -> None:
        """What ``old`` has used is what ``new`` has used."""
        for by_start in self._sums.values():
            for by_name in by_start.values():
                for what, amount in by_name.pop(old, {}).items():
                    of_payer = by_name.setdefault(new, {})
                    of_payer[what] = EXACT.add(of_payer.get(what, _NOTHING), amount)

    def of(self, names: Iterable[str], what: What, period: Period, now: int) -> Decimal:
        """How much all ``names`` together have used in the period that ``now`` is in."""
        by_name = self._sums[period].get(period.bounds(now)[0], {})
        return exact_sum(by_name.get(name, {}).get(what, _NOTHING) for name in names)


def _bucket(by_start: dict[int, dict[str, dict[What, Decimal]]], start: int) -> dict[str, dict[What, Decimal]]:
    if start not in by_start:
        by_start[start] = {}
        for old in sorted(by_start.keys() - {start})[:-1]:
            del by_start[old]
    return by_start[start]
