"""What is looked at before anything is sent, and what is remembered of whom Stripe was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from courier_shop import StillShop

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.delivery.clocks import WRONG_SECONDS, Clocks
from langchain_stripe_meter.delivery.guard import ACCOUNT
from langchain_stripe_meter.delivery.lookups import FOUND_SECONDS, MISSING_SECONDS, Lookups
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.pin import LIVEMODE
from langchain_stripe_meter.ledger.resolving import HELD_RETRY, Unknown
from langchain_stripe_meter.sandbox import refuse

ANN = Reference("email", "ann@example.com")
CUSTOMERS = "/v1/customers"


@pytest.fixture
def shop(quick_folder: Path) -> Iterator[StillShop]:
    shop = StillShop(quick_folder)
    yield shop
    shop.close()


# -- the account and its meters


def test_the_account_is_asked_for_once_and_noted_with_the_mode(shop: StillShop) -> None:
    for key in ("a", "b"):
        shop.record(key)
        shop.answered()
    assert shop.asked("/v1/account") == 1
    assert (shop.ledger.note(ACCOUNT), shop.ledger.note(LIVEMODE)) == (shop.sandbox.account_id, "test")


def test_a_ledger_of_another_account_is_told_and_nothing_is_sent(shop: StillShop) -> None:
    shop.ledger.set_note(ACCOUNT, "acct_1Theirs")
    shop.record("run")
    assert [shop.courier.turn(), shop.courier.turn()] == [0, 0]
    why = (
        "The ledger holds usage of the Stripe account acct_1Theirs, but the key belongs to "
        f"{shop.sandbox.account_id}; nothing is sent. Use that account's key, or give this account a ledger of its own."
    )
    assert shop.status.paused == why
    assert [str(error) for error in shop.errors] == [f"Sending is paused, nothing is lost. {why}"]
    assert (shop.states(), shop.sent()) == ({"run": "resolved"}, [])
    assert shop.ledger.note(ACCOUNT) == "acct_1Theirs"


def test_a_key_that_may_not_read_its_account_goes_on_with_the_ledger_as_it_is(shop: StillShop) -> None:
    shop.ledger.set_note(ACCOUNT, "acct_1Theirs")
    shop.sandbox.fail(refuse(403), path="/v1/account", times=None)
    shop.record("run")
    shop.answered()
    assert shop.states() == {"run": "delivered"}
    assert shop.ledger.note(ACCOUNT) == "acct_1Theirs"


def test_a_meter_that_its_account_does_not_have_is_held_told_and_tried_again_when_it_is_there(shop: StillShop) -> None:
    connected = shop.sandbox.connect("acct_1Connected")
    connected.create_customer(id="cus_1")
    shop.record("here")
    shop.record("there-1", "there-2", account="acct_1Connected")
    shop.answered()
    assert shop.states() == {"here": "delivered", "there-1": "held", "there-2": "held"}
    make = "create it (stripe-meter meters create ai_tokens), or correct the name"
    why = f"Stripe has no meter with the event name 'ai_tokens'; {make}"
    (held,) = views.held(shop.ledger)
    assert (held.reason, len(held.ids)) == (why, 2)
    assert [str(error) for error in shop.errors] == [f"2 readings are held: {why}."]
    connected.create_meter("ai_tokens")
    shop.pass_(HELD_RETRY[0] - 1)
    shop.answered()
    assert shop.status.held == 2
    shop.pass_(1)
    shop.courier.gateway.forget_meters("acct_1Connected")
    for _ in range(2):
        shop.answered()
    assert connected.billed("ai_tokens", "cus_1") == 2
    assert len(shop.errors) == 1


def test_a_customer_who_is_gone_is_told_with_what_stripe_said(shop: StillShop) -> None:
    shop.record("run", customer="cus_gone")
    shop.answered()
    (held,) = views.held(shop.ledger)
    assert "No such customer" in held.reason
    said = f"Usage of cus_gone on ai_tokens is held: {held.reason}. See: stripe-meter held"
    assert [str(error) for error in shop.errors] == [said]


def test_once_a_customer_is_gone_whoever_has_the_address_now_pays_for_what_comes_next(shop: StillShop) -> None:
    shop.sandbox.create_customer(id="cus_old", email=ANN.value)
    shop.record("first", reference=ANN)
    shop.answered()
    shop.sandbox.delete_customer("cus_old")
    shop.sandbox.create_customer(id="cus_new", email=ANN.value)
    for key in ("second", "third"):
        shop.record(key, reference=ANN)
        shop.answered()
    assert shop.states() == {"first": "delivered", "second": "held", "third": "delivered"}
    assert (shop.billed("cus_old"), shop.billed("cus_new")) == (1, 1)


def test_a_meter_that_is_gone_is_looked_at_anew_and_sent_nothing_more(shop: StillShop) -> None:
    shop.record("first")
    shop.answered()
    shop.sandbox.deactivate_meter("ai_tokens")
    shop.record("second")
    shop.answered()
    assert len(shop.sent()) == 2
    for _ in range(3):
        shop.pass_(HELD_RETRY[-1])
        shop.answered()
        shop.answered()
    assert len(shop.sent()) == 2
    assert shop.states() == {"first": "delivered", "second": "held"}


# -- who is looked up


def test_whom_stripe_does_not_have_is_not_asked_for_again_for_half_a_minute(shop: StillShop) -> None:
    shop.record("first", reference=ANN)
    shop.answered()
    shop.pass_(MISSING_SECONDS - 1)
    shop.record("second", reference=ANN)
    shop.answered()
    assert (shop.asked(CUSTOMERS), shop.status.held) == (1, 2)
    assert {row.reason for row in views.tail(shop.ledger)} == {"Stripe has no customer with this email"}
    shop.pass_(1)
    customer = shop.sandbox.create_customer(email=ANN.value)
    shop.record("third", reference=ANN)
    shop.answered()
    assert shop.asked(CUSTOMERS) == 2
    assert shop.billed(customer) >= 1


def test_who_was_found_is_not_asked_for_again_for_five_minutes(shop: StillShop) -> None:
    customer = shop.sandbox.create_customer(email=ANN.value)
    for asked, passed in ((1, 0), (1, FOUND_SECONDS - 1), (2, 1)):
        shop.pass_(passed)
        shop.record(f"at-{shop.now}", reference=ANN)
        shop.answered()
        assert shop.asked(CUSTOMERS) == asked
    assert shop.billed(customer) == 3


@pytest.mark.parametrize("create_missing", [False, True])
def test_who_pays_is_looked_for_on_the_account_whose_usage_it_is(shop: StillShop, create_missing: bool) -> None:
    connected = shop.sandbox.connect("acct_1Connected")
    shop.sandbox.create_customer(id="cus_ours", email=ANN.value)
    connected.create_customer(id="cus_theirs", email=ANN.value)
    lookups = Lookups(shop.ledger, create_missing=create_missing)
    for account, customer in (("", "cus_ours"), ("acct_1Connected", "cus_theirs")):
        assert lookups.ask(shop.courier.gateway, Unknown(account, ANN)).customers == [customer]


def test_of_very_many_customers_with_one_address_ten_are_named(shop: StillShop) -> None:
    for number in range(12):
        shop.sandbox.create_customer(id=f"cus_twin{number:02}", email=ANN.value)
    shop.record("run", reference=ANN)
    shop.answered()
    (held,) = views.held(shop.ledger)
    named = ", ".join(f"cus_twin{number:02}" for number in range(10))
    assert held.reason == f"Stripe has 12 customers with this email: {named}"


@pytest.mark.parametrize("create_missing", [False, True])
def test_what_stripe_says_of_a_failed_lookup_is_told_without_the_person(shop: StillShop, create_missing: bool) -> None:
    refusal = refuse(503, message="Nobody called Ann Smith can be looked for.")
    shop.sandbox.fail(refusal, path=f"{CUSTOMERS}*", times=None)
    lookups = Lookups(shop.ledger, create_missing=create_missing)
    with pytest.raises(StripeError, match="Nobody called <name> can be looked for") as told:
        lookups.ask(shop.courier.gateway, Unknown("", Reference("name", "Ann Smith")))
    assert told.value.__cause__ is not None


def test_a_customer_who_was_made_here_and_deleted_is_held_with_that_reason(shop: StillShop) -> None:
    unknown = Unknown("", ANN)
    made = Lookups(shop.ledger, create_missing=True).ask(shop.courier.gateway, unknown)
    shop.sandbox.delete_customer(made.customers[0])
    again = Lookups(shop.ledger, create_missing=True).ask(shop.courier.gateway, unknown)
    assert again == ([], "Stripe's customer was made here and has been deleted since")


def test_a_bug_in_a_lookup_is_told_and_stops_no_sender(shop: StillShop) -> None:
    broken: Any = Unknown("", None)  # type: ignore[arg-type]
    asked, answer = shop.courier._ask_stripe(broken)
    assert asked is broken
    assert isinstance(answer, StripeError)
    assert str(answer) == "A customer could not be looked up: AttributeError."


# -- clocks


@pytest.mark.parametrize(
    ("date", "asked_at", "now", "said"),
    [
        (WRONG_SECONDS, 0, 0, None),
        (WRONG_SECONDS + 1, 0, 0, "301 seconds behind"),
        (1000, 0, 600, "400 seconds behind"),
        (0, WRONG_SECONDS, 10_000, None),
        (0, WRONG_SECONDS + 1, 10_000, "301 seconds ahead of"),
        (10_000, 0, 20_000, None),
    ],
)
def test_a_clock_is_wrong_by_what_neither_the_way_to_stripe_nor_the_way_back_explains(
    shop: StillShop, date: int, asked_at: int, now: int, said: str | None
) -> None:
    clocks = Clocks(shop.ledger, shop.errors.append)  # type: ignore[arg-type]
    for _ in range(2):
        clocks.compare(shop.now + date, shop.now + asked_at, shop.now + now)
    told = f"This machine's clock is {said} Stripe's" if said else None
    assert shop.status.clock == told
    usage = "; usage is billed for the wrong time. Set the clock."
    assert [str(error) for error in shop.errors] == ([f"{told}{usage}"] if told else [])
