"""Clocks that jump and time zones: what may be in Stripe's memory or not is never sent again blindly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import assert_invariant
from faults import settled

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import Fault, StripeSandbox, drop_answer, drop_request

HOUR, DAY = 3600, 86_400
JUMPS = [-40 * DAY, -3 * DAY, -25 * HOUR, -2 * HOUR, -600, 600, 2 * HOUR, 22 * HOUR, 25 * HOUR, 3 * DAY, 40 * DAY]


class Clock:
    """Our clock: Stripe's, and how wrong it is."""

    def __init__(self, sandbox: StripeSandbox) -> None:
        self.sandbox = sandbox
        self.wrong = 0

    def __call__(self) -> int:
        return self.sandbox.now() + self.wrong


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for name in ("cus_1", "cus_2", "cus_3"):
            sandbox.create_customer(id=name)
        yield sandbox


@pytest.fixture
def clock(sandbox: StripeSandbox) -> Clock:
    return Clock(sandbox)


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", clock=clock)
    yield ledger
    ledger.close()


@pytest.fixture
def courier(ledger: Ledger, sandbox: StripeSandbox) -> Iterator[Courier]:
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=sandbox.url))
    yield courier
    courier.close(5)
    courier.gateway.close()


def record(ledger: Ledger, *customers: str) -> None:
    for customer in customers:
        key = f"{customer}-{ledger.now()}"
        ledger.record([Entry(key, "ai_tokens", Decimal(1), ledger.now(), ReadingState.RESOLVED, customer)])


def one_without_an_answer(courier: Courier, sandbox: StripeSandbox, fault: Fault) -> None:
    """A run of the first customer's, of which nobody knows whether Stripe has it."""
    record(courier.ledger, "cus_1")
    sandbox.fail(fault)
    while not sandbox.requests or sandbox.requests[-1].path != "/v1/billing/meter_events":
        courier.turn()


def work(courier: Courier, sandbox: StripeSandbox, *, seconds: int, step: int = 60) -> None:
    """Let the courier work for so long by Stripe's clock, which goes on only while the courier waits."""
    until = sandbox.now() + seconds
    while sandbox.now() < until:
        if not courier.turn() and not courier.in_flight:
            if not views.status(courier.ledger).pending:
                return
            sandbox.advance(seconds=step)
        assert_invariant(courier.ledger, sandbox)


@pytest.mark.parametrize("lost", [drop_answer, drop_request], ids=["Stripe had accepted", "Stripe had nothing"])
@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_while_an_outcome_is_unknown_bills_nothing_twice(
    courier: Courier, sandbox: StripeSandbox, clock: Clock, jump: int, lost: Callable[[], Fault]
) -> None:
    """It jumps, runs are recorded by the wrong clock, and it is set right after two hours."""
    ledger = courier.ledger
    one_without_an_answer(courier, sandbox, lost())
    clock.wrong = jump
    record(ledger, "cus_2")
    work(courier, sandbox, seconds=2 * HOUR)
    clock.wrong = 0
    record(ledger, "cus_3")
    work(courier, sandbox, seconds=45 * DAY, step=HOUR)
    settled(ledger, sandbox, fault="the clock jumps while an outcome is unknown")
    states = {row.customer: row.state for row in views.tail(ledger)}
    assert states["cus_1"] == ("delivered" if -HOUR < jump < 23 * HOUR else "doubtful")
    # Stripe takes usage from 35 days ago to 5 minutes ahead; what a wrong clock stamped otherwise, a person re-times.
    assert states["cus_2"] == ("delivered" if -35 * DAY < jump < 300 else "rejected")
    assert states["cus_3"] == "delivered"


@pytest.mark.parametrize("jump", [-2 * HOUR, -25 * HOUR, -40 * DAY])
def test_a_clock_that_is_set_back_for_good_does_not_make_an_old_doubt_look_young(
    ledger: Ledger, courier: Courier, sandbox: StripeSandbox, clock: Clock, jump: int
) -> None:
    """By the wrong clock, Stripe still remembers the identifier; in truth it forgot it a day ago."""
    one_without_an_answer(courier, sandbox, drop_answer())
    clock.wrong = jump
    work(courier, sandbox, seconds=10)
    with sandbox.outage():
        work(courier, sandbox, seconds=26 * HOUR, step=600)
    work(courier, sandbox, seconds=45 * DAY, step=HOUR)
    settled(ledger, sandbox, fault="the clock is set back for good while an outcome is unknown")
    assert sandbox.billed("ai_tokens", "cus_1") == 1
