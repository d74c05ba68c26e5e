"""The meters of a Stripe account: listed, made, with a price, and checked, for they must bill what they are sent; what
they have summed up; and taking back what they were sent."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal

from langchain_stripe_meter.core.events import check_account, check_event_name
from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.core.tables import html_table
from langchain_stripe_meter.core.values import exact_sum
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.gateway.client import Gateway, MeterInfo, Price, as_stripe_error, meter_info, on_account

if TYPE_CHECKING:
    from stripe import StripeClient

Interval = Literal["day", "week", "month", "year"]
_INTERVALS = ("day", "week", "month", "year")
MAX_DECIMALS = 12
"""Decimal places of a price, in the currency's minor unit (Stripe's API reference)."""


class MeterList(list[MeterInfo]):
    """Meters; a table in a notebook."""

    def _repr_html_(self) -> str:
        head = ("event_name", "display_name", "status", "problem")
        return html_table(head, [[getattr(meter, name) or "" for name in head] for meter in self])


def list_meters(stripe: str | StripeClient | None = None, *, stripe_account: str = "") -> MeterList:
    """The meters of a Stripe account, the active ones last; ``problem`` says what is wrong with one, if anything is.

    ``stripe`` is an API key or a ``stripe.StripeClient``, default ``$STRIPE_API_KEY``; ``stripe_account`` a connected
    account (``acct_…``). Raises ``ConfigurationError`` for a key that is none, ``StripeError`` where Stripe refuses.
    """
    with closing(Gateway(stripe)) as gateway:
        return MeterList(gateway.meters(check_account(stripe_account)))


def create_meter(
    event_name: str,
    display_name: str | None = None,
    *,
    price: int | Decimal | str | None = None,
    currency: str | None = None,
    interval: Interval = "month",
    stripe: str | StripeClient | None = None,
    stripe_account: str = "",
) -> MeterInfo:
    """A meter that sums what it is sent, as this package needs it, and with ``price`` a product and a metered price.

    ``price`` is what one unit costs, in the minor unit (cents) of ``currency``: ``"0.002"`` with ``"usd"`` for 2
    dollars per 100,000 tokens. ``display_name`` is how invoices call it, by default its event name.

    What is there already is not made twice: neither an active meter of this event name, nor a price of this amount on
    it, also where an earlier try broke off. Give customers a subscription to ``meter.price.id``; then Stripe charges
    for what the meter counts. ``stripe`` and ``stripe_account`` are as for ``list_meters``.

    Raises ``ConfigurationError`` for arguments that cannot be used, and for a meter that is there and would bill
    wrongly; ``StripeError`` where Stripe refuses.
    """
    with closing(Gateway(stripe)) as gateway:
        given = (price, currency, interval)
        return make_meter(gateway, event_name, display_name, given, check_account(stripe_account))


def make_meter(
    gateway: Gateway,
    event_name: str,
    display_name: str | None,
    given: tuple[object, object, object] = (None, None, "month"),
    account: str = "",
) -> MeterInfo:
    """As ``create_meter``; ``given`` are its price, currency and interval."""
    check_event_name(event_name)
    wanted = _checked_price(*given)
    meter = _meter(gateway, event_name, display_name or event_name, account)
    return meter if wanted is None else dataclasses.replace(meter, price=_price(gateway, meter, wanted, account))


def _meter(gateway: Gateway, event_name: str, display_name: str, account: str) -> MeterInfo:
    there = [meter for meter in gateway.meters(account) if meter.event_name == event_name and meter.status == "active"]
    for meter in there:
        if meter.problem:
            raise ConfigurationError(f"It is there already, but {meter.problem} (under another event name).")
        return meter
    params: Any = {
        "display_name": display_name,
        "event_name": event_name,
        "default_aggregation": {"formula": "sum"},
    }
    with as_stripe_error("create the meter"):
        return meter_info(gateway.client.v1.billing.meters.create(params, on_account(account)))


def _checked_price(price: object, currency: object, interval: object) -> tuple[Decimal, str, str] | None:
    if price is None and currency is None:
        return None
    if price is None:
        raise ConfigurationError("A currency needs a price, in cents, such as 0.002.")
    if currency is None:
        raise ConfigurationError("A price needs a currency, such as usd.")
    amount = Decimal("NaN")
    if isinstance(price, int | Decimal | str) and not isinstance(price, bool):
        with suppress(InvalidOperation):
            amount = Decimal(price)
    if not amount.is_finite() or amount < 0 or -int(amount.as_tuple().exponent) > MAX_DECIMALS:
        kinds = "a number such as 0.002" if isinstance(price, str) else "an int, a Decimal or a str such as '0.002'"
        raise ConfigurationError(
            f"{price!r} is no price: use {kinds}, in cents, from 0 up and with {MAX_DECIMALS} decimal places at most."
        )
    if interval not in _INTERVALS:
        raise ConfigurationError(f"{interval!r} is no interval: use one of {', '.join(_INTERVALS)}.")
    return amount, checked_currency(currency), str(interval)


def checked_currency(currency: object) -> str:
    """Three letters, as Stripe writes them."""
    if isinstance(currency, str) and len(currency) == 3 and currency.isascii() and currency.isalpha():
        return currency.lower()
    raise ConfigurationError(f"{currency!r} is no currency: use the three letters of one, such as 'usd'.")


def _price(gateway: Gateway, meter: MeterInfo, wanted: tuple[Decimal, str, str], account: str) -> Price:
    """The price on the meter: the one that is there, else a new one with its product, in one request.

    Its idempotency key stands for what was wanted, so that of two who ask at once only one makes it. Prices that were
    archived count in it: Stripe would answer with them for a day.
    """
    amount, currency, interval = wanted
    prices, options = gateway.client.v1.prices, on_account(account)
    with as_stripe_error("read the meter's prices"):
        query: Any = {"recurring": {"meter": meter.id}, "currency": currency, "limit": 100}
        listed = [(one, _price_info(one)) for one in prices.list(query, options).auto_paging_iter()]
    same = [(one, info) for one, info in listed if (info.unit_amount, info.interval) == (amount, interval)]
    for one, info in same:
        if one.active:
            return info
    asked = hashlib.sha256(f"{meter.id} {amount.normalize():f} {currency} {interval} {len(same)}".encode()).hexdigest()
    once: Any = {**options, "idempotency_key": f"price-{asked}"}
    params: Any = {
        "currency": currency,
        "unit_amount_decimal": f"{amount:f}",
        "recurring": {"interval": interval, "usage_type": "metered", "meter": meter.id},
        "product_data": {"name": meter.display_name},
    }
    with as_stripe_error("create the price"):
        return _price_info(prices.create(params, once))


def _price_info(price: Any) -> Price:
    amount = Decimal(str(price.unit_amount_decimal)) if price.unit_amount_decimal is not None else Decimal("NaN")
    return Price(price.id, str(price.product), amount, price.currency, price.recurring.interval)


def problem_with(event_name: str, info: MeterInfo | None) -> str | None:
    """Why usage sent to ``info``, Stripe's meter of this name or None, would be billed wrongly, and what to do."""
    if info is not None:
        return info.problem
    return (
        f"Stripe has no meter with the event name {event_name!r}; create it "
        f"(stripe-meter meters create {shlex.quote(event_name)}), or correct the name"
    )


def check_meters(gateway: Gateway, wanted: Mapping[str, Iterable[str]], account: str = "") -> None:
    """Refuse meters of an account that cannot bill what they will be sent. Asks Stripe anew.

    ``wanted`` maps event names to the payload keys that are sent along as dimensions. Raises ``ConfigurationError``,
    which names every wrong meter; ``StripeError`` where Stripe does not say.
    """
    gateway.forget_meters(account)
    found = {name: gateway.meter(name, account) for name in wanted}
    if not gateway.can_read_meters(account):
        raise StripeError("The key may not read meters. Give it 'Billing meters: Read', so that they can be checked.")
    problems = [
        problem
        for name, info in found.items()
        if (problem := problem_with(name, info) or _clash(info, wanted[name])) is not None
    ]
    if problems:
        raise ConfigurationError(f"{len(problems)} of {len(found)} meters cannot be billed on: {'; '.join(problems)}.")


def _clash(info: MeterInfo | None, dimensions: Iterable[str]) -> str | None:
    """A dimension that would lose its place in the payload to the customer or the value."""
    taken = sorted({info.customer_key, info.value_key}.intersection(dimensions)) if info is not None else []
    if not taken or info is None:
        return None
    return (
        f"the meter {info.event_name!r} takes the customer or the value from {taken[0]!r}, where a dimension goes; "
        "make one with other keys"
    )


def meters_named(gateway: Gateway, account: str) -> dict[str, list[str]]:
    """The ids of all meters of an account by event name: one that was archived keeps what it was sent."""
    named: dict[str, list[str]] = {}
    for meter in gateway.meters(account):
        named.setdefault(meter.event_name, []).append(meter.id)
    return named


def billed_on(
    gateway: Gateway, meters: list[str], customer: str, span: tuple[int, int], account: str
) -> Decimal | None:
    """What Stripe has summed up on all of these meters from the first to the second time of ``span``.

    None where it cannot be asked of one of them.
    Raises ``StripeError`` where it does not answer.
    """
    sums = [gateway.billed(meter, customer, *span, account) for meter in meters]
    known = [one for one in sums if one is not None]
    return exact_sum(known) if len(known) == len(sums) else None


def cancel(gateway: Gateway, event_name: str, identifier: str, account: str) -> Outcome:
    """Cancel an event that Stripe received within the last 24 hours; never raises.

    ``ACCEPTED`` also where it is cancelled already, ``REFUSED`` for a definite no.
    """
    from langchain_stripe_meter.gateway.replies import advise

    wish: Any = {"event_name": event_name, "type": "cancel", "cancel": {"identifier": identifier}}
    try:
        with as_stripe_error("cancel the meter event"):
            gateway.client.v1.billing.meter_event_adjustments.create(wish, on_account(account))
    except Exception as error:  # noqa: BLE001 - every failure has a meaning, and it is told
        outcome = gateway.outcome_of(error)
        if outcome.move in (Move.REFUSED, Move.UNSEAL) and _is_cancelled(outcome.message):
            return Outcome(Move.ACCEPTED, outcome.message)
        move = Move.REFUSED if outcome.move is Move.UNSEAL else outcome.move
        cause = error.__cause__
        return dataclasses.replace(outcome, move=move, message=advise(cause if isinstance(cause, Exception) else error))
    return Outcome(Move.ACCEPTED)


def _is_cancelled(said: str) -> bool:
    """Stripe has no code for it, only words, in either spelling."""
    said = said.lower()
    return "already" in said and ("cancelled" in said or "canceled" in said)
