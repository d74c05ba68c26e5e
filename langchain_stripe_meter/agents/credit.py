"""A limit that is what a customer's billing credits at Stripe still pay for."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from decimal import Context, Decimal, InvalidOperation
from math import ceil
from queue import SimpleQueue

from cachetools import LRUCache

from langchain_stripe_meter.agents.budget import Spender, check_amount, check_meter, customers_account
from langchain_stripe_meter.core.periods import FINAL_SECONDS
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.errors import ConfigurationError, MeteringError, logger
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.gateway.customers import credit_of
from langchain_stripe_meter.gateway.meters import checked_currency
from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.reentry import inside

REST_SECONDS = 10.0
"""How long a customer is not asked for again after Stripe has not answered."""
_UNITS = Context(prec=28)
REMEMBERED = 100_000
"""Customers whose credit is kept in memory."""

_Key = tuple[str, Reference]


class StripeCredit:
    """An amount for ``SpendLimit``: the units of a meter that a customer's billing credits still pay for.

    Args:
        meter: The handler, whose key may read credit balances.
        unit_price: What one unit of the limited meter costs, in the currency's minor unit (cents): ``Decimal("0.002")``
            for 2 dollars per 100,000 tokens; 1 for a ``Cost`` meter in cents.
        currency: The credits' currency, such as ``"usd"``.
        max_age: Seconds after which what Stripe said is asked for again.
        until_known: What somebody may use as long as Stripe has not said anything; None for no limit.
        settled_after: How long after the end of a period Stripe takes what was used in it off the credits.

    Stripe is never asked while a run waits: a thread of its own asks, one after the other, and the last answer counts
    until the next one. Where Stripe does not answer, that customer is asked for again after ten seconds.

    Stripe takes usage off credits when it finalises the invoice of a period, by default an hour after its end; until
    then, the limit's own count of that period stands against them, in the first hour of the next period as well. So
    ``per`` and ``billing_day`` of the limit must be the billing period, and ``settled_after`` as long as your account
    waits. (``max_age`` comes on top. Whoever is settled sooner may be stopped until then; whoever is settled later may
    use credits twice.) A function of yours around this must carry its ``settled_after``, the seconds, as an attribute.
    """

    def __init__(
        self,
        meter: StripeMeterCallbackHandler,
        *,
        unit_price: int | Decimal | str,
        currency: str = "usd",
        max_age: float = 60.0,
        until_known: int | Decimal | None = None,
        settled_after: timedelta = timedelta(seconds=FINAL_SECONDS),
    ) -> None:
        check_meter(meter, "StripeCredit(...)")
        self._currency = checked_currency(currency)
        self._price = _price(unit_price, self._currency)
        self._max_age = _seconds(max_age)
        self._until_known = _until_known(until_known)
        self.settled_after = _whole_seconds(settled_after) + ceil(self._max_age)
        self._meter = meter
        self._gateway = meter._gateway("StripeCredit")
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The thread, and what it was asked, belong to the parent."""
        self._lock = threading.Lock()
        self._known: LRUCache[_Key, Decimal] = LRUCache(REMEMBERED)
        self._fresh_until: LRUCache[_Key, float] = LRUCache(REMEMBERED)
        self._asked: set[_Key] = set()
        self._questions: SimpleQueue[_Key] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, spender: Spender) -> int | Decimal | None:
        """How many units ``spender`` may use, from memory; what is unknown or old is asked for meanwhile."""
        key = (spender.account, spender.reference)
        with inside(), self._lock:
            if time.monotonic() > self._fresh_until.get(key, 0) and key not in self._asked:
                self._asked.add(key)
                self._ask_later(key)
            return self._known.get(key, self._until_known)

    def refresh(self, customer: str, account: str | None = None) -> Decimal:
        """Ask Stripe now, such as when a customer logs in; returns the units. Raises ``StripeError``.

        ``account`` is as for ``Budget.allowances``.
        """
        return self._ask((customers_account(self._meter, account), Reference("id", customer)))

    def _ask_later(self, key: _Key) -> None:
        self._questions.put(key)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="stripe-meter-credit", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        questions = self._questions
        while True:
            key = questions.get()
            rests = REST_SECONDS
            try:
                self._ask(key)
                rests = self._max_age
            except MeteringError as error:
                logger.warning("stripe-meter: a credit balance could not be read; the last one counts: %s", error)
            except Exception as error:  # noqa: BLE001 - a bug here must not end the thread
                logger.error("stripe-meter: a credit balance could not be read: %s", type(error).__name__)
            finally:
                with inside(), self._lock:
                    self._fresh_until[key] = time.monotonic() + rests
                    self._asked.discard(key)

    def _ask(self, key: _Key) -> Decimal:
        account, reference = key
        found = self._gateway.find_customers(reference, account)
        cents = credit_of(self._gateway, found[0], self._currency, account) if len(found) == 1 else Decimal(0)
        # A debt at Stripe is no negative amount that may be used; and the application may have coarse decimals.
        units = _UNITS.divide(max(cents, Decimal(0)), self._price)
        with inside(), self._lock:
            self._known[key] = units
            self._fresh_until[key] = time.monotonic() + self._max_age
        return units


def _seconds(max_age: object) -> float:
    if isinstance(max_age, int | float) and not isinstance(max_age, bool) and max_age >= 0:
        return max_age
    raise ConfigurationError(f"max_age={max_age!r}: a number of seconds, at least 0.")


def _whole_seconds(span: object) -> int:
    if isinstance(span, timedelta) and span >= timedelta(0):
        return int(span.total_seconds())
    raise ConfigurationError(f"settled_after={span!r}: a timedelta of at least 0, such as timedelta(hours=1).")


def _until_known(amount: object) -> Decimal | None:
    try:
        return None if amount is None else check_amount(amount)
    except ConfigurationError as error:
        raise ConfigurationError(f"until_known=: {error}") from None


def _price(unit_price: object, currency: str) -> Decimal:
    if isinstance(unit_price, int | Decimal | str) and not isinstance(unit_price, bool):
        with suppress(InvalidOperation):
            price = Decimal(unit_price)
            if price.is_finite() and price > 0:
                return price
    raise ConfigurationError(
        f"unit_price={unit_price!r}: an int, a Decimal or a str such as '0.002', above 0, in cents of {currency}."
    )
