"""Who is looked up at Stripe, and what is remembered of it, per account and for a limited time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from cachetools import LRUCache, TTLCache
from sqlalchemy import Connection

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import MAX_DELAY, Move, backoff
from langchain_stripe_meter.errors import StripeError, logger
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.customers import create_customer, find_recent
from langchain_stripe_meter.ledger import resolving
from langchain_stripe_meter.ledger.resolving import RESOLVE_AT_MOST, Unknown, digest, secret_of
from langchain_stripe_meter.ledger.store import Ledger

LOOKUPS_AT_ONCE = 4
"""Customer searches in flight; Stripe allows 20 a second."""
PAUSE_SECONDS = 5
"""How long lookups on an account rest after one that Stripe did not answer."""
CACHED_AT_MOST = 10_000
FOUND_SECONDS = 300
MISSING_SECONDS = 30
"""How long somebody whom Stripe does not know is not asked for again."""
FAILED_SECONDS = 86_400
"""How long it is remembered that a lookup failed: in so long, each of ``CACHED_AT_MOST`` can be asked for again."""


class Answer(NamedTuple):
    """The customers that Stripe has of somebody, and why there are none where more is known than that."""

    customers: list[str]
    why: str | None = None


class _Failure(NamedTuple):
    """Stripe did not answer for somebody, so many times, who is not asked for again until then (Unix seconds)."""

    tries: int = 0
    until: int = 0


class Lookups:
    """One courier's questions: ``asking`` are those that Stripe has not answered yet.

    With ``create_missing``, somebody whom Stripe does not know is made a customer.
    """

    def __init__(self, ledger: Ledger, *, create_missing: bool) -> None:
        self._ledger = ledger
        self._create_missing = create_missing
        self._secret: bytes | None = None
        self._found: TTLCache[Unknown, str] = TTLCache(CACHED_AT_MOST, FOUND_SECONDS, ledger.now)
        self._missing: TTLCache[Unknown, Answer] = TTLCache(CACHED_AT_MOST, MISSING_SECONDS, ledger.now)
        self._failed: TTLCache[Unknown, _Failure] = TTLCache(CACHED_AT_MOST, FAILED_SECONDS, ledger.now)
        self._told: LRUCache[str, bool] = LRUCache(CACHED_AT_MOST)
        self._told_held: LRUCache[tuple[str, str, bool], bool] = LRUCache(CACHED_AT_MOST)
        self._rests: dict[str, int] = {}
        self.asking: set[Unknown] = set()

    def next(self, now: int, closed: Mapping[str, str]) -> tuple[int, list[Unknown]]:
        """How many readings could be settled from memory, and whom to ask Stripe for now.

        ``closed`` are the accounts that are not to be asked, and why. Who was not found lately, or is on such an
        account, is asked for all the same where somebody wants it done again. Those whose lookup failed are asked
        last, and take no place from others meanwhile.
        """
        self._rests = {account: until for account, until in self._rests.items() if now < until <= now + PAUSE_SECONDS}
        if self._secret is None:  # in a transaction of its own
            self._secret = secret_of(self._ledger)
        with self._ledger.deliver_lane().transaction(shared=True) as connection:
            most = RESOLVE_AT_MOST + len(self._failed)
            waiting = resolving.unresolved(connection, now, list(self._rests), most)
        known: dict[Unknown, Answer] = {}
        for one, again in waiting.items():
            if one in self._found:
                known[one] = Answer([self._found[one]])
            elif one.account in closed and not again:
                known[one] = Answer([], closed[one.account])
            elif one in self._missing and not again:
                known[one] = self._missing[one]
        moved = self._settle_known(known, now) if known else 0
        new = [one for one in waiting if one not in known and one not in self.asking and not self._waits(one, now)]
        asked = sorted(new, key=lambda one: self._failure(one).tries)[: LOOKUPS_AT_ONCE - len(self.asking)]
        self.asking.update(asked)
        return moved, asked

    def _settle_known(self, known: Mapping[Unknown, Answer], now: int) -> int:
        """Settle as many as a transaction should; the others are next."""
        with self._ledger.deliver_lane().transaction() as connection:
            settled = islice(known.items(), RESOLVE_AT_MOST)
            return sum(_settle(connection, one, answer, now) for one, answer in settled)

    def _failure(self, one: Unknown) -> _Failure:
        return self._failed.get(one, _Failure())

    def _waits(self, one: Unknown, now: int) -> bool:
        """Whether somebody's lookup failed a short while ago; what a clock said that was ahead does not count."""
        return now < self._failure(one).until <= now + MAX_DELAY

    def ask(self, gateway: Gateway, asked: Unknown) -> Answer:
        """Ask Stripe; any thread may. Raises ``StripeError``, which does not repeat who was asked for.

        A final no (a search that this account may not make, say) concerns this one alone: it is held, with Stripe's
        words, and the others are looked up all the same.
        """
        try:
            found = gateway.find_customers(asked.reference, asked.account)
            if not found and (alike := _find_alike(gateway, asked)):
                said = f"this email and that of Stripe's customer {_listed(alike)} differ in upper and lower case only"
                return Answer([], said)
            return Answer(found) if found or not self._create_missing else self._create(gateway, asked)
        except StripeError as error:
            if gateway.outcome_of(error, asked.account).move is Move.REFUSED:
                return Answer([], unnamed(str(error), asked))
            raise StripeError(unnamed(str(error), asked)) from error.__cause__

    def _create(self, gateway: Gateway, asked: Unknown) -> Answer:
        """Look once more where no search lags, then make the customer.

        Whoever does the same at this moment sends the same idempotency key, and Stripe gives both the same customer.
        What went wrong concerns this one alone: it is held, and the others are looked up all the same.
        """
        reference, account = asked.reference, asked.account
        if reference.by != "email":  # those are listed, not searched
            recent = find_recent(gateway, reference, account, self._ledger.now())
            if recent:
                return Answer(recent)
        key = digest(self._secret or secret_of(self._ledger), account, reference.text)
        try:
            made = create_customer(gateway, reference, account, key)
        except StripeError as error:
            return Answer([], unnamed(str(error), asked))
        return Answer([made]) if made else Answer([], "Stripe's customer was made here and has been deleted since")

    def settle(self, connection: Connection, asked: Unknown, answer: Answer, now: int) -> int:
        """Settle the readings of somebody of whom Stripe has these customers: exactly one pays, else they are held."""
        if len(answer.customers) == 1:
            self._found[asked] = answer.customers[0]
        elif not answer.customers:
            self._missing[asked] = answer
        self._failed.pop(asked, None)
        self._told.pop(asked.account, None)
        self._tell_held(asked, answer)
        return _settle(connection, asked, answer, now)

    def _tell_held(self, asked: Unknown, answer: Answer) -> None:
        """Say it once for each kind of reason, for there may be very many who are alike."""
        kind = asked.account, asked.reference.by, bool(answer.customers)
        if len(answer.customers) != 1 and kind not in self._told_held:
            self._told_held[kind] = True
            why = (answer.why or _why_held(asked, answer.customers)).rstrip(".")
            logger.warning("stripe-meter: usage is held: %s. The like is not logged again. See: stripe-meter held", why)

    def failed(self, asked: Unknown, now: int) -> bool:
        """Stripe did not answer: ask again later, the later the more often it did not.

        Returns whether that is news: the first time for somebody, and for the account since Stripe last answered there.
        """
        tries, account = self._failure(asked).tries + 1, asked.account
        self._rests[account] = now + PAUSE_SECONDS
        self._failed[asked] = _Failure(tries, now + backoff(tries, asked.reference.text))
        is_news = tries == 1 and account not in self._told
        self._told[account] = True
        return is_news

    def forget(self, customer: str) -> None:
        """Stripe no longer has this customer."""
        for asked in [one for one, found in self._found.items() if found == customer]:
            del self._found[asked]


def _settle(connection: Connection, asked: Unknown, answer: Answer, now: int) -> int:
    found = answer.customers
    if len(found) == 1:
        return resolving.resolve(connection, asked, found[0], now)
    return resolving.hold(connection, asked, answer.why or _why_held(asked, found), now)


def _why_held(asked: Unknown, found: list[str]) -> str:
    by = asked.reference.by
    if not found:
        return f"Stripe has no customer with this {by}"
    return f"Stripe has {len(found)} customers with this {by}: {_listed(found)}"


def _listed(customers: list[str]) -> str:
    return ", ".join(sorted(customers)[:10])


def _find_alike(gateway: Gateway, asked: Unknown) -> list[str]:
    """Who has this e-mail in lower case: Stripe tells the two apart, and the people who write them mostly do not."""
    who = asked.reference
    lower = Reference("email", who.value.encode().lower().decode()) if who.by == "email" else who  # ASCII's letters
    return [] if lower == who else gateway.find_customers(lower, asked.account)


def unnamed(said: str, asked: Unknown) -> str:
    """The same without the person: Stripe's words may quote the name or the number that was asked for."""
    who = asked.reference
    return re.sub(re.escape(who.value), f"<{who.by}>", said, flags=re.IGNORECASE)
