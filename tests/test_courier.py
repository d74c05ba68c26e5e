"""The courier against a stateful stand-in for Stripe: whatever goes wrong, nobody pays twice and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_invariant, wait_until
from courier_shop import EVENTS, Shop, of, payer
from faults import settled, tally
from sqlalchemy import update

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.delivery.lookups import MISSING_SECONDS
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import acts, outbox, views
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import (
    RecordedRequest,
    broken_body,
    drop_answer,
    drop_request,
    hang,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    assert_invariant(shop.ledger, shop.sandbox)
    shop.close()


# -- the way of usage to Stripe


def test_what_was_recorded_is_billed_once_with_its_time_and_identifier(shop: Shop) -> None:
    at = shop.ledger.now() - 86_400
    shop.record("run-1", value="12.5", at=at)
    shop.record("run-2", value=3, customer="cus_2", dimensions={"model": "gpt-4o"})
    shop.drive()
    first, second = sorted(shop.sandbox.events, key=lambda event: event.identifier)
    assert (first.identifier, first.timestamp, first.value) == ("run-1", at, Decimal("12.5"))
    assert second.payload == {"stripe_customer_id": "cus_2", "value": "3", "model": "gpt-4o"}
    assert (shop.courier.delivered, shop.status.delivered) == (2, 2)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_the_thread_delivers_what_it_is_woken_for_and_starts_only_then(shop: Shop) -> None:
    assert not shop.courier.is_running
    for number in range(30):
        shop.record(f"run-{number}", customer=f"cus_{number % 4 + 1}")
        shop.courier.wake()
    wait_until(lambda: shop.status.delivered == 30)
    shop.courier.close(60)
    assert not shop.courier.is_running
    shop.courier.wake()
    assert not shop.courier.is_running


def test_a_meter_with_its_own_payload_keys_is_sent_what_it_reads(shop: Shop) -> None:
    shop.sandbox.create_meter("own", customer_key="who", value_key="how_much")
    shop.record("run", value=7, event_name="own")
    shop.drive()
    assert shop.sandbox.billed("own", "cus_1") == 7


# -- who pays


@pytest.mark.parametrize(
    ("by", "value", "decoys"),
    [
        ("email", "ann@example.com", ["Ann@example.com", "ann@example.com.au"]),
        ("name", "Ann Smith", ["ann smith", "Ann Smith Jr", "Smith Ann"]),
        ("phone", "+4915112345678", ["+49151123456789"]),
    ],
)
def test_a_customer_is_found_exactly_and_never_by_what_only_looks_alike(
    shop: Shop, by: Any, value: str, decoys: list[str]
) -> None:
    for decoy in decoys:
        shop.sandbox.create_customer(**{by: decoy})
    shop.record("early", reference=Reference(by, value))
    shop.drive()
    assert shop.states() == {"early": "held"}
    assert shop.sandbox.billed("ai_tokens") == {}

    shop.sandbox.create_customer(id="cus_right", **{by: value})
    shop.sandbox.advance(seconds=MISSING_SECONDS)  # that there is nobody is remembered for so long
    shop.record("late", reference=Reference(by, value), value=2)
    shop.drive()
    assert shop.sandbox.billed("ai_tokens") == {"cus_right": 3}
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_two_customers_with_one_address_are_held_with_both_named(shop: Shop) -> None:
    pair = [shop.sandbox.create_customer(email="twin@example.com") for _ in range(2)]
    shop.record("run", reference=Reference("email", "twin@example.com"))
    shop.drive()
    (held,) = views.held(shop.ledger)
    assert all(customer in held.reason for customer in pair)
    acts.assign(shop.ledger, held.ids, pair[0])
    shop.drive()
    assert shop.billed(pair[0]) == 1
    settled(shop.ledger, shop.sandbox, fault="two customers with one address")


def test_a_customer_that_is_made_later_is_found_when_the_held_reading_is_due(shop: Shop) -> None:
    shop.record("run", reference=Reference("email", "ann@example.com"))
    shop.drive()
    assert shop.status.held == 1
    customer = shop.sandbox.create_customer(email="ann@example.com")
    shop.sandbox.advance(seconds=60)
    while shop.status.held:
        shop.courier.turn()
    shop.drive()
    assert shop.billed(customer) == 1


def test_a_search_that_hangs_does_not_delay_those_whose_customer_is_known(shop: Shop) -> None:
    answer = threading.Event()
    shop.sandbox.fail(hang(answer), path="/v1/customers*", times=None)
    for number in range(10):
        shop.record(f"unknown-{number}", reference=Reference("email", f"{number}@example.com"))
    shop.courier.turn()
    shop.record("known")
    while not shop.status.delivered:
        shop.courier.turn()
    answer.set()
    shop.drive()
    assert (shop.status.delivered, shop.status.held) == (1, 10)


def test_those_whose_search_stripe_refuses_are_held_and_keep_nobody_waiting(shop: Shop) -> None:
    """As where an account may not search: those found by e-mail are listed, and are not concerned."""
    customer = shop.sandbox.create_customer(email="ann@example.com")
    shop.sandbox.fail(refuse(400, message="Search is not supported."), path="/v1/customers/search", times=None)
    for number in range(6):
        shop.record(f"named-{number}", reference=Reference("name", f"Somebody {number}"))
    shop.record("run", reference=Reference("email", "ann@example.com"))
    shop.drive()
    assert shop.billed(customer) == 1
    assert shop.status.held == 6
    assert all("HTTP 400: Search is not supported." in held.reason for held in views.held(shop.ledger))


def test_a_search_that_fails_is_told_and_tried_again(shop: Shop) -> None:
    customer = shop.sandbox.create_customer(email="ann@example.com")
    shop.sandbox.fail(server_error(), path="/v1/customers*")
    shop.record("run", reference=Reference("email", "ann@example.com"))
    shop.drive()
    assert shop.billed(customer) == 1
    assert "look up a customer by email" in str(shop.errors[0])
    assert "ann@" not in str(shop.errors[0])

    # -- Stripe's answers
    settled(shop.ledger, shop.sandbox, fault="a lookup of a customer fails")


@pytest.mark.parametrize(
    "fault",
    [drop_answer, drop_request, broken_body, server_error, server_error_after_accept],
    ids=lambda one: one.__name__,
)
def test_an_unknown_outcome_is_sent_again_under_its_identifier_and_a_new_key_and_billed_once(
    shop: Shop, fault: Any
) -> None:
    shop.sandbox.fail(fault(), times=2)
    shop.record("run", value=5)
    shop.drive()
    requests = shop.sent()
    assert len(requests) >= 2
    assert {request.params["identifier"] for request in requests} == {"run"}
    assert len({request.headers["idempotency-key"] for request in requests}) == len(requests)
    assert shop.billed() == 5
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="an answer that Stripe lost, broke off or stored as 500")


def test_an_identifier_that_stripe_has_already_counts_as_delivered(shop: Shop) -> None:
    shop.courier.gateway.send_once(outbox.MeterEvent("ai_tokens", "cus_1", Decimal(4), "run", shop.ledger.now()))
    shop.record("run", value=4)
    shop.drive()
    assert shop.states() == {"run": "delivered"}
    assert shop.billed() == 4


def test_429_waits_as_long_as_stripe_says_while_other_customers_go_on(shop: Shop) -> None:
    shop.sandbox.fail(rate_limited(retry_after=40), where=of("cus_1"))
    began = shop.sandbox.now()
    shop.record("a-1", "a-2", "a-3")
    shop.record("b-1", "b-2", customer="cus_2")
    shop.drive()
    refused, *later = shop.sent("cus_1")
    assert refused.status == 429
    assert {request.status for request in later} == {200}
    assert min(request.at for request in later) >= refused.at + 40
    assert max(request.at for request in shop.sent("cus_2")) < began + 40
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="429 Too Many Requests")


def test_the_more_stripe_refuses_the_less_is_sent_at_once(shop: Shop) -> None:
    for number in range(60):
        customer = shop.sandbox.create_customer(id=f"cus_many{number}")
        shop.record(f"run-{number}", customer=customer)
    shop.sandbox.fail(rate_limited(), times=None)
    for _ in range(40):
        shop.courier.turn()
    assert len(shop.sent()) < 40
    shop.sandbox.clear_faults()
    shop.drive()
    assert shop.status.delivered == 60
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="429 Too Many Requests")


def test_nothing_is_sent_to_a_meter_that_nobody_could_look_at(shop: Shop) -> None:
    shop.record("run", at=shop.ledger.now())
    shop.sandbox.fail(refuse(503), path="/v1/billing/meters", times=None)
    shop.drive(seconds=3600)
    assert shop.states() == {"run": "resolved"}
    assert shop.sent() == []
    shop.sandbox.clear_faults()
    shop.drive(seconds=60)
    assert shop.states() == {"run": "delivered"}


def test_a_refused_connection_leaves_no_doubt_and_is_overcome(shop: Shop) -> None:
    shop.record("run", at=shop.ledger.now())
    assert shop.courier.gateway.meter("ai_tokens") is not None
    shop.sandbox.stop()
    shop.drive(seconds=86_400)
    assert shop.states() == {"run": "resolved"}
    shop.sandbox.start()
    shop.drive(seconds=86_400)
    assert shop.billed() == 1
    assert shop.status.doubtful == 0
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="Stripe refuses connections")


def test_a_revoked_key_pauses_everything_burns_nothing_and_is_told_once(shop: Shop) -> None:
    shop.sandbox.revoke(shop.sandbox.api_key)
    shop.record("a")
    shop.record("b", customer="cus_2")
    shop.record("c", customer="cus_3")
    shop.drive(seconds=3600)
    assert shop.status.pending == 3
    assert "401" in str(shop.status.paused)
    assert len([error for error in shop.errors if "paused" in str(error)]) == 1
    assert len(shop.sent()) < 3600 / 30 + 8
    with shop.ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT coalesce(sum(attempts), 0) FROM events").scalar() == 0
    shop.sandbox.allow(shop.sandbox.api_key)
    shop.drive()
    assert (shop.status.delivered, shop.status.paused) == (3, None)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="the key is revoked")


def test_a_key_without_the_permission_pauses_too_and_a_new_courier_clears_the_pause(shop: Shop) -> None:
    shop.sandbox.allow("rk_test_reader", {"meters:read"})
    shop.record("run")
    reader = shop.another_courier(key="rk_test_reader")
    shop.drive(reader, seconds=60)
    assert "403" in str(shop.status.paused)
    reader.close(60)
    shop.drive(shop.courier)
    assert (shop.status.delivered, shop.status.paused) == (1, None)
    settled(shop.ledger, shop.sandbox, fault="the key lacks a permission")


def test_a_key_that_may_only_write_events_suffices(shop: Shop) -> None:
    shop.sandbox.allow("rk_test_writer", {"meter_events:write"})
    shop.record("run")
    shop.drive(shop.another_courier(key="rk_test_writer"))
    assert shop.billed() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda sandbox: sandbox.create_meter("bad") and sandbox.deactivate_meter("bad"),
        lambda sandbox: None,
        lambda sandbox: sandbox.create_meter("bad", formula="last"),
        lambda sandbox: sandbox.create_meter("bad", formula="count"),
        lambda sandbox: sandbox.create_meter("bad", event_time_window="hour"),
    ],
    ids=["deactivated", "unknown", "last", "count", "windowed"],
)
def test_a_meter_that_would_bill_wrongly_is_held_and_only_it(shop: Shop, make: Any) -> None:
    make(shop.sandbox)
    shop.record("bad", event_name="bad")
    shop.record("good")
    shop.drive()
    assert shop.states() == {"bad": "held", "good": "delivered"}
    assert "'bad'" in views.held(shop.ledger)[0].reason
    assert shop.sandbox.billed("bad") == {}
    settled(shop.ledger, shop.sandbox, fault="a meter that adds up wrongly")


def test_a_poison_row_is_set_aside_and_the_queue_goes_on(shop: Shop) -> None:
    shop.sandbox.fail(refuse(400, code="meter_event_invalid_value"), where=of("cus_2"))
    shop.record("refused", customer="cus_2")
    shop.record("too-long", value="1")
    shop.record("good", customer="cus_3")
    with shop.ledger.deliver_lane().transaction() as connection:
        long = update(readings).where(readings.c.key == "too-long").values(value="12345678901234567890")
        connection.execute(long)
    shop.drive()
    assert shop.states() == {"refused": "rejected", "too-long": "held", "good": "delivered"}
    assert shop.courier.rejected == 1
    assert "rejected" in str(shop.errors[0])
    tally("a row that cannot be read or sent", needed_a_person=2)


def test_an_outcome_that_stays_unknown_for_23_hours_is_doubtful_and_never_sent_again(shop: Shop) -> None:
    shop.sandbox.fail(server_error_after_accept(), times=1)
    shop.sandbox.fail(refuse(503), times=None)
    shop.record("run", value=5)
    shop.drive(seconds=60)
    shop.sandbox.advance(hours=23)
    shop.drive()
    assert shop.states() == {"run": "doubtful"}
    shop.sandbox.clear_faults()
    before = len(shop.sent())
    shop.sandbox.advance(hours=48)
    for _ in range(3):
        shop.courier.turn()
    assert len(shop.sent()) == before
    assert shop.billed() == 5
    settled(shop.ledger, shop.sandbox, fault="Stripe is away for a day after an answer was lost")


def test_usage_that_waited_34_days_is_held(shop: Shop) -> None:
    shop.record("run")
    shop.sandbox.advance(days=34, seconds=1)
    shop.drive()
    assert shop.states() == {"run": "held"}
    settled(shop.ledger, shop.sandbox, fault="usage waited for 34 days")


def test_an_event_that_waited_34_days_is_held_instead_of_sent_until_a_person_says_when_it_was(shop: Shop) -> None:
    shop.sandbox.fail(rate_limited(), path=EVENTS, times=None)
    shop.record("run-1", "run-2", value=500)
    shop.record("other", customer="cus_2", at=shop.ledger.now() + 240)
    shop.drive(seconds=60)
    assert set(shop.states().values()) == {"pending"}
    before = len(shop.sent())
    shop.sandbox.advance(days=34)
    shop.sandbox.clear_faults()
    shop.drive()
    assert shop.states() == {"run-1": "held", "run-2": "held", "other": "delivered"}
    assert len(shop.sent()) == before + 1
    (held,) = views.held(shop.ledger)
    assert held.reason.startswith("older than 34 days")
    assert acts.retime(shop.ledger, held) == 2
    shop.drive()
    assert shop.billed() == 1000
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_what_waited_34_days_and_was_rolled_up_is_held_reading_by_reading(shop: Shop) -> None:
    courier = shop.another_courier(roll_up=3600)
    shop.sandbox.fail(rate_limited(), path=EVENTS, times=None)
    shop.record("run-1", "run-2", value=5)
    shop.sandbox.advance(hours=1)
    shop.drive(courier, seconds=60)
    shop.sandbox.advance(days=34)
    shop.sandbox.clear_faults()
    shop.drive(courier)
    assert shop.states() == {"run-1": "held", "run-2": "held"}
    assert acts.write_off(shop.ledger, ["run-1"], reason="goodwill") == 1
    assert acts.retime(shop.ledger, [2]) == 1
    shop.sandbox.advance(hours=1)
    shop.drive(courier)
    assert (shop.states(), shop.billed()) == ({"run-1": "written_off", "run-2": "delivered"}, 5)


# -- how many at once


def test_one_customer_and_meter_has_one_call_at_a_time_while_others_run_in_parallel(shop: Shop) -> None:
    answer = threading.Event()
    arrived: list[str] = []

    def arrives(request: RecordedRequest) -> bool:
        arrived.append(payer(request))
        return True

    shop.sandbox.fail(hang(answer), times=None, where=arrives)
    for customer in ("cus_1", "cus_2", "cus_3"):
        shop.record(*(f"{customer}-{number}" for number in range(4)), customer=customer)
    wait_until(lambda: shop.courier.turn() + 1 and len(arrived) == 3)
    for _ in range(3):
        shop.courier.turn()
    assert sorted(arrived) == ["cus_1", "cus_2", "cus_3"]
    answer.set()
    shop.drive()
    assert {request.status for request in shop.sent()} == {200}
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_no_more_is_in_flight_than_was_allowed(shop: Shop) -> None:
    answer = threading.Event()
    shop.sandbox.fail(hang(answer), times=None)
    courier = shop.another_courier(concurrency=2)
    for customer in ("cus_1", "cus_2", "cus_3"):
        shop.record(customer, customer=customer)
    for _ in range(3):
        shop.send(courier)
    assert courier.in_flight == 2
    answer.set()
    shop.drive(courier)
    assert shop.status.delivered == 3


# -- stopping, and faults of our own


def test_close_keeps_its_deadline_while_stripe_hangs_and_the_next_courier_bills_once(shop: Shop) -> None:
    answer, arrived = threading.Event(), threading.Event()
    shop.sandbox.fail(hang(answer), where=lambda _: arrived.set() or True)  # type: ignore[func-returns-value]
    shop.record("run", value=9)
    shop.courier.wake()
    assert arrived.wait(60)
    shop.courier.close(0.1)
    wait_until(lambda: not shop.courier.is_running, 20)  # less than the client waits for an answer
    assert shop.states() == {"run": "pending"}
    answer.set()
    wait_until(lambda: shop.billed() == 9)
    shop.drive(shop.another_courier())
    assert [request.status for request in shop.sent()][-1] == 400  # a duplicate
    assert shop.billed() == 9
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    settled(shop.ledger, shop.sandbox, fault="Stripe hangs while the handler closes")


def test_close_waits_for_the_answer_where_there_is_time(shop: Shop) -> None:
    answer, arrived = threading.Event(), threading.Event()
    shop.sandbox.fail(hang(answer), where=lambda _: arrived.set() or True)  # type: ignore[func-returns-value]
    shop.record("run")
    shop.courier.wake()
    assert arrived.wait(60)
    closing = threading.Thread(target=shop.courier.close, args=(60,))
    closing.start()
    answer.set()
    closing.join(60)
    assert shop.states() == {"run": "delivered"}


def test_answers_are_kept_while_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.ledger = Ledger(f"sqlite:///{tmp_path}/other.db?timeout=0.05", clock=shop.sandbox.now)
    holder = Ledger(f"sqlite:///{tmp_path}/other.db")
    courier = shop.another_courier()
    shop.record("run", value=3)
    shop.send(courier)
    with holder.deliver_lane().transaction():
        wait_until(lambda: shop.billed() == 3)
        for _ in range(2):
            with pytest.raises(MeteringError):
                courier.turn()
    assert shop.states() == {"run": "sending"}
    courier.turn()
    assert shop.states() == {"run": "delivered"}
    assert len(shop.sent()) == 1
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    holder.close()
    shop.close()


def test_the_thread_outlives_a_ledger_that_cannot_be_used_for_a_while(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop.record("before")
    shop.courier.wake()
    wait_until(lambda: shop.status.delivered == 1)
    lane = shop.ledger.deliver_lane()
    with lane.lock:
        lane.connection.exec_driver_sql("ALTER TABLE events RENAME TO lost")
    shop.courier.wake()
    wait_until(lambda: any("ledger" in str(error) for error in shop.errors))
    with lane.lock:
        lane.connection.exec_driver_sql("ALTER TABLE lost RENAME TO events")
    shop.record("after")
    assert shop.courier.is_running
    wait_until(lambda: shop.status.delivered == 2)


def test_an_on_error_that_raises_does_not_stop_delivery(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_error: MeteringError) -> None:
        raise RuntimeError("mine")

    courier = Courier(shop.ledger, Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url), on_error=broken)
    shop.record("bad", customer="cus_gone")
    shop.record("good")
    shop.drive(courier)
    assert shop.states() == {"bad": "held", "good": "delivered"}
    assert "on_error itself failed" in caplog.text
    courier.close(60)
    courier.gateway.close()


def test_a_customer_who_is_gone_is_told_once_and_billed_when_a_person_says_who_pays(shop: Shop) -> None:
    shop.record("run", customer="cus_1", value=4)
    shop.sandbox.delete_customer("cus_1")
    for _ in range(5):
        shop.send()  # releases what is due
        shop.drive()
        assert shop.states() == {"run": "held"}
        shop.sandbox.advance(hours=2)
    assert len([error for error in shop.errors if "cus_1" in str(error)]) == 1
    assert len(shop.sent("cus_1")) == 5
    assert len({request.idempotency_key for request in shop.sent("cus_1")}) == 5
    (held,) = views.held(shop.ledger)
    acts.assign(shop.ledger, held.ids, "cus_2")
    shop.drive()
    assert shop.billed("cus_2") == 4
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_key_whose_account_stripe_does_not_show_still_delivers(shop: Shop, status: int) -> None:
    shop.sandbox.fail(refuse(status), path="/v1/account", times=None)
    shop.record("run")
    shop.drive()
    assert shop.states() == {"run": "delivered"}
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
