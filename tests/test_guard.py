"""What is looked at before anything is sent, and what is remembered of whom Stripe was asked for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from courier_shop import EVENTS, StillShop, of

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import MAX_DELAY
from langchain_stripe_meter.delivery.guard import (
    LISTING_DELAY,
    LISTINGS_AT_ONCE,
    PAUSE_SECONDS,
    WRONG_SECONDS,
    Clocks,
)
from langchain_stripe_meter.delivery.lookups import FOUND_SECONDS, LOOKUPS_AT_ONCE, MISSING_SECONDS, Lookups
from langchain_stripe_meter.delivery.lookups import PAUSE_SECONDS as LOOKUPS_PAUSE
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.ledger import sealing, views
from langchain_stripe_meter.ledger.resolving import HELD_RETRY, RESOLVE_AT_MOST, Unknown
from langchain_stripe_meter.ledger.store import ACCOUNT, LIVEMODE
from langchain_stripe_meter.sandbox import drop_answer, hang, rate_limited, refuse
from langchain_stripe_meter.sandbox.stripe_sandbox import AccountHandle

ANN = Reference("email", "ann@example.com")
CUSTOMERS, METERS = "/v1/customers", "/v1/billing/meters"
THEIRS = "acct_1Connected"


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
    shop.courier.gateway.load_meters()
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
    assert [str(error) for error in shop.errors] == [f"2 readings held: {why}."]
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


@pytest.mark.parametrize("make", [{"event_time_window": "hour"}, {"formula": "last"}], ids=["windowed", "last"])
def test_what_is_sealed_is_not_sent_to_a_meter_that_has_come_since_and_would_bill_it_wrongly(
    shop: StillShop, make: dict[str, Any]
) -> None:
    shop.sandbox.fail(rate_limited(), path=EVENTS, where=of("cus_1"))
    shop.sandbox.fail(refuse(503), path=EVENTS, where=of("cus_2"))
    shop.courier.gateway.load_meters()
    shop.record("refused", value=10)
    shop.record("unknown", value=10, customer="cus_2")
    shop.answered()
    assert len(shop.sent()) == 2
    shop.sandbox.deactivate_meter("ai_tokens")
    shop.sandbox.create_meter("ai_tokens", **make)
    shop.courier.gateway.forget_meters()
    shop.pass_(60)
    shop.answered()
    assert (len(shop.sent()), shop.billed()) == (2, 0)
    assert shop.states() == {"refused": "held", "unknown": "doubtful"}
    (held,) = views.held(shop.ledger)
    assert shop.courier.gateway.meter("ai_tokens").problem == held.reason
    assert sorted(str(error) for error in shop.errors) == [
        f"Meter event unknown is doubtful: {held.reason}",
        f"Usage of cus_1 on ai_tokens is held: {held.reason}. See: stripe-meter held",
    ]
    asked = shop.asked(METERS)
    shop.pass_(HELD_RETRY[0])
    shop.answered()
    assert shop.asked(METERS) == asked + 1
    assert shop.status.held == 1


def test_a_meter_that_was_put_right_and_is_wrong_again_is_told_again(shop: StillShop) -> None:
    for number in (1, 2):
        shop.sandbox.deactivate_meter("ai_tokens")
        shop.sandbox.create_meter("ai_tokens", formula="last")
        shop.courier.gateway.forget_meters()
        shop.record(f"run-{number}")
        shop.answered()
        assert (shop.status.held, len(shop.errors)) == (1, number)
        shop.sandbox.deactivate_meter("ai_tokens")
        shop.sandbox.create_meter("ai_tokens")
        later(shop, HELD_RETRY[0])
        shop.courier.gateway.forget_meters()
        for _ in range(2):
            shop.answered()
        assert shop.status.delivered == number
    assert str(shop.errors[0]) == str(shop.errors[1])


def test_what_is_recorded_after_its_meters_were_checked_is_not_sent_to_a_wrong_one(shop: StillShop) -> None:
    shop.sandbox.create_meter("windowed", event_time_window="hour")
    shop.courier.gateway.load_meters()
    shop.record("checked")
    (ready, _) = shop.courier._guard.check_meters(shop.now)
    shop.record("unchecked", event_name="windowed")
    with shop.ledger.deliver_lane().transaction() as connection:
        assert sealing.seal(connection, shop.now, None, ready) == 2
    shop.answered()
    assert shop.states() == {"checked": "delivered", "unchecked": "held"}
    assert len(shop.sent()) == 1


# -- accounts that are closed to us, or do not answer


def closed(account: str, status: int = 403) -> dict[str, Any]:
    """How the sandbox refuses whatever is asked of an account."""
    said = f"The provided key does not have access to account '{account}'."
    fault = refuse(status, code="account_invalid" if status == 403 else None, message=said)
    mine = {"path": None, "times": None, "where": lambda request: request.headers.get("stripe-account") == account}
    return {"fault": fault, **mine}


def close_account(shop: StillShop, account: str = THEIRS, status: int = 403) -> None:
    options = closed(account, status)
    shop.sandbox.fail(options.pop("fault"), **options)


def later(shop: StillShop, seconds: int) -> None:
    """Time passes for both: Stripe refuses what is dated more than five minutes ahead."""
    shop.sandbox.advance(seconds=seconds)
    shop.pass_(seconds)


def connect(shop: StillShop, account: str = THEIRS) -> AccountHandle:
    connected = shop.sandbox.connect(account)
    connected.create_meter("ai_tokens")
    connected.create_customer(id="cus_1", email=ANN.value)
    return connected


def of_account(shop: StillShop, account: str = THEIRS) -> int:
    """How much was asked of an account."""
    return len([request for request in shop.sandbox.requests if request.headers.get("stripe-account") == account])


@pytest.fixture(params=["reader", "writer"])
def keyed(request: pytest.FixtureRequest, shop: StillShop) -> StillShop:
    """With a key that may read meters, and with one that may not, so that Stripe says no when something is sent."""
    if request.param == "writer":
        shop.sandbox.allow("rk_test_writer", {"meter_events:write", "customers:read"})
        shop.courier = shop.another_courier(key="rk_test_writer")
    return shop


def test_an_account_that_is_closed_to_us_is_held_told_once_and_keeps_nobody_waiting(keyed: StillShop) -> None:
    shop = keyed
    connected = connect(shop)
    shop.record("theirs-1", account=THEIRS)
    shop.answered()
    close_account(shop)
    shop.record("theirs-2", "theirs-3", account=THEIRS)
    shop.record("theirs-4", account=THEIRS, reference=Reference("email", "nobody@example.com"))
    shop.courier.gateway.forget_meters(THEIRS)
    for number in range(3):
        shop.record(f"ours-{number}", customer=f"cus_{number + 1}")
        shop.answered()
    assert {key: state for key, state in shop.states().items() if key.startswith("ours")} == {
        "ours-0": "delivered", "ours-1": "delivered", "ours-2": "delivered",
    }  # fmt: skip
    assert (shop.status.paused, shop.status.held, shop.status.pending) == (None, 3, 0)
    assert all("HTTP 403" in held.reason and THEIRS in held.reason for held in views.held(shop.ledger))
    (told,) = [str(error) for error in shop.errors]
    assert told.startswith(f"Usage on the account {THEIRS} is held: HTTP 403")
    shop.sandbox.clear_faults()
    for wait in HELD_RETRY[:2]:
        later(shop, wait)
        shop.answered()
        shop.answered()
    assert connected.billed("ai_tokens", "cus_1") == 3
    assert shop.status.held == 1  # nobody has that address


def test_an_account_stays_closed_with_few_questions_and_burns_no_attempt(keyed: StillShop) -> None:
    shop = keyed
    connect(shop)
    close_account(shop)
    for number in range(6):
        shop.record(f"theirs-{number}", account=THEIRS, customer=f"cus_{number}")
    asked = []
    for wait in (0, *HELD_RETRY, *HELD_RETRY):
        later(shop, wait)
        before = of_account(shop)
        for _ in range(3):
            shop.record(f"late-{shop.now}-{_}", account=THEIRS)
            shop.answered()
        asked.append(of_account(shop) - before)
    assert max(asked) <= 8  # what was in flight at once when the first no came
    assert set(shop.states().values()) == {"held"}
    assert len(shop.errors) == 1
    shop.record("ours")
    shop.answered()
    assert shop.states()["ours"] == "delivered"


def test_an_account_that_opened_and_is_closed_again_is_told_again(keyed: StillShop) -> None:
    connect(keyed)
    for number in (1, 2):
        close_account(keyed)
        keyed.record(f"theirs-{number}", account=THEIRS)
        keyed.courier.gateway.forget_meters(THEIRS)
        keyed.answered()
        assert (keyed.states()[f"theirs-{number}"], len(keyed.errors)) == ("held", number)
        keyed.sandbox.clear_faults()
        later(keyed, HELD_RETRY[0])
        for _ in range(2):
            keyed.answered()
        assert keyed.states()[f"theirs-{number}"] == "delivered"


def test_a_retry_asks_at_once_whether_an_account_is_open_again(keyed: StillShop) -> None:
    shop = keyed
    connected = connect(shop)
    close_account(shop)
    shop.record("theirs", account=THEIRS)
    shop.answered()
    assert shop.states() == {"theirs": "held"}
    shop.sandbox.clear_faults()
    sealing.retry(shop.ledger)  # as in another process
    for _ in range(2):
        shop.answered()
    assert connected.billed("ai_tokens", "cus_1") == 1


def test_neither_a_late_no_of_a_closed_account_nor_what_is_new_puts_off_the_next_look(shop: StillShop) -> None:
    connected = connect(shop)
    connected.create_customer(id="cus_2")
    late, arrived = threading.Event(), list[str]()
    said = replace(closed(THEIRS)["fault"], until=late)
    slow = lambda request: of("cus_1")(request) and arrived.append(request.path) is None  # noqa: E731
    shop.sandbox.fail(said, path=EVENTS, where=slow)
    shop.courier.gateway.load_meters(THEIRS)
    shop.record("late", account=THEIRS)
    shop.courier.turn()
    wait_until(lambda: arrived)
    close_account(shop)
    shop.record("theirs", account=THEIRS, customer="cus_2")
    wait_until(lambda: shop.courier.turn() + 1 and shop.states()["theirs"] == "held")
    later(shop, HELD_RETRY[0] - 1)
    late.set()
    shop.answered()
    shop.record("new", account=THEIRS)
    shop.answered()
    assert shop.states() == {"theirs": "held", "late": "held", "new": "held"}
    shop.sandbox.clear_faults()
    later(shop, 1)
    for _ in range(2):
        shop.answered()
    assert shop.states() == {"theirs": "delivered", "late": "delivered", "new": "delivered"}
    assert len(shop.errors) == 1


def test_an_event_whose_outcome_is_unknown_waits_for_its_closed_account_under_its_identifier(keyed: StillShop) -> None:
    shop = keyed
    connected = connect(shop)
    shop.sandbox.fail(drop_answer())
    shop.record("theirs", account=THEIRS)
    shop.answered()
    close_account(shop)
    for _ in range(20):
        later(shop, 600)
        shop.answered()
    assert shop.states() == {"theirs": "pending"}
    assert of_account(shop) <= 2 + 20
    shop.sandbox.clear_faults()
    later(shop, HELD_RETRY[-1])
    shop.answered()
    assert shop.states() == {"theirs": "delivered"}
    assert connected.billed("ai_tokens", "cus_1") == 1


def test_a_key_that_is_refused_pauses_everything_and_one_closed_account_does_not_keep_it_paused(
    shop: StillShop,
) -> None:
    connect(shop)
    shop.record("theirs-first", account=THEIRS)
    shop.record("ours")
    shop.courier.gateway.meter("ai_tokens", THEIRS)
    shop.courier.gateway.meter("ai_tokens")
    shop.sandbox.revoke(shop.sandbox.api_key)
    shop.answered()
    assert "401" in str(shop.status.paused)
    shop.sandbox.allow(shop.sandbox.api_key)
    close_account(shop)
    for _ in range(3):
        later(shop, PAUSE_SECONDS)
        shop.answered()
    assert shop.states() == {"theirs-first": "held", "ours": "delivered"}
    assert shop.status.paused is None


def test_a_key_that_is_refused_when_it_asks_for_meters_pauses_everything(shop: StillShop) -> None:
    shop.sandbox.fail(refuse(401, message="Expired API Key provided."), path=METERS)
    shop.record("run")
    shop.answered()
    assert shop.states() == {"run": "resolved"}
    assert "Expired API Key" in str(shop.status.paused)
    assert len(shop.errors) == 1
    later(shop, PAUSE_SECONDS)
    shop.answered()
    assert (shop.states(), shop.status.paused) == ({"run": "delivered"}, None)


@pytest.mark.parametrize("account", [THEIRS, ""])
@pytest.mark.parametrize("status", [400, 404])
def test_an_account_whose_meters_stripe_will_not_list_is_held_told_once_and_waits_alone(
    shop: StillShop, account: str, status: int
) -> None:
    connected = connect(shop)
    other = "" if account else THEIRS
    of_it = lambda request: (request.headers.get("stripe-account") or "") == account  # noqa: E731
    shop.sandbox.fail(refuse(status, message="It has no meters."), path=METERS, times=None, where=of_it)
    shop.record("odd", account=account)
    shop.record("good", account=other)
    shop.answered()
    assert shop.states() == {"odd": "held", "good": "delivered"}
    (held,) = views.held(shop.ledger)
    assert f"HTTP {status}: It has no meters" in held.reason
    (told,) = shop.errors
    assert str(told).startswith(f"Usage on {f'the account {account}' if account else 'our own account'} is held: HTTP")
    asked = shop.asked(METERS)
    for _ in range(12):
        later(shop, 60)
        shop.record(f"odd-{shop.now}", account=account)
        shop.answered()
    assert shop.asked(METERS) - asked <= 2 + 3  # after a minute, five more and fifteen; the good one's every five
    assert (len(shop.errors), shop.status.pending) == (1, 0)
    shop.sandbox.clear_faults()
    later(shop, HELD_RETRY[2])
    for _ in range(2):
        shop.answered()
    assert shop.status.held == 0
    assert shop.billed() + connected.billed("ai_tokens", "cus_1") == 14


def test_an_account_whose_meters_stripe_does_not_list_for_now_waits_alone_and_is_told_once(shop: StillShop) -> None:
    connect(shop)
    theirs = lambda request: request.headers.get("stripe-account") == THEIRS  # noqa: E731
    shop.sandbox.fail(refuse(503), path=METERS, times=None, where=theirs)
    shop.record("theirs", account=THEIRS)
    for number in range(100):
        shop.record(f"ours-{number}")
        shop.answered()
        later(shop, 1)
    states = shop.states()
    assert states.pop("theirs") == "resolved"
    assert set(states.values()) == {"delivered"}
    assert of_account(shop) < 12
    (told,) = shop.errors
    assert str(told).startswith(f"Usage on the account {THEIRS} waits: ")
    assert "HTTP 503" in str(told)
    shop.sandbox.clear_faults()
    later(shop, PAUSE_SECONDS)
    shop.answered()
    assert shop.states()["theirs"] == "delivered"


def test_an_account_that_did_not_answer_and_is_then_closed_is_told_to_be_held(shop: StillShop) -> None:
    connect(shop)
    theirs = lambda request: request.headers.get("stripe-account") == THEIRS  # noqa: E731
    shop.sandbox.fail(refuse(503), path=METERS, where=theirs)
    shop.record("theirs", account=THEIRS)
    shop.answered()
    close_account(shop)
    later(shop, LISTING_DELAY)
    shop.answered()
    waits, held = [str(error) for error in shop.errors]
    assert waits.startswith(f"Usage on the account {THEIRS} waits: ")
    assert held.startswith(f"Usage on the account {THEIRS} is held: HTTP 403")


def test_an_account_that_is_slow_to_list_its_meters_delays_no_other(shop: StillShop) -> None:
    connect(shop)
    slow, arrived = threading.Event(), list[str]()
    theirs = lambda request: request.headers.get("stripe-account") == THEIRS  # noqa: E731
    shop.sandbox.fail(
        hang(slow), path=METERS, times=None, where=lambda one: theirs(one) and arrived.append(one.path) is None
    )
    shop.record("theirs", account=THEIRS)
    shop.record("ours")
    wait_until(lambda: shop.courier.turn() + 1 and shop.status.delivered == 1)
    assert (shop.states(), len(arrived)) == ({"theirs": "resolved", "ours": "delivered"}, 1)
    slow.set()
    shop.answered()
    assert shop.states()["theirs"] == "delivered"


def test_no_more_accounts_are_asked_for_their_meters_at_once_than_so_many(shop: StillShop) -> None:
    answer, arrived = shop.hang(METERS)
    for number in range(LISTINGS_AT_ONCE + 3):
        shop.record(f"run-{number}", account=f"acct_{number}")
        connect(shop, f"acct_{number}")
    for _ in range(2):
        shop.courier.turn()
    wait_until(lambda: len(arrived) == LISTINGS_AT_ONCE)
    assert shop.courier.in_flight == LISTINGS_AT_ONCE
    answer.set()
    shop.answered()
    assert shop.status.delivered == LISTINGS_AT_ONCE + 3


def test_readings_of_a_missing_meter_stay_held_while_stripe_does_not_have_it_and_wait_longer_and_longer(
    shop: StillShop,
) -> None:
    shop.record("run-1", "run-2", event_name="missing")
    shop.answered()
    seen, asked = set[str](), [shop.asked(METERS)]
    for wait in (*HELD_RETRY, HELD_RETRY[-1]):
        later(shop, wait - 1)
        shop.answered()
        assert shop.asked(METERS) == asked[-1]
        later(shop, 1)
        while shop.courier.turn() or shop.courier.in_flight:
            seen |= set(shop.states().values())
        asked.append(shop.asked(METERS))
    assert seen <= {"held"}
    assert [later - earlier for earlier, later in itertools.pairwise(asked)] == [1] * 5
    assert len(shop.errors) == 1


def test_new_usage_of_a_missing_meter_is_held_without_asking_stripe_each_time(shop: StillShop) -> None:
    for number in range(5):
        shop.record(f"run-{number}", event_name="missing")
        shop.answered()
        later(shop, 5)
    assert (shop.asked(METERS), shop.status.held, len(shop.errors)) == (1, 5, 1)
    shop.sandbox.create_meter("missing")
    sealing.retry(shop.ledger)
    for _ in range(2):
        shop.answered()
    assert shop.sandbox.billed("missing", "cus_1") == 5


def test_usage_that_keeps_coming_does_not_put_off_the_next_look_at_its_missing_meter(shop: StillShop) -> None:
    shop.record("first", event_name="missing")
    shop.answered()
    later(shop, HELD_RETRY[0] - 1)
    shop.record("second", event_name="missing")
    shop.answered()
    assert shop.asked(METERS) == 1
    later(shop, 1)
    shop.answered()
    assert shop.asked(METERS) == 2


# -- who is looked up


def test_a_retry_in_another_process_finds_a_customer_who_was_made_a_moment_ago(shop: StillShop) -> None:
    shop.record("first", reference=ANN)
    shop.answered()
    assert shop.status.held == 1
    customer = shop.sandbox.create_customer(email=ANN.value)
    sealing.retry(shop.ledger)
    shop.answered()
    assert shop.billed(customer) == 1


def test_lookups_that_stripe_does_not_answer_for_one_account_rest_on_that_account_alone(shop: StillShop) -> None:
    connect(shop)
    customer = shop.sandbox.create_customer(email=ANN.value)
    theirs = lambda request: request.headers.get("stripe-account") == THEIRS  # noqa: E731
    shop.sandbox.fail(refuse(503), path=f"{CUSTOMERS}*", times=None, where=theirs)
    for number in range(RESOLVE_AT_MOST + 1):
        shop.record(f"theirs-{number}", account=THEIRS, reference=Reference("email", f"{number}@example.com"))
    shop.answered()
    shop.record("ours", reference=ANN)
    shop.answered()
    assert shop.billed(customer) == 1
    assert of_account(shop) == LOOKUPS_AT_ONCE
    later(shop, LOOKUPS_PAUSE - 1)
    shop.answered()
    assert of_account(shop) == LOOKUPS_AT_ONCE
    later(shop, 1)
    shop.answered()
    assert of_account(shop) > LOOKUPS_AT_ONCE


def record_somebodies(shop: StillShop, count: int) -> None:
    """Usage of so many people of whom Stripe's search fails, while it still lists customers by e-mail."""
    shop.sandbox.fail(refuse(500), path=f"{CUSTOMERS}/search", times=None)
    for number in range(count):
        shop.record(f"named-{number}", reference=Reference("name", f"Somebody {number}"))


def test_a_status_says_that_somebody_cannot_be_looked_up_until_that_is_over(shop: StillShop) -> None:
    shop.sandbox.create_customer(id="cus_ann", email=ANN.value)
    courier = shop.another_courier(key="rk_test_narrow")
    shop.sandbox.allow("rk_test_narrow", {"meter_events:write"})
    shop.record("run", reference=ANN)
    wait_until(lambda: courier.turn() + 1 and shop.status.waits)
    assert "customers" in str(shop.status.waits)
    assert ANN.value not in str(shop.status.waits)
    shop.sandbox.allow("rk_test_narrow", {"meter_events:write", "customers:read"})
    shop.drive_still(courier)
    assert shop.states() == {"run": "delivered"}
    assert shop.ledger.note("waits") is None


def test_those_whose_lookups_keep_failing_are_asked_last_and_ever_more_seldom_and_told_once(shop: StillShop) -> None:
    customer = shop.sandbox.create_customer(email=ANN.value)
    record_somebodies(shop, LOOKUPS_AT_ONCE)
    shop.record("run", reference=ANN)
    shop.answered()
    later(shop, LOOKUPS_PAUSE)
    shop.answered()
    assert shop.billed(customer) == 1
    for _ in range(200):
        later(shop, LOOKUPS_PAUSE)
        shop.answered()
    assert shop.asked(f"{CUSTOMERS}/search") <= 12 * LOOKUPS_AT_ONCE
    assert len(shop.errors) == 1
    shop.sandbox.clear_faults()
    later(shop, MAX_DELAY)
    shop.answered()
    assert shop.status.held == LOOKUPS_AT_ONCE
    shop.sandbox.fail(refuse(500), path=CUSTOMERS)
    shop.record("another", reference=Reference("email", "bob@example.com"))
    shop.answered()
    assert len(shop.errors) == 2


def test_however_many_lookups_fail_somebody_new_is_looked_up(shop: StillShop) -> None:
    customer = shop.sandbox.create_customer(email=ANN.value)
    record_somebodies(shop, RESOLVE_AT_MOST + 1)
    for _ in range(RESOLVE_AT_MOST // LOOKUPS_AT_ONCE + 1):
        shop.answered()
        later(shop, LOOKUPS_PAUSE)
    shop.record("run", reference=ANN)
    shop.answered()
    assert shop.billed(customer) == 1


def test_those_of_a_closed_account_do_not_keep_others_from_being_looked_up(shop: StillShop) -> None:
    connect(shop)
    customer = shop.sandbox.create_customer(email=ANN.value)
    close_account(shop)
    for number in range(LOOKUPS_AT_ONCE + 2):
        shop.record(f"theirs-{number}", account=THEIRS, reference=Reference("email", f"{number}@example.com"))
    shop.record("ours", reference=ANN)
    for _ in range(2):
        shop.answered()
    assert shop.billed(customer) == 1
    assert (shop.status.held, of_account(shop)) == (LOOKUPS_AT_ONCE + 2, LOOKUPS_AT_ONCE)
    shop.record("theirs-late", account=THEIRS, reference=Reference("email", "late@example.com"))
    shop.answered()
    assert (shop.status.held, of_account(shop)) == (LOOKUPS_AT_ONCE + 3, LOOKUPS_AT_ONCE)
    assert all("HTTP 403" in held.reason for held in views.held(shop.ledger))
    assert len(shop.errors) == 1


def test_no_more_people_are_looked_up_at_once_than_so_many(shop: StillShop) -> None:
    answer, arrived = shop.hang(CUSTOMERS)
    for number in range(3 * LOOKUPS_AT_ONCE):
        shop.record(f"run-{number}", reference=Reference("email", f"{number}@example.com"))
    for _ in range(3):
        shop.courier.turn()
    wait_until(lambda: len(arrived) == LOOKUPS_AT_ONCE)
    assert shop.courier.in_flight == LOOKUPS_AT_ONCE
    answer.set()
    shop.answered()
    assert shop.status.held == 3 * LOOKUPS_AT_ONCE


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
