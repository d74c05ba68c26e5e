"""Alarms as usage ages: told once when a threshold is crossed, by whichever process sees it first."""

from __future__ import annotations

from langchain_stripe_meter.audit.telling import OnError, tell
from langchain_stripe_meter.core.periods import Late, Span, check_billing_day, sentence, spans, untold
from langchain_stripe_meter.errors import AgeAlarm
from langchain_stripe_meter.ledger import ages
from langchain_stripe_meter.ledger.store import Ledger


class Ages:
    """Looks at the ledger's undelivered usage. ``chore`` is a courier's chore.

    ``billing_day`` is the day of the month on which billing periods begin, by UTC.
    """

    def __init__(self, ledger: Ledger, on_error: OnError | None = None, billing_day: int = 1) -> None:
        self._ledger = ledger
        self._on_error = on_error
        self._billing_day = check_billing_day(billing_day)

    def chore(self, now: int) -> None:
        """Tell what has crossed a threshold since it was last told, in any process."""
        for alarm in self._new(now):
            tell(self._on_error, alarm)

    def standing(self) -> tuple[str, ...]:
        """The alarms as things stand, told or not."""
        now = self._ledger.now()
        with self._ledger.read() as connection:
            found = [(span, ages.undelivered(connection, span, now)) for span in spans(now, self._billing_day)]
        return tuple(sentence(span, late) for span, late in found if late)

    def _new(self, now: int) -> list[AgeAlarm]:
        with self._ledger.read() as connection:
            found = {
                span.name: (span, ages.undelivered(connection, span, now)) for span in spans(now, self._billing_day)
            }
        alarms = []
        with self._ledger.deliver_lane().transaction() as connection:
            told = ages.told(connection)
            for name in told.keys() - found.keys():
                ages.remember(connection, name, {}, now)
            for name, (span, late) in found.items():
                before = told.get(name, {})
                new = untold(span, late, before, now)
                after = {one.meter: before.get(one.meter, now) for one in late} | {one.meter: now for one in new}
                if after != before:
                    ages.remember(connection, name, after, now)
                alarms += [_alarm(span, new)] if new else []
        return alarms


def _alarm(span: Span, late: list[Late]) -> AgeAlarm:
    return AgeAlarm(sentence(span, late), span.threshold, {one.meter: one.count for one in late})
