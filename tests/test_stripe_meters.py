"""The account's meters, listed and made from Python and on the command line, with a product and a metered price."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sandbox_client import client_of, refusal, words
from typer.testing import CliRunner

from langchain_stripe_meter import create_meter, list_meters
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        yield sandbox


def prices(sandbox: StripeSandbox, **options: Any) -> list[Any]:
    return client_of(sandbox, **options).v1.prices.list({"limit": 100}).data


def test_the_accounts_meters_are_listed_with_what_is_wrong_with_them(sandbox: StripeSandbox) -> None:
    sandbox.create_meter("good")
    sandbox.create_meter("bad<", formula="last")
    found = list_meters(sandbox.api_key)
    assert {meter.event_name: meter.problem is None for meter in found} == {"good": True, "bad<": False}
    assert "bad&lt;" in found._repr_html_()
    with pytest.raises(ConfigurationError, match="pk_"):
        list_meters("pk_test_1")


def test_a_meter_is_made_once(sandbox: StripeSandbox) -> None:
    made = create_meter("tokens", "AI tokens")
    assert (made.event_name, made.display_name, made.formula, made.price) == ("tokens", "AI tokens", "sum", None)
    assert create_meter("tokens") == made
    assert len(list_meters()) == 1


def test_what_would_bill_wrongly_is_not_taken_for_the_meter_that_is_wanted(sandbox: StripeSandbox) -> None:
    sandbox.create_meter("tokens", formula="last")
    with pytest.raises(ConfigurationError, match=r"'last'.*another event name"):
        create_meter("tokens", price=1, currency="usd")
    assert prices(sandbox) == []


def test_with_a_price_comes_a_product_and_a_metered_price_and_each_once(sandbox: StripeSandbox) -> None:
    made = create_meter("tokens", "AI tokens", price="0.002", currency="USD")
    assert made.price is not None
    (price,) = prices(sandbox)
    assert (price.id, price.currency, str(price.unit_amount_decimal)) == (made.price.id, "usd", "0.002")
    recurring = price.recurring
    assert (recurring.meter, recurring.usage_type, recurring.interval) == (made.id, "metered", "month")
    assert client_of(sandbox).v1.products.retrieve(made.price.product).name == "AI tokens"
    assert (made.price.unit_amount, made.price.currency, made.price.interval) == (Decimal("0.002"), "usd", "month")

    assert create_meter("tokens", price=Decimal("0.0020"), currency="usd") == made
    dearer = create_meter("tokens", price=1, currency="usd").price
    yearly = create_meter("tokens", price=1, currency="usd", interval="year").price
    assert dearer is not None
    assert len({made.price.id, dearer, yearly}) == len(prices(sandbox)) == 3

    client_of(sandbox).v1.prices.update(made.price.id, {"active": False})
    again = create_meter("tokens", price="0.002", currency="usd").price
    assert again is not None
    assert again.id != made.price.id  # what was archived is for no new subscription


@pytest.mark.parametrize("path", ["/v1/billing/meters", "/v1/prices"])
def test_a_try_that_broke_off_is_gone_on_with_and_nothing_is_made_twice(sandbox: StripeSandbox, path: str) -> None:
    sandbox.fail(drop_answer(), path=path, where=lambda request: request.method == "POST")
    with pytest.raises(StripeError):
        create_meter("tokens", price="0.002", currency="usd")
    made = create_meter("tokens", price="0.002", currency="usd")
    assert made.price is not None
    assert [price.id for price in prices(sandbox)] == [made.price.id]
    assert len(list_meters()) == 1


def test_two_who_ask_at_once_are_given_the_same_price(sandbox: StripeSandbox) -> None:
    """Neither has seen the other's when it looked: the idempotency key is the same."""
    create_meter("tokens")
    create_meter("tokens", price=2, currency="usd")
    (asked,) = [one for one in sandbox.requests if (one.method, one.path) == ("POST", "/v1/prices")]
    options: Any = {"idempotency_key": asked.idempotency_key}
    params: Any = {**asked.params}
    assert client_of(sandbox).v1.prices.create(params, options).id == prices(sandbox)[0].id
    assert len(prices(sandbox)) == 1


def test_on_a_connected_account_they_are_that_accounts(sandbox: StripeSandbox) -> None:
    sandbox.connect("acct_anna")
    made = create_meter("tokens", price=1, currency="eur", stripe_account="acct_anna")
    assert [meter.id for meter in list_meters(stripe_account="acct_anna")] == [made.id]
    assert len(prices(sandbox, stripe_account="acct_anna")) == 1
    assert list_meters() == prices(sandbox) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"price": 0.002, "currency": "usd"}, r"0\.002 is no price: use an int, a Decimal or a str"),
        ({"price": True, "currency": "usd"}, "True is no price"),
        ({"price": "cheap", "currency": "usd"}, "'cheap'"),
        ({"price": -1, "currency": "usd"}, "-1"),
        ({"price": "NaN", "currency": "usd"}, "NaN"),
        ({"price": "0.0000000000001", "currency": "usd"}, "12 decimal"),
        ({"price": 1}, "A price needs a currency"),
        ({"price": 1, "currency": "dollar"}, "'dollar'"),
        ({"currency": "usd"}, "A currency needs a price"),
        ({"price": 1, "currency": "usd", "interval": "hour"}, "'hour'"),
    ],
)
def test_a_price_that_is_none_is_refused_before_anything_is_made(
    sandbox: StripeSandbox, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        create_meter("tokens", **wrong)
    assert list_meters() == []


def test_the_command_line_makes_them_too(sandbox: StripeSandbox) -> None:
    command = ["meters", "create", "tokens", "--price", "0.002", "--currency", "usd", "--json"]
    first, again = (json.loads(CliRunner().invoke(app, command).stdout) for _ in range(2))
    assert first == again
    assert first["price"]["unit_amount"] == "0.002"
    said = CliRunner().invoke(app, command[:-1]).stdout
    assert first["price"]["id"] in " ".join(said.split())
    assert [price.id for price in prices(sandbox)] == [first["price"]["id"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--price", "0.002"], "A price needs a currency"),
        (["--currency", "usd"], "A currency needs a price"),
        (["--price", "abc", "--currency", "usd"], "'abc' is no price: use a number such as 0.002, in cents"),
        (["--price", "1", "--currency", "dollar"], "'dollar' is no currency"),
        (["--price", "1", "--currency", "usd", "--interval", "hour"], "'hour' is no interval"),
    ],
)
def test_the_command_line_is_answered_in_its_own_words(sandbox: StripeSandbox, options: list[str], said: str) -> None:
    told = CliRunner().invoke(app, ["meters", "create", "tokens", *options])
    assert told.exit_code == 2
    assert said in told.stderr
    assert not re.search(r"\w=|None|Decimal", told.stderr)


# -- the sandbox's own rules


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit_amount_decimal": None}, "unit_amount"),
        ({"unit_amount": 1}, "only specify one"),
        ({"unit_amount_decimal": "0.0000000000001"}, "12 decimal places"),
        ({"unit_amount_decimal": "x"}, "Invalid decimal"),
        ({"product": "prod_1"}, "only specify one"),
        ({"product_data": None, "product": "prod_1"}, "No such product"),
        ({"currency": "dollar"}, "Invalid currency"),
        ({"recurring": {"interval": "month", "usage_type": "metered"}}, "usage_type"),
        ({"recurring": {"interval": "month", "meter": "METER"}}, "usage_type"),
        ({"recurring": {"interval": "month", "usage_type": "metered", "meter": "mtr_1"}}, "No such billing meter"),
        ({"recurring": {"interval": "hour", "usage_type": "metered", "meter": "METER"}}, "interval"),
    ],
)
def test_the_sandbox_refuses_a_price_that_stripe_would_refuse(
    sandbox: StripeSandbox, change: dict[str, Any], said: str
) -> None:
    meter = sandbox.create_meter("tokens").id
    params: dict[str, Any] = {
        "currency": "usd",
        "unit_amount_decimal": "0.5",
        "product_data": {"name": "Tokens"},
        "recurring": {"interval": "month", "usage_type": "metered", "meter": "METER"},
    }
    wrong = {name: value for name, value in {**params, **change}.items() if value is not None}
    for one in (wrong, params):
        if one["recurring"].get("meter") == "METER":
            one["recurring"] = {**one["recurring"], "meter": meter}
    create: Any = client_of(sandbox).v1.prices.create
    assert said in words(refusal(create, wrong))
    assert str(create(params).unit_amount_decimal) == "0.5"
    sandbox.deactivate_meter("tokens")
    assert "inactive" in words(refusal(create, params))
