"""The courier's chore that ends doubts: after its sums have settled, Stripe is asked what it has."""

from __future__ import annotations

import logging
from decimal import Decimal

from langchain_stripe_meter.core.doubts import MINUTE, Facts, Look, decide, is_ready
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway.client import Gateway, MeterInfo
from langchain_stripe_meter.ledger import doubts
from langchain_stripe_meter.ledger.doubts import Place
from langchain_stripe_meter.ledger.store import Ledger

LOOKS_AT_ONCE = 50
"""Sums that are read in one go: each is a request, and deliveries wait meanwhile."""
FORBIDDEN = 403

logger = logging.getLogger("langchain_stripe_meter")


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
        reasons = [
            self._settle(known[place], look, now) for place, look in looks.items() if known[place] == still.get(place)
        ]
        new = [reason for reason in reasons if reason]
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
                if getattr(error.__cause__, "http_status", None) != FORBIDDEN:
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
        total = Decimal(0)
        for meter in named:
            billed = self._gateway.billed(meter.id, place.customer, place.minute, place.minute + MINUTE, place.account)
            if billed is None:
                return Look(None, f"Stripe has no sums of the customer {place.customer}.")
            total += billed
        return Look(total)

    def _settle(self, facts: Facts, look: Look, now: int) -> str | None:
        """Store what was seen and decided; the reason for which a person is needed, if it is a new one."""
        verdict = decide(facts, look, now)
        stored = doubts.store(self._ledger, facts.doubts, look, verdict, now)
        is_news = any(doubt.error != verdict.reason for doubt in facts.doubts)
        return verdict.reason if stored and is_news else None


def _order(facts: Facts) -> tuple[bool, int]:
    """Those that a person was told of come last; else who waited longest comes first."""
    first = facts.doubts[0]
    return first.awaits_person, first.seen_at or 0
