"""Clocks that differ from Stripe's: usage waits until it is valid, and nothing is sent on an old claim."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_invariant
from courier_shop import Shop

from langchain_stripe_meter.core.events import FUTURE_LIMIT
from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.delivery.guard import Clocks
from langchain_stripe_meter.ledger import outbox, sealing, views
from langchain_stripe_meter.ledger.store import Ledger


class SkewedShop(Shop):
    """A shop whose ledger's clock is ``skew`` seconds ahead of Stripe's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.skew = 0
        self.ledger = Ledger(f"sqlite:///{path}/skewed.db", clock=lambda: self.sandbox.now() + self.skew)
        self.courier = self.another_courier()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[SkewedShop]:
    shop = SkewedShop(tmp_path)
    yield shop
    shop.close()


def test_what_lies_in_stripes_future_waits_until_it_does_not(shop: SkewedShop) -> None:
    shop.skew = FUTURE_LIMIT + 600
    shop.record("ahead", value=3)
    shop.record("past", value=2, at=shop.sandbox.now(), customer="cus_2")
    shop.drive(seconds=10)
    assert shop.states() == {"ahead": "pending", "past": "delivered"}
    assert "future" in str(views.tail(shop.ledger)[0].reason)
    shop.sandbox.advance(seconds=600)
    shop.drive(seconds=1200)
    assert shop.states() == {"ahead": "delivered", "past": "delivered"}
    assert shop.billed() == 3
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_a_courier_that_slept_on_its_claim_for_a_day_does_not_send_it_again(shop: SkewedShop) -> None:
    shop.record("run", value=3)
    sleeper, other = shop.courier, shop.another_courier()
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.ledger.now())
        (claimed,) = outbox.claim(connection, 1, shop.ledger.now())
    shop.sandbox.advance(seconds=outbox.LEASE_SECONDS + 1)
    shop.drive(other)
    shop.sandbox.advance(hours=25)  # Stripe has forgotten the identifier
    asked, outcome = sleeper._ask_stripe(claimed)
    assert asked is claimed
    assert isinstance(outcome, Outcome)
    assert outcome.move is Move.REFUSED_FOR_NOW
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 3)


@pytest.mark.parametrize(("skew", "word"), [(4000, "ahead of"), (-4000, "behind")])
def test_a_wrong_clock_is_revealed_by_the_date_of_stripes_answers_and_told_once(
    shop: SkewedShop, skew: int, word: str
) -> None:
    shop.skew = skew
    for number in range(3):
        shop.record(f"run-{number}", at=min(shop.sandbox.now(), shop.ledger.now()))
    shop.drive()
    said = [str(error) for error in shop.errors if "clock" in str(error)]
    assert len(said) == 1
    assert f"seconds {word} Stripe's" in said[0]
    assert f"seconds {word} Stripe's" in str(shop.status.clock)
    shop.skew = 0
    shop.record("later")
    shop.drive()
    assert shop.status.clock is None


def test_a_clock_that_is_nearly_right_or_an_answer_that_was_long_on_its_way_is_no_alarm(shop: SkewedShop) -> None:
    shop.skew = 200
    shop.record("run", at=shop.sandbox.now())
    shop.drive()
    clocks = Clocks(shop.ledger, shop.errors.append)
    now = shop.ledger.now()
    clocks.compare(now - 3000, now - 3600, now)  # asked an hour ago, and answered soon after
    assert shop.errors == []
    assert shop.status.clock is None
