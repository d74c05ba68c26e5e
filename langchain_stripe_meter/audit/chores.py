"""What a courier does every minute beside delivering: it ends doubts, follows up error reports, puts right what a wrong
clock has left, tells what grows old, and prunes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from langchain_stripe_meter.audit.windows import Windows
from langchain_stripe_meter.core.doubts import MINUTE, Facts, Look, decide, is_ready
from langchain_stripe_meter.core.periods import Late, Span, check_billing_day, sentence, spans, untold
from langchain_stripe_meter.errors import AgeAlarm, OnError, StripeError, logger
from langchain_stripe_meter.gateway.client import Gateway, MeterInfo
from langchain_stripe_meter.gateway.meters import billed_on
from langchain_stripe_meter.ledger import doubts, keeping, recalling
from langchain_stripe_meter.ledger.doubts import Place
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.telling import tell

# -- doubts: after its sums have settled, Stripe is asked what it has

LOOKS_AT_ONCE = 50
"""Sums that are read in one go: each is a request, and deliveries wait meanwhile."""


class Doubts:
    """Compares doubtful events with Stripe's sums when it is called, and settles those that are plain.

    Several processes may do so at once. Raises ``StripeError`` for what a person must newly decide, after its work is
    done; while Stripe does not answer, it leaves everything for later.
    """

    def __init__(self, ledger: Ledger, gateway: Gateway) -> None:
        self._ledger = ledger
        self._gateway = gateway

    def __call__(self, now: int) -> None:
        """Look at what is due, at most ``LOOKS_AT_ONCE`` minutes of customers and meters."""
        known = self._known(now)
        ready = sorted(
            (place for place, facts in known.items() if is_ready(facts, now)), key=lambda p: _order(known[p])
        )
        looks = self._look(ready[:LOOKS_AT_ONCE])
        if not looks:
            return
        still = self._known(now)
        told = [
            doubts.store(self._ledger, known[place].doubts, look, decide(known[place], look, now), now)
            for place, look in looks.items()
            if known[place] == still.get(place)
        ]
        new = [reasons[0] for reasons in told if reasons]
        if new:
            raise StripeError(f"Usage of {len(new)} minutes stays in doubt. {new[0]} See: stripe-meter doubtful")

    def _known(self, now: int) -> dict[Place, Facts]:
        with self._ledger.read() as connection:
            return doubts.facts(connection) if doubts.any_due(connection, now) else {}

    def _look(self, places: list[Place]) -> dict[Place, Look]:
        """Stripe's sums, as far as it answers."""
        meters: dict[str, list[MeterInfo]] = {}
        looks: dict[Place, Look] = {}
        for place in places:
            try:
                if place.account not in meters:
                    meters[place.account] = self._gateway.meters(place.account)
                looks[place] = self._sum(place, meters[place.account])
            except StripeError as error:
                if getattr(error.__cause__, "http_status", None) != 403:
                    logger.info("stripe-meter: doubtful events wait: %s", error)
                    return looks
                looks[place] = Look(None, f"{error} Give the key that permission, or look at Stripe yourself.")
        return looks

    def _sum(self, place: Place, meters: list[MeterInfo]) -> Look:
        """What Stripe has of the minute, on every meter that ever had the event name: one may have replaced another."""
        named = [meter for meter in meters if meter.event_name == place.event_name]
        if not named:
            return Look(None, f"Stripe has no meter with the event name {place.event_name!r}.")
        if any(meter.formula != "sum" or meter.window for meter in named):
            return Look(None, f"not every meter with the event name {place.event_name!r} adds up what it is sent.")
        minute = (place.minute, place.minute + MINUTE)
        billed = billed_on(self._gateway, [meter.id for meter in named], place.customer, minute, place.account)
        return Look(billed, "" if billed is not None else f"Stripe has no sums of the customer {place.customer}.")


def _order(facts: Facts) -> tuple[bool, int]:
    """Those that a person was told of come last; else who waited longest comes first."""
    first = facts.doubts[0]
    return first.awaits_person, first.seen_at or 0


# -- a clock that was ahead


def recall(ledger: Ledger, gateway: Gateway, now: int) -> None:
    """Put right what a clock that was ahead has left behind, unless Stripe's own date says that ours is behind now."""
    with ledger.deliver_lane().transaction(shared=True) as connection:
        recalling.recall_rest(connection, max(now, gateway.date or now))


# -- ages: an alarm is told once, by whichever process sees it first


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
            found = [(span, keeping.undelivered(connection, span, now)) for span in spans(now, self._billing_day)]
        return tuple(sentence(span, late) for span, late in found if late)

    def _new(self, now: int) -> list[AgeAlarm]:
        with self._ledger.read() as connection:
            found = {
                span.name: (span, keeping.undelivered(connection, span, now)) for span in spans(now, self._billing_day)
            }
        alarms = []
        with self._ledger.deliver_lane().transaction() as connection:
            told = keeping.alarms_told(connection)
            for name in told.keys() - found.keys():
                keeping.remember_alarm(connection, name, {}, now)
            for name, (span, late) in found.items():
                before = told.get(name, {})
                new = untold(span, late, before, now)
                after = {one.meter: before.get(one.meter, now) for one in late} | {one.meter: now for one in new}
                if after != before:
                    keeping.remember_alarm(connection, name, after, now)
                alarms += [_alarm(span, new)] if new else []
        return alarms


def _alarm(span: Span, late: list[Late]) -> AgeAlarm:
    return AgeAlarm(sentence(span, late), span.threshold, {one.meter: one.count for one in late})


# -- all of them


def chores(
    ledger: Ledger,
    gateway: Gateway,
    *,
    on_error: OnError | None = None,
    prune_after_days: int | None = None,
) -> list[Callable[[int], None]]:
    """For ``Courier(chores=...)``; ``ConfigurationError`` where ``prune_after_days`` is less than 36."""
    pruning = [] if prune_after_days is None else [keeping.PruneChore(ledger, prune_after_days, lambda: gateway.date)]
    return [
        partial(recall, ledger, gateway),
        Doubts(ledger, gateway),
        Windows(ledger, gateway, on_error).chore,
        *pruning,
    ]
