"""What one turn of the courier does, what it tells, and how long it rests between turns."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from conftest import wait_until
from courier_shop import EVENTS, StillShop, of, payer

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.delivery.courier import BLOCKED_SECONDS, CHORES_SECONDS, IDLE_SECONDS, Courier
from langchain_stripe_meter.delivery.guard import PAUSE_SECONDS, PAUSED
from langchain_stripe_meter.delivery.lookups import LOOKUPS_AT_ONCE
from langchain_stripe_meter.delivery.lookups import PAUSE_SECONDS as LOOKUP_PAUSE_SECONDS
from langchain_stripe_meter.errors import MeteringError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import outbox, sealing
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import Fault, drop_answer, rate_limited, refuse

METERS = "/v1/billing/meters"
ANN = Reference("email", "ann@example.com")


@pytest.fixture
def shop(quick_folder: Path) -> Iterator[StillShop]:
    shop = StillShop(quick_folder)
    yield shop
    shop.close()


def moves(shop: StillShop) -> list[int]:
    """What the turns return, those left out in which nothing moved, until nothing is in flight."""
    seen = [shop.courier.turn()]
    while shop.courier.in_flight:
        seen.append(shop.courier.turn())
    return [one for one in [*seen, shop.courier.turn()] if one]


# -- turns


def test_a_turn_says_how_much_moved(shop: StillShop) -> None:
    shop.record("run")
    assert moves(shop) == [1 + 1, 1]  # sealed and claimed; settled
    shop.record("by-name", reference=ANN)
    assert moves(shop) == [1]  # held: there is nobody
    shop.sandbox.create_customer(id="cus_ben", email="ben@example.com")
    shop.record("asked", reference=Reference("email", "ben@example.com"))
    assert moves(shop) == [1 + 1 + 1, 1]  # resolved, sealed and claimed; settled
    shop.record("remembered", reference=Reference("email", "ben@example.com"))
    assert moves(shop) == [1 + 1 + 1, 1]


def test_a_turn_counts_what_it_took_over_from_a_courier_that_died(shop: StillShop) -> None:
    shop.record("run")
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.now)
        assert len(outbox.claim(connection, 1, shop.now)) == 1
    shop.pass_(outbox.LEASE_SECONDS + 1)
    assert shop.courier.turn() == 1


def test_what_was_delivered_and_rejected_is_counted(shop: StillShop) -> None:
    shop.sandbox.fail(refuse(400, code="meter_event_invalid_value"), where=of("cus_2"), times=None)
    for key in ("a", "b"):
        shop.record(f"good-{key}")
        shop.record(f"bad-{key}", customer="cus_2")
        shop.answered()
    assert (shop.courier.delivered, shop.courier.rejected) == (2, 2)
    assert [str(error) for error in shop.errors] == [
        f"Meter event bad-{key} is rejected: HTTP 400: The sandbox was told to refuse this." for key in ("a", "b")
    ]


def test_chores_and_watches_are_done_once_a_minute(shop: StillShop) -> None:
    chores: list[int] = []
    watches: list[int] = []
    shop.courier = shop.another_courier(chores=[chores.append], watches=[watches.append])
    began = shop.now
    for passed in (0, CHORES_SECONDS - 1, 1, 1):
        shop.pass_(passed)
        shop.courier.turn()
    assert chores == watches == [began, began + CHORES_SECONDS]


def test_chores_rest_while_stripe_cannot_be_asked_and_watches_do_not(
    shop: StillShop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chores: list[int] = []
    watches: list[int] = []
    shop.courier = shop.another_courier(chores=[chores.append], watches=[watches.append])
    shop.sandbox.fail(refuse(503, headers={"Retry-After": "50"}), path="/v1/account", times=None)
    shop.record("run")
    shop.record("by-email", reference=ANN)
    assert [shop.courier.turn(), shop.courier.turn()] == [0, 0]
    assert (chores, watches) == ([], [shop.now])
    (said,) = [record.getMessage() for record in caplog.records if record.name == "langchain_stripe_meter"]
    assert re.match("stripe-meter: sending waits: .*HTTP 503", said)
    shop.pass_(49)
    assert shop.courier.turn() == 0
    assert (shop.asked("/v1/account"), shop.asked(METERS)) == (1, 0)
    assert shop.states() == {"run": "resolved", "by-email": "recorded"}
    assert shop.asked("/v1/customers") == 0
    shop.sandbox.clear_faults()
    shop.pass_(1)
    shop.answered()
    assert chores == [shop.now]
    assert shop.states() == {"run": "delivered", "by-email": "held"}


def test_a_chore_that_fails_is_told_and_keeps_no_other_from_being_done(
    shop: StillShop, caplog: pytest.LogCaptureFixture
) -> None:
    def known(_now: int) -> None:
        raise StripeError("It could not be compared.")

    def unknown(_now: int) -> None:
        raise ValueError("ann@example.com")

    done: list[int] = []
    shop.courier = shop.another_courier(chores=[unknown, known, done.append])
    shop.courier.turn()
    assert done == [shop.now]
    assert [str(error) for error in shop.errors] == ["It could not be compared."]
    ours = [record.getMessage() for record in caplog.records if record.name == "langchain_stripe_meter"]
    assert "stripe-meter: It could not be compared." in ours
    (own,) = [line for line in ours if "ValueError" in line]
    assert re.fullmatch(r"stripe-meter: the courier failed: ValueError at .*test_courier_turns\.py:\d+", own)
    assert "ann@" not in caplog.text


def test_an_on_error_that_raises_is_named_in_the_log(shop: StillShop, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_error: MeteringError) -> None:
        raise RuntimeError("mine")

    shop.courier._on_error = broken
    shop.courier._report(StripeError("The card is cold."))
    assert [record.getMessage() for record in caplog.records] == [
        "stripe-meter: The card is cold.",
        "stripe-meter: on_error itself failed: RuntimeError",
    ]


# -- pauses


def test_what_can_be_sent_ends_a_pause_that_an_earlier_courier_noted(shop: StillShop) -> None:
    shop.ledger.set_note(PAUSED, "Stripe refused the key")
    shop.record("run")
    shop.answered()
    assert shop.status.paused is None


def use_elsewhere(shop: StillShop, identifier: str) -> None:
    event = outbox.MeterEvent("ai_tokens", "cus_2", Decimal(7), identifier, shop.now)
    shop.courier.gateway.send_once(event)


def test_an_identifier_that_stripe_had_before_this_ledger_sent_it_is_told_and_counts_as_delivered(
    shop: StillShop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="langchain_stripe_meter")
    use_elsewhere(shop, "run")
    shop.record("run", value=4)
    shop.answered()
    assert (shop.states(), shop.billed(), shop.billed("cus_2")) == ({"run": "delivered"}, 0, 7)
    (told,) = shop.errors
    assert str(told).startswith("Stripe had a meter event run already, which this ledger never sent.")
    use_elsewhere(shop, "next")
    shop.record("next", value=4)
    shop.answered()
    assert len(shop.errors) == 1  # all of a restored database would say the same
    assert "a meter event next already, which this ledger never sent" in caplog.text


@pytest.mark.parametrize("customer", ["cus_1", "cus_2"])
def test_two_ledgers_that_send_one_identifier_in_the_same_second_are_told_apart(
    shop: StillShop, quick_folder: Path, customer: str
) -> None:
    shop.record("run", customer=customer)
    shop.answered()
    with closing(Ledger(f"sqlite:///{quick_folder}/other.db", clock=lambda: shop.now)) as other:
        shop.ledger = other
        shop.courier = shop.another_courier()
        shop.record("run")
        shop.answered()
    (told,) = shop.errors
    assert "which this ledger never sent" in str(told)
    assert "If two handlers with a ledger each meter the same runs, each is billed once: attach one." in str(told)


@pytest.mark.parametrize("before", [drop_answer(), rate_limited()], ids=["no answer", "refused"])
def test_an_identifier_that_this_ledger_has_sent_before_is_taken_for_its_own(shop: StillShop, before: Fault) -> None:
    shop.sandbox.fail(before, path=EVENTS)
    shop.record("run", value=4)
    shop.answered()
    assert shop.states() == {"run": "pending"}
    use_elsewhere(shop, "run")
    shop.pass_(60)
    shop.answered()
    assert (shop.states(), shop.errors) == ({"run": "delivered"}, [])


def test_every_pause_is_told_once_with_what_to_do(shop: StillShop) -> None:
    for key in ("a", "b"):
        shop.sandbox.fail(refuse(403, code="more_permissions_required", message="It may not."), times=2)
        shop.record(key)
        shop.answered()
        assert str(shop.status.paused).startswith("Stripe refused the key; HTTP 403")
        assert shop.courier.turn() == 0
        shop.pass_(PAUSE_SECONDS)
        shop.answered()
        shop.pass_(PAUSE_SECONDS - 1)
        assert shop.courier.turn() == 0
        shop.pass_(1)
        shop.answered()
        assert shop.status.paused is None
    told = [str(error) for error in shop.errors]
    assert len(told) == 2
    assert all(one.startswith("Sending is paused, nothing is lost. Stripe refused the key; HTTP 403") for one in told)
    assert all(one.endswith("may not. Check the key: it is tried again every 30 seconds.") for one in told)


def test_a_key_that_is_refused_when_the_account_is_asked_for_pauses(shop: StillShop) -> None:
    shop.sandbox.revoke(shop.sandbox.api_key)
    shop.record("run")
    assert [shop.courier.turn(), shop.courier.turn()] == [0, 0]
    assert str(shop.status.paused).startswith("Stripe refused the key; HTTP 401")
    (told,) = shop.errors
    assert str(told).startswith("Sending is paused, nothing is lost. Stripe refused the key; HTTP 401")
    assert shop.asked("/v1/") == 1
    shop.pass_(PAUSE_SECONDS)
    shop.courier.turn()
    assert shop.asked("/v1/") == 2
    assert len(shop.errors) == 1


# -- rests


class Rests(threading.Event):
    """A wake-up flag that stores how long was waited for it, and waits no longer than that takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return True


def test_the_courier_rests_until_something_is_due_but_no_longer_than_it_takes_to_look_for_what_others_recorded(
    shop: StillShop,
) -> None:
    rests = shop.courier._wake = Rests()
    shop.courier._rest()
    shop.record("held", reference=ANN)
    shop.answered()
    with shop.ledger.deliver_lane().transaction() as connection:
        due = outbox.next_due(connection)
    assert due is not None
    for early in (600, 3, 0, -60):
        shop.now = due - early
        shop.courier._rest()
    shop.courier._pace.rest(2, shop.now)
    shop.courier._rest()
    shop.courier._pace.rest(600, shop.now)
    shop.courier._rest()
    assert rests.seconds == [IDLE_SECONDS, IDLE_SECONDS, 3, BLOCKED_SECONDS, BLOCKED_SECONDS, 2, IDLE_SECONDS]


class Answers(SimpleQueue[Any]):
    """What came back from Stripe, which stores whether and how long was waited for it."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.waits.append(timeout if block else None)
        return super().get(block, timeout)


def test_an_answer_is_waited_for_while_one_is_to_come_and_nothing_else_to_do(shop: StillShop) -> None:
    answer, _ = shop.hang()
    courier, answers = shop.courier, Answers()
    courier._results = answers
    shop.record("run")
    shop.send()
    courier._collect(0.01)
    courier._nudge()
    courier._collect(30)
    courier._wake.clear()
    answer.set()
    courier._collect(30)
    courier._settle()
    courier._collect(30)
    at_first, in_flight, woken, answered, after = [None], [0.01], [None, None], [30, None], [None]
    assert answers.waits == at_first + in_flight + woken + answered + after
    assert shop.states() == {"run": "delivered"}


def test_the_courier_never_rests_with_a_request_in_flight_nor_after_a_turn_in_which_something_moved(
    shop: StillShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, _ = shop.hang()
    courier = shop.courier
    turns: list[int] = []
    rested: list[tuple[int, int]] = []
    turn, rest = courier.turn, courier._rest

    def counted() -> int:
        turns.append(turn())
        return turns[-1]

    def noted() -> None:
        rested.append((turns[-1], courier.in_flight))
        rest()

    monkeypatch.setattr(courier, "turn", counted)
    monkeypatch.setattr(courier, "_rest", noted)
    shop.record("run")
    courier.wake()
    wait_until(lambda: 0 in turns)
    assert rested == []
    answer.set()
    wait_until(lambda: rested)
    assert set(rested) == {(0, 0)}
    assert shop.states() == {"run": "delivered"}


# -- lookups


def test_no_more_than_so_many_are_looked_up_at_once_and_nobody_twice(shop: StillShop) -> None:
    answer, arrived = shop.hang("/v1/customers*")
    for number in range(LOOKUPS_AT_ONCE + 3):
        shop.record(f"run-{number}", reference=Reference("email", f"{number}@example.com"))
    for _ in range(2):
        shop.courier.turn()
    assert shop.courier.in_flight == LOOKUPS_AT_ONCE
    wait_until(lambda: len(arrived) == LOOKUPS_AT_ONCE)
    answer.set()
    shop.answered()
    assert shop.status.held == LOOKUPS_AT_ONCE + 3
    assert shop.asked("/v1/customers") == LOOKUPS_AT_ONCE + 3


def test_after_a_lookup_that_stripe_did_not_answer_lookups_rest(shop: StillShop) -> None:
    shop.sandbox.fail(refuse(503), path="/v1/customers*", times=None)
    shop.record("run", reference=ANN)
    shop.answered()
    shop.pass_(LOOKUP_PAUSE_SECONDS - 1)
    assert shop.courier.turn() == 0
    assert not shop.courier.in_flight
    assert shop.asked("/v1/customers") == 1
    shop.pass_(1)
    shop.courier.turn()
    assert shop.courier.in_flight == 1
    shop.answered()


@pytest.mark.skipif(sys.platform != "linux", reason="process namespaces are Linux's")
def test_a_process_in_a_container_that_shares_the_hosts_name_has_another_owner() -> None:
    ask = "from langchain_stripe_meter.ledger import outbox; print(outbox.owner())"
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-c", ask]
    done = subprocess.run(inside, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this machine lets nobody make a process namespace")
    theirs, ours = done.stdout.split("/"), outbox.owner().split("/")
    assert theirs[1] == "1"
    assert theirs[0].split("|")[:2] == ours[0].split("|")[:2]
    assert theirs[0] != ours[0]


def test_with_one_request_at_a_time_each_customer_has_a_turn(shop: StillShop) -> None:
    courier = shop.another_courier(concurrency=1)
    shop.record(*(f"run-{number}" for number in range(5)))
    shop.record("other", customer="cus_2")
    shop.drive(courier)
    assert [payer(request) for request in shop.sent()].index("cus_2") <= 1


# -- Stripe does not answer


def test_while_stripe_cannot_be_reached_the_status_says_so_and_the_log_once(
    shop: StillShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.record("run-1")
    nowhere = Courier(shop.ledger, Gateway(shop.sandbox.api_key, api_base="http://127.0.0.1:1"))
    for _ in range(5):
        nowhere.turn()
        shop.pass_(30)
    nowhere.close(1)
    assert "no answer from Stripe (ConnectionRefusedError). Check the network" in str(shop.status.waits)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"stripe-meter: what is pending waits, nothing is lost: {shop.status.waits}"]
    shop.courier.turn()  # another one, which reaches it
    shop.answered()
    assert (shop.status.delivered, shop.status.waits, shop.errors) == (1, None, [])


def test_while_stripe_takes_not_even_one_event_at_a_time_the_status_says_so(shop: StillShop) -> None:
    shop.sandbox.fail(refuse(503), path=EVENTS, times=None)
    shop.record("run-1")
    for _ in range(6):
        assert shop.status.waits is None or shop.asked(EVENTS) > 3
        shop.answered()
        shop.pass_(600)
    assert shop.status.waits == "HTTP 503: An unknown error occurred."
    shop.sandbox.clear_faults()
    shop.answered()
    assert (shop.status.delivered, shop.status.waits) == (1, None)


def test_why_stripe_took_nothing_is_shown_only_while_usage_waits_for_it(shop: StillShop) -> None:
    shop.record("run-1")
    nowhere = Courier(shop.ledger, Gateway(shop.sandbox.api_key, api_base="http://127.0.0.1:1"))
    nowhere.turn()
    nowhere.close(1)
    shop.answered()
    assert (shop.status.delivered, shop.status.waits) == (1, None)
    shop.record("ahead", at=shop.now + 86_400)
    shop.pass_(900)
    assert (shop.status.ahead, shop.status.waits) == (1, None)


def test_a_courier_that_is_closed_does_not_say_that_stripe_took_nothing(shop: StillShop) -> None:
    shop.courier = shop.another_courier(concurrency=1)
    answer, arrived = shop.hang()
    shop.record("run-1")
    shop.courier.gateway.load_meters()
    wait_until(lambda: shop.courier.turn() + 1 and arrived)
    shop.courier.close(0)
    answer.set()
    assert shop.status.waits is None


def test_a_key_that_is_refused_is_told_as_that_and_not_as_a_wait_too(
    shop: StillShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.record("run-1")
    shop.answered()
    shop.sandbox.revoke(shop.sandbox.api_key)
    shop.record("run-2")
    for _ in range(3):
        shop.answered()
        shop.pass_(PAUSE_SECONDS)
    assert (shop.status.paused is None, shop.status.waits) == (False, None)
    assert "what is pending waits" not in caplog.text
