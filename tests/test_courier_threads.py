"""The courier's threads: how they start, what they do where they cannot, and what a close leaves behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from courier_shop import StillShop

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.delivery import courier as module
from langchain_stripe_meter.errors import LedgerError, MeteringError
from langchain_stripe_meter.ledger import lanes, outbox, sealing, views
from langchain_stripe_meter.ledger.store import Ledger

ANN = Reference("email", "ann@example.com")


_others: set[threading.Thread] = set()
"""Whose couriers an earlier test has left behind."""


@pytest.fixture
def shop(quick_folder: Path) -> Iterator[StillShop]:
    _others.clear()
    _others.update(threading.enumerate())
    shop = StillShop(quick_folder)
    yield shop
    shop.close()


def ours() -> list[threading.Thread]:
    new = (thread for thread in threading.enumerate() if thread not in _others)
    return [thread for thread in new if thread.name.startswith("stripe-meter-")]


def senders() -> list[threading.Thread]:
    return [thread for thread in ours() if thread.name == "stripe-meter-sender"]


@pytest.mark.parametrize("woken", [True, False], ids=["its own thread", "a caller's thread"])
def test_no_thread_keeps_the_process_and_there_are_no_more_than_requests_at_once(shop: StillShop, woken: bool) -> None:
    answer, arrived = shop.hang()
    for number in range(12):
        shop.record(f"run-{number}", customer=f"cus_{number % 4 + 1}")
    if woken:
        shop.courier.wake()
    else:
        shop.send()
    wait_until(lambda: shop.courier.in_flight == len(arrived) == 4)
    assert sorted({thread.name for thread in ours()}) == ["stripe-meter-courier"] * woken + ["stripe-meter-sender"]
    assert len(senders()) == 4
    assert all(thread.daemon for thread in ours())
    answer.set()
    wait_until(lambda: (woken or shop.courier.turn() + 1) and shop.status.delivered == 12)
    assert len(senders()) == 4
    shop.courier.close(5)
    wait_until(lambda: not ours())


def test_however_often_it_is_started_it_has_one_thread_and_none_once_it_is_closed(shop: StillShop) -> None:
    for _ in range(3):
        shop.courier._start()
    assert [thread.name for thread in ours()] == ["stripe-meter-courier"]
    shop.courier.close(5)
    shop.courier._start()
    assert ours() == []


def test_a_courier_at_rest_is_woken_by_what_is_recorded(shop: StillShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 3600.0)
    resting, rest = threading.Event(), shop.courier._rest

    def noted() -> None:
        resting.set()
        rest()

    monkeypatch.setattr(shop.courier, "_rest", noted)
    for number in range(1, 3):
        resting.clear()
        shop.record(f"run-{number}")
        shop.courier.wake()
        wait_until(lambda expected=number: shop.status.delivered == expected)
        assert resting.wait(30)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The machine lets us have no more threads; the sandbox may."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("stripe-meter-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    return monkeypatch


def test_where_no_thread_can_be_started_nothing_is_lost_and_it_is_told(
    shop: StillShop, no_threads: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shop.sandbox.create_customer(id="cus_ann", email=ANN.value)
    shop.record("run")
    shop.record("by-email", reference=ANN)
    shop.courier.gateway.load_meters()
    shop.courier.wake()
    assert not shop.courier.is_running
    assert [record.getMessage() for record in caplog.records if record.name == "langchain_stripe_meter"] == [
        "stripe-meter: no courier can start during shutdown; the ledger keeps what is pending"
    ]
    shop.answered()
    assert shop.states() == {"run": "pending", "by-email": "recorded"}
    why = "no thread could be started for the request"
    assert {row.identifier: row.reason for row in views.tail(shop.ledger)}["run"] == why
    assert [str(error) for error in shop.errors] == [why]
    with shop.ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT first_unknown_at FROM events").all() == [(None,)]
    no_threads.undo()
    shop.pass_(60)
    shop.courier.wake()
    wait_until(lambda: shop.status.delivered == 2)


def test_the_threads_that_there_are_do_the_work_of_those_that_cannot_be_started(
    shop: StillShop, no_threads: pytest.MonkeyPatch
) -> None:
    refused = threading.Thread.start
    no_threads.undo()
    shop.record("first")
    shop.answered()
    no_threads.setattr(threading.Thread, "start", refused)
    for number in range(1, 4):
        shop.record(f"run-{number}", customer=f"cus_{number}")
    shop.answered()
    assert shop.status.delivered == 4


def test_an_on_error_may_close_the_courier_that_calls_it(shop: StillShop, caplog: pytest.LogCaptureFixture) -> None:
    courier = shop.another_courier()
    courier._on_error = lambda _: courier.close(10)
    shop.record("run", customer="cus_gone")
    courier.wake()
    wait_until(lambda: courier.is_closed and not courier.is_running)
    assert "on_error itself failed" not in caplog.text
    assert shop.states() == {"run": "held"}


def test_after_a_close_it_delivers_again_when_it_is_reopened(shop: StillShop) -> None:
    for number in range(2):
        shop.record(f"run-{number}")
        shop.courier.reopen()
        wait_until(lambda expected=number + 1: shop.status.delivered == expected)
        shop.courier.close(5)
        assert not shop.courier.is_running
    assert shop.courier.delivered == 2


# -- faults


def test_a_bug_in_a_request_leaves_the_outcome_open_and_stops_no_sender(shop: StillShop) -> None:
    shop.record("run")
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.now)
        (claimed,) = outbox.claim(connection, 1, shop.now)
    broken: Any = replace(claimed, event=None)
    assert shop.courier._ask_stripe(broken) == (broken, Outcome(Move.UNKNOWN, "AttributeError"))


def test_what_waited_for_a_thread_until_its_claim_ran_out_is_not_sent(shop: StillShop) -> None:
    shop.record("run")
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.now)
        (claimed,) = outbox.claim(connection, 1, shop.now)
    shop.pass_(outbox.LEASE_SECONDS)
    refused = Outcome(Move.REFUSED_FOR_NOW, "its claim had run out before it was sent")
    assert shop.courier._ask_stripe(claimed) == (claimed, refused)
    assert shop.sent() == []


def test_a_claim_that_runs_out_while_the_meters_are_asked_for_is_not_used(shop: StillShop) -> None:
    shop.record("run", value=100)
    shop.send()
    shop.answered()
    shop.record("late", value=100)
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.now)
        (claimed,) = outbox.claim(connection, 1, shop.now)
    shop.courier.gateway.forget_meters()
    answer, arrived = shop.hang("/v1/billing/meters")
    answered: list[object] = []
    asking = threading.Thread(target=lambda: answered.append(shop.courier._ask_stripe(claimed)[1]))
    asking.start()
    wait_until(lambda: arrived)
    shop.pass_(outbox.LEASE_SECONDS)
    answer.set()
    asking.join(10)
    assert answered == [Outcome(Move.REFUSED_FOR_NOW, "its claim had run out before it was sent")]
    assert [request.params["identifier"] for request in shop.sent()] == ["run"]


def test_what_a_close_found_unanswered_is_repeated_under_its_identifier_and_a_late_answer_changes_nothing(
    shop: StillShop,
) -> None:
    answer, arrived = shop.hang()
    shop.record("run")
    shop.send()
    wait_until(lambda: arrived)
    shop.courier.close(0)
    assert shop.states() == {"run": "pending"}
    assert views.tail(shop.ledger)[0].reason == "the courier was closed before Stripe answered"
    answer.set()
    wait_until(lambda: shop.courier._results.qsize() > 0)
    shop.courier._closing.clear()
    shop.courier.turn()
    assert shop.states() == {"run": "pending"}
    shop.pass_(60)
    shop.answered()
    assert shop.states() == {"run": "delivered"}
    assert {request.params["identifier"] for request in shop.sent()} == {"run"}
    assert shop.billed() == 1
    assert shop.errors == []


@pytest.fixture(params=["sqlite", "postgresql"])
def busy(
    request: pytest.FixtureRequest, quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StillShop, Ledger]]:
    """A shop that hardly waits for its ledger, and another process's ledger, which may keep it waiting."""
    url = f"sqlite:///{quick_folder}/busy.db?timeout=0.05"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("postgres_url"))
    shop, holder = StillShop(quick_folder), Ledger(url)
    shop.ledger = Ledger(url, clock=lambda: shop.now)
    shop.courier = shop.another_courier()
    assert holder.note("x") == shop.ledger.note("x")  # both are open
    monkeypatch.setattr(lanes, "BUSY_SECONDS", 0.05)
    yield shop, holder
    shop.close()
    shop.ledger.close()
    holder.close()


@pytest.mark.parametrize("closed", [True, False], ids=["by the close", "by the next turn"])
def test_an_answer_that_could_not_be_stored_is_stored_once_the_ledger_is_free(
    busy: tuple[StillShop, Ledger], closed: bool
) -> None:
    shop, holder = busy
    shop.record("run")
    shop.send()
    with holder.deliver_lane().transaction():
        wait_until(lambda: shop.billed() == 1 and shop.courier._results.qsize() > 0)
        with pytest.raises(MeteringError):
            shop.courier.turn()
        assert shop.states() == {"run": "sending"}
    if closed:
        shop.courier.close(5)
    else:
        shop.courier.turn()
    assert shop.states() == {"run": "delivered"}
    shop.pass_(outbox.LEASE_SECONDS + 1)
    shop.another_courier().turn()
    assert (len(shop.sent()), shop.billed()) == (1, 1)


def test_a_close_keeps_its_deadline_where_the_thread_is_stuck(shop: StillShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_SECONDS", 0.01)
    stuck, free = threading.Event(), threading.Event()

    def chore(_now: int) -> None:
        stuck.set()
        free.wait()

    courier = shop.another_courier(chores=[chore])
    courier.wake()
    assert stuck.wait(30)
    courier.close(0.01)
    assert courier.is_running
    free.set()
    wait_until(lambda: not courier.is_running)


def test_a_close_that_cannot_store_an_answer_is_told_and_the_next_courier_asks_again(
    busy: tuple[StillShop, Ledger],
) -> None:
    shop, holder = busy
    shop.record("run")
    shop.send()
    with holder.deliver_lane().transaction():
        shop.courier.close(0)
    assert [type(error) for error in shop.errors] == [LedgerError]
    assert shop.states() == {"run": "sending"}
    shop.pass_(outbox.LEASE_SECONDS + 1)
    shop.courier = shop.another_courier()
    shop.courier.turn()
    shop.pass_(60)
    shop.answered()
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 1)
