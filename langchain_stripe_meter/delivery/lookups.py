"""Who is looked up at Stripe, and what is remembered of it, per account and for a limited time."""

from __future__ import annotations

from cachetools import TTLCache
from sqlalchemy import Connection

from langchain_stripe_meter.ledger import resolving
from langchain_stripe_meter.ledger.resolving import Unknown
from langchain_stripe_meter.ledger.store import Ledger

LOOKUPS_AT_ONCE = 4
"""Customer searches in flight; Stripe allows 20 a second."""
PAUSE_SECONDS = 5
"""How long lookups rest after one that Stripe did not answer."""
CACHED_AT_MOST = 10_000
FOUND_SECONDS = 300
MISSING_SECONDS = 30
"""How long somebody whom Stripe does not know is not asked for again."""


class Lookups:
    """One courier's questions: ``asking`` are those that Stripe has not answered yet."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._found: TTLCache[Unknown, str] = TTLCache(CACHED_AT_MOST, FOUND_SECONDS, ledger.now)
        self._missing: TTLCache[Unknown, bool] = TTLCache(CACHED_AT_MOST, MISSING_SECONDS, ledger.now)
        self._rest_until = 0
        self.asking: set[Unknown] = set()

    def next(self, now: int) -> tuple[int, list[Unknown]]:
        """How many readings could be settled from memory, and whom to ask Stripe for now."""
        if now < self._rest_until:
            return 0, []
        with self._ledger.deliver_lane().transaction() as connection:
            waiting = resolving.unresolved(connection, now)
            known = {one: self._found.get(one) for one in waiting if one in self._found or one in self._missing}
            moved = sum(self.settle(connection, one, [found] if found else [], now) for one, found in known.items())
        new = [one for one in waiting if one not in known and one not in self.asking]
        asked = new[: LOOKUPS_AT_ONCE - len(self.asking)]
        self.asking.update(asked)
        return moved, asked

    def settle(self, connection: Connection, asked: Unknown, found: list[str], now: int) -> int:
        """Settle the readings of somebody of whom Stripe has these customers: exactly one pays, else they are held."""
        if len(found) == 1:
            self._found.setdefault(asked, found[0])
            return resolving.resolve(connection, asked, found[0], now)
        if not found:
            self._missing.setdefault(asked, True)
        return resolving.hold(connection, asked, _why_held(asked, found), now)

    def failed(self, now: int) -> None:
        """Stripe did not answer: ask again later."""
        self._rest_until = now + PAUSE_SECONDS

    def forget(self, customer: str) -> None:
        """Stripe no longer has this customer."""
        for asked in [one for one, found in self._found.items() if found == customer]:
            del self._found[asked]


def _why_held(asked: Unknown, found: list[str]) -> str:
    by = asked.reference.by
    if not found:
        return f"Stripe has no customer with this {by}"
    return f"Stripe has {len(found)} customers with this {by}: {', '.join(sorted(found)[:10])}"
