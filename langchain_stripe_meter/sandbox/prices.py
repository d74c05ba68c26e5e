"""Products and prices: what makes a meter's sums an amount on an invoice. The sandbox keeps them, and bills nobody."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from langchain_stripe_meter.sandbox import wire
from langchain_stripe_meter.sandbox.rules import Meter
from langchain_stripe_meter.sandbox.wire import EXPAND, INTEGER, LISTING, Field, Json, StripeRefusalError, no_such

MAX_DECIMALS = 12
_INTERVALS = ("day", "week", "month", "year")
_YES_NO = Field(wire.choice, choices=("true", "false"))
NEW_PRODUCT = {
    "name": Field(required=True, limit=250),
    "description": Field(limit=40_000),
    "unit_label": Field(limit=12),
    "metadata": Field(wire.texts, limit=500),
}
NEW_PRICE = {
    "currency": Field(required=True),
    "product": Field(),
    "product_data": Field(wire.fields, fields=NEW_PRODUCT),
    "unit_amount": INTEGER,
    "unit_amount_decimal": Field(),
    "billing_scheme": Field(wire.choice, choices=("per_unit",)),
    "nickname": Field(),
    "recurring": Field(
        wire.fields,
        fields={
            "interval": Field(wire.choice, required=True, choices=_INTERVALS),
            "interval_count": INTEGER,
            "meter": Field(),
            "usage_type": Field(wire.choice, choices=("licensed", "metered")),
        },
    ),
    "metadata": Field(wire.texts, limit=500),
    **EXPAND,
}
PRICES = {
    **LISTING,
    "active": _YES_NO,
    "currency": Field(),
    "product": Field(),
    "type": Field(wire.choice, choices=("one_time", "recurring")),
    "recurring": Field(
        wire.fields, fields={"meter": Field(), "interval": Field(), "usage_type": Field()}
    ),
}  # fmt: skip
PRICE_CHANGES = {"active": _YES_NO, "nickname": Field(), "metadata": Field(wire.texts, limit=500), **EXPAND}


class Prices:
    """Products and prices by id, as Stripe's objects. ``meter`` gives the meter with an id, or refuses."""

    def __init__(self, make_id: Callable[[str], str], meter: Callable[[str], Meter], *, livemode: bool) -> None:
        self._make_id = make_id
        self._meter = meter
        self._livemode = livemode
        self._products: dict[str, Json] = {}
        self._prices: dict[str, Json] = {}

    def _create_product(self, wanted: Json, now: int) -> Json:
        made = self._made("prod", "product", now) | {"description": None, "unit_label": None, "metadata": {}, **wanted}
        self._products[made["id"]] = made
        return made

    def _made(self, prefix: str, kind: str, now: int) -> Json:
        made_id = self._make_id(prefix)
        return {"id": made_id, "object": kind, "active": True, "created": now, "livemode": self._livemode}

    def get_product(self, product_id: str, param: str = "id") -> Json:
        """The product with this id."""
        if product_id not in self._products:
            raise no_such("product", product_id, param)
        return self._products[product_id]

    def create(self, params: Json, now: int) -> Json:
        """Create a price, and maybe its product with it, from the parameters of ``POST /v1/prices``."""
        wanted = wire.check(params, NEW_PRICE)
        amount = _amount(wanted)
        recurring = wanted.get("recurring")
        if recurring is not None:
            self._check_metered(recurring)
        _one_of(wanted, "product", "product_data")
        currency = wanted["currency"].lower()
        if not re.fullmatch(r"[a-z]{3}", currency):
            raise wire.bad_parameter(f"Invalid currency: {wanted['currency']}.", "currency")
        if "product" in wanted:
            product = self.get_product(wanted["product"], "product")
        else:
            product = self._create_product(wanted["product_data"], now)
        made = self._made("price", "price", now) | {
            "billing_scheme": "per_unit",
            "currency": currency,
            "metadata": wanted.get("metadata", {}),
            "nickname": wanted.get("nickname"),
            "product": product["id"],
            "recurring": recurring and {"interval_count": 1, "meter": None, "usage_type": "licensed", **recurring},
            "type": "one_time" if recurring is None else "recurring",
            "unit_amount": int(amount) if amount == int(amount) else None,
            "unit_amount_decimal": f"{amount:f}",
        }
        self._prices[made["id"]] = made
        return made

    def _check_metered(self, recurring: Json) -> None:
        """A price on a meter is a metered one, and a metered one is on a meter [doc]."""
        meter = recurring.get("meter")
        if (recurring.get("usage_type") == "metered") != (meter is not None):
            wanted = "`metered` if a meter is given" if meter is not None else "given with a `meter`"
            raise wire.bad_parameter(f"`recurring[usage_type]` must be {wanted}.", "recurring[usage_type]")
        if meter is not None and not self._meter(meter).active:
            raise StripeRefusalError(f"The meter {meter} is inactive.", param="recurring[meter]")

    def get(self, price_id: str) -> Json:
        """The price with this id."""
        if price_id not in self._prices:
            raise no_such("price", price_id)
        return self._prices[price_id]

    def change(self, price_id: str, params: Json) -> Json:
        """Archive it, or name it; what it costs can never change."""
        changes = wire.check(params, PRICE_CHANGES)
        changes.pop("expand", None)
        price: Json = self.get(price_id) | changes
        price["active"] = str(price["active"]).lower() == "true"
        self._prices[price_id] = price
        return price

    def list(self, wanted: Json, path: str) -> Json:
        """One page of the prices that are asked for, newest first."""
        found = [price for price in reversed(self._prices.values()) if _is_wanted(price, wanted)]
        return wire.page(found, wanted, path)


def _is_wanted(price: Json, wanted: Json) -> bool:
    plain = {name: wanted[name] for name in ("currency", "product", "type") if name in wanted}
    if any(price[name] != value for name, value in plain.items()):
        return False
    if "active" in wanted and price["active"] != (wanted["active"] == "true"):
        return False
    recurring: Any = price["recurring"] or {}
    return all(recurring.get(name) == value for name, value in wanted.get("recurring", {}).items())


def _one_of(wanted: Json, first: str, second: str) -> None:
    if first in wanted and second in wanted:
        message = f"You may only specify one of these parameters: {first}, {second}."
        raise wire.bad_parameter(message, first, "parameters_exclusive")
    if first not in wanted and second not in wanted:
        raise wire.bad_parameter(f"You must specify one of {first} and {second}.", first, "parameter_missing")


def _amount(wanted: Json) -> Decimal:
    _one_of(wanted, "unit_amount", "unit_amount_decimal")
    given: Any = wanted.get("unit_amount", wanted.get("unit_amount_decimal"))
    try:
        amount = Decimal(given)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        raise wire.bad_parameter(f"Invalid decimal: {given}", "unit_amount_decimal", "parameter_invalid_decimal")
    if -int(amount.as_tuple().exponent) > MAX_DECIMALS:
        message = f"Invalid decimal: {given}; must contain at maximum {MAX_DECIMALS} decimal places."
        raise wire.bad_parameter(message, "unit_amount_decimal")
    return amount
