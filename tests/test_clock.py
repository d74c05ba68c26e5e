"""Clocks that differ from Stripe's: usage waits until it is valid, and nothing is sent on an old claim."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_invariant
from courier_shop import EVENTS, Shop, of
from sqlalchemy import insert, select

from langchain_stripe_meter.audit.chores import Doubts, chores
from langchain_stripe_meter.core.doubts import LOOK_AGAIN, SUMS_LAG
from langchain_stripe_meter.core.events import FUTURE_LIMIT
from langchain_stripe_meter.core.states import CLOCK_MARGIN, MAX_WISH, Move, Outcome, ReadingState
from langchain_stripe_meter.delivery.courier import Chore, Courier
from langchain_stripe_meter.delivery.guard import Clocks
from langchain_stripe_meter.ledger import outbox, recalling, sealing, views
from langchain_stripe_meter.ledger.schema import IS_PENDING, IS_SENDING, events, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import drop_request, rate_limited

NOW, DAY = 1_800_000_000, 86_400


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


# -- a clock that was ahead for a moment, and is right again


def test_what_was_put_off_by_a_clock_that_was_ahead_does_not_wait_for_that_time(shop: SkewedShop) -> None:
    shop.record("run", value=3)
    shop.record("held", customer="cus_new")
    shop.skew = 20 * DAY
    shop.sandbox.fail(rate_limited(), path=EVENTS, where=of("cus_1"))
    for _ in range(10):
        shop.courier.turn()
    assert shop.states() == {"run": "pending", "held": "held"}
    shop.skew = 0
    shop.sandbox.create_customer(id="cus_new")
    shop.drive(seconds=600)
    shop.drive(shop.another_courier(), seconds=600)
    assert shop.states() == {"run": "delivered", "held": "delivered"}
    assert shop.billed() == 3


def test_what_was_claimed_by_a_clock_that_was_ahead_is_in_doubt_and_not_sent_late(
    shop: SkewedShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.record("run", value=3)
    shop.skew = 30 * DAY
    with shop.ledger.deliver_lane().transaction() as connection:
        sealing.seal(connection, shop.ledger.now())
        (claimed,) = outbox.claim(connection, 1, shop.ledger.now())
    shop.skew = 0
    _, outcome = shop.courier._ask_stripe(claimed)
    assert isinstance(outcome, Outcome)
    assert outcome.move is Move.REFUSED_FOR_NOW
    with caplog.at_level(logging.WARNING):
        shop.courier.turn()
    assert (shop.states(), shop.sent()) == ({"run": "doubtful"}, [])
    assert "meter event run is doubtful" in caplog.text
    minding = shop.another_courier(chores=[Doubts(shop.ledger, shop.courier.gateway)])
    for _ in range(20):
        minding.turn()
        shop.sandbox.advance(seconds=LOOK_AGAIN)
    shop.drive(minding)
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 3)


def test_chores_go_on_after_a_clock_was_ahead(shop: SkewedShop) -> None:
    done: list[int] = []
    courier = shop.another_courier(chores=[done.append], watches=[done.append])
    shop.skew = 30 * DAY
    courier.turn()
    shop.skew = 0
    courier.turn()
    assert len(done) == 4


def chores_of(shop: SkewedShop, **options: Any) -> Courier:
    """A courier with all of its chores."""
    todo: list[Chore] = []
    courier = shop.another_courier(chores=todo)
    todo += chores(shop.ledger, courier.gateway, **options)
    return courier


def doubt_while_ahead(shop: SkewedShop) -> None:
    """The clock is ten days ahead while an outcome is unknown, and while the same minute's usage is delivered."""
    shop.sandbox.fail(drop_request(), path=EVENTS, times=None)  # a slow machine sends it twice
    shop.record("run", value=3)
    at = shop.ledger.now()
    while not shop.sent() or shop.courier.in_flight:
        shop.courier.turn()
    shop.courier.turn()
    shop.sandbox.clear_faults()
    shop.skew = 10 * DAY
    shop.record("same-minute", at=at)
    shop.drive()
    assert shop.states() == {"run": "doubtful", "same-minute": "delivered"}
    shop.skew = 0


def test_what_a_clock_that_was_ahead_left_in_doubt_is_settled_as_soon_as_anything_is(shop: SkewedShop) -> None:
    doubt_while_ahead(shop)
    courier, began = chores_of(shop), shop.sandbox.now()
    while shop.states()["run"] == "doubtful":
        courier.turn()
        shop.sandbox.advance(seconds=LOOK_AGAIN)
        assert shop.sandbox.now() < began + SUMS_LAG + 5 * LOOK_AGAIN
    shop.drive(courier)
    assert (set(shop.states().values()), shop.billed()) == ({"delivered"}, 4)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_a_clock_that_is_behind_makes_no_doubt_older_than_it_is(shop: SkewedShop) -> None:
    """Stripe's date says that it is behind; else the sums would be believed, once it is right, before they can be."""
    began = shop.sandbox.now()
    doubt_while_ahead(shop)
    for courier in (chores_of(shop), chores_of(shop)):
        courier.turn()
        with shop.ledger.read() as connection:
            moments = [
                moment for row in connection.execute(select(events.c.sent_at, events.c.settled_at)) for moment in row
            ]
        assert began <= min(moments) <= max(moments) <= shop.sandbox.now()
        shop.skew = -10 * DAY


def test_what_was_too_old_only_for_a_clock_that_was_ahead_is_billed_after_all(shop: SkewedShop) -> None:
    now = shop.ledger.now()
    shop.record("old", at=now - 35 * DAY)
    shop.record("pending", value=3)
    shop.sandbox.fail(rate_limited(), path=EVENTS, times=None)
    shop.drive(seconds=10)
    shop.skew = 40 * DAY
    shop.record("resolved", value=2, at=now)
    shop.drive()
    assert set(shop.states().values()) == {"held"}
    shop.sandbox.clear_faults()
    courier = chores_of(shop)
    for shop.skew in (-10 * DAY, 0):  # by a clock that is behind, the old one would be young
        for _ in range(5):
            courier.turn()
        shop.sandbox.advance(seconds=60)
    shop.drive(courier)
    assert shop.states() == {"old": "held", "pending": "delivered", "resolved": "delivered"}
    assert shop.billed() == 5


def test_a_clock_that_is_ahead_prunes_nothing_that_is_young_by_stripes(shop: SkewedShop) -> None:
    shop.record("run")
    shop.drive()
    shop.skew = 45 * DAY
    chores_of(shop, prune_after_days=40).turn()
    assert shop.states() == {"run": "delivered"}
    shop.skew = 0
    shop.sandbox.advance(seconds=45 * DAY)
    chores_of(shop, prune_after_days=40).turn()
    assert shop.states() == {}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_time_counts_as_a_wrong_clocks_once_nothing_could_lie_as_far_ahead(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgresql" else f"sqlite:///{tmp_path}/l.db"
    longest, lease = NOW + MAX_WISH + CLOCK_MARGIN, NOW + outbox.LEASE_SECONDS + CLOCK_MARGIN
    event = {"event_name": "m", "customer": "cus_1", "value": "1", "at": NOW, "due": NOW, "sent_at": NOW}
    sending = {"state": "sending", "lease": "elsewhere/1/1/1"}
    with closing(Ledger(url)) as ledger, ledger.deliver_lane().transaction() as connection:
        for ahead in (0, 1):
            reading = Entry(f"held-{ahead}", "m", 1, NOW, ReadingState.HELD, reason="why").columns()
            connection.execute(insert(readings).values(**reading, due=longest + ahead))
            due = {"identifier": f"due-{ahead}", "state": "pending", "due": longest + ahead}
            connection.execute(insert(events).values(event | due))
            leased = {"identifier": f"lease-{ahead}", "lease_until": lease + ahead}
            connection.execute(insert(events).values(event | sending | leased))
        recalling.recall(connection, NOW)
        assert outbox.reap(connection, NOW) == 1
        dues = [select(events.c.due).where(IS_PENDING, events.c.attempts == 0), select(readings.c.due)]
        assert [sorted(connection.execute(each).scalars()) for each in dues] == [[NOW, longest]] * 2
        still = select(events.c.identifier).where(IS_SENDING)
        assert connection.execute(still).scalars().all() == ["lease-0"]


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
