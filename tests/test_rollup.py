"""Roll-up: what a customer uses of a meter within a minute goes out as one event, and not a token is lost in it."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_invariant
from courier_shop import Shop
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter.core.events import MAX_DIGITS, significant_digits
from langchain_stripe_meter.ledger import acts, views
from langchain_stripe_meter.ledger.sealing import rolled_up
from langchain_stripe_meter.operations import cancel
from langchain_stripe_meter.sandbox import drop_answer

MINUTE, DAY = 60, 86_400


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    shop.courier = shop.another_courier(roll_up=MINUTE)
    shop.sandbox.set_time(shop.sandbox.now() // MINUTE * MINUTE + MINUTE)
    yield shop
    assert_invariant(shop.ledger, shop.sandbox)
    shop.close()


def pass_the_minute(shop: Shop) -> None:
    shop.sandbox.advance(seconds=MINUTE)
    shop.drive()


def test_a_minutes_usage_of_one_customer_and_meter_becomes_one_event(shop: Shop) -> None:
    for number in range(20):
        shop.record(f"run-{number}", value="1.5")
    shop.record("other-customer", customer="cus_2")
    shop.drive(seconds=MINUTE - 1)
    assert shop.sent() == []  # the minute is not over
    pass_the_minute(shop)
    assert (shop.billed(), shop.billed("cus_2")) == (30, 1)
    assert len(shop.sent("cus_1")) == 1
    assert set(shop.states().values()) == {"delivered"}
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_what_differs_in_minute_kind_or_sign_is_not_added_up(shop: Shop) -> None:
    shop.record("first", at=shop.ledger.now())
    shop.record("kind", dimensions={"model": "m"})
    shop.record("correction", value=-1)
    shop.sandbox.advance(seconds=MINUTE)
    shop.record("next-minute", at=shop.ledger.now())
    pass_the_minute(shop)
    assert len(shop.sandbox.events) == 4
    assert shop.billed() == 2


def test_a_correction_stays_by_itself_so_that_it_can_be_cancelled(shop: Shop) -> None:
    correction = acts.correct(shop.ledger, "cus_1", "ai_tokens", 7, reason="forgotten", id="c")
    shop.record("run-1", "run-2")
    pass_the_minute(shop)
    cancel(shop.ledger, shop.courier.gateway, correction)
    assert (len(shop.sandbox.events), shop.billed()) == (2, 2)


def test_a_span_ends_at_midnight_so_that_nothing_is_billed_for_another_day_or_month(shop: Shop) -> None:
    midnight = (shop.sandbox.now() // DAY + 1) * DAY
    span = next(seconds for seconds in range(3000, 3600) if 300 <= midnight % seconds <= seconds - 300)
    shop.sandbox.set_time(midnight + 200)
    shop.record("before", at=midnight - 1)
    shop.record("after", value=10, at=midnight)
    shop.record("too", value=5, at=midnight + 200)
    shop.sandbox.advance(seconds=2 * span)
    shop.drive(shop.another_courier(roll_up=span))
    assert [(one.value, one.timestamp) for one in shop.sandbox.events] == [(1, midnight - 1), (15, midnight)]


def test_a_lost_answer_to_a_rolled_up_event_is_asked_for_again_and_bills_once(shop: Shop) -> None:
    shop.sandbox.fail(drop_answer())
    shop.record("a", "b", "c", value=2)
    pass_the_minute(shop)
    assert shop.billed() == 6
    assert len(shop.sent()) == 2
    assert len({request.params["identifier"] for request in shop.sent()}) == 1


def test_totals_and_the_newest_usage_still_show_every_run(shop: Shop) -> None:
    shop.record("a", "b", value=4)
    pass_the_minute(shop)
    assert views.totals(shop.ledger)["ai_tokens", "cus_1"] == {"delivered": 8}
    assert [(row.identifier, row.value, row.state) for row in views.tail(shop.ledger)] == [
        ("a", 4, "delivered"), ("b", 4, "delivered"),
    ]  # fmt: skip


def test_when_its_customer_is_gone_every_run_of_a_rolled_up_event_is_held(shop: Shop) -> None:
    shop.record("a", "b", value=4)
    shop.sandbox.delete_customer("cus_1")
    shop.sandbox.advance(seconds=MINUTE)
    shop.drive()
    (held,) = views.held(shop.ledger)
    assert (held.customer, held.value, len(held.ids)) == ("cus_1", 8, 2)
    acts.assign(shop.ledger, held.ids, "cus_2")
    shop.drive()
    assert shop.billed("cus_2") == 8


def row(number: int, value: Decimal, customer: str, at: int) -> dict[str, Any]:
    return {
        "id": number, "key": f"run-{number}", "value": str(value), "customer": customer, "at": at,
        "account": "", "event_name": "ai_tokens", "dimensions": None,
    }  # fmt: skip


amounts = st.decimals("-1e9", "1e14", places=3).filter(lambda value: significant_digits(value) <= MAX_DIGITS)
usage = st.tuples(amounts, st.sampled_from(["cus_1", "cus_2"]), st.integers(0, 5 * MINUTE))


@given(st.lists(usage, max_size=30), st.sampled_from([None, 1, MINUTE, 3600]))
def test_no_reading_is_lost_or_counted_twice_nor_does_a_sum_grow_beyond_what_stripe_takes(
    used: list[tuple[Decimal, str, int]], seconds: int | None
) -> None:
    rows = [row(number, *facts) for number, facts in enumerate(used)]
    groups = rolled_up(rows, seconds)
    assert sorted(one["id"] for group in groups for one in group) == [one["id"] for one in rows]
    for group in groups:
        assert len({(one["customer"], one["at"] // (seconds or 1)) for one in group}) == 1 or len(group) == 1
        assert significant_digits(sum((Decimal(one["value"]) for one in group), Decimal(0))) <= MAX_DIGITS
