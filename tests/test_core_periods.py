"""The periods of limits and what was spent in them, beyond what the counters of a ledger show: pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from langchain_stripe_meter.core.periods import Period, Spent
from langchain_stripe_meter.errors import ConfigurationError

DAY = 86_400
TOKENS = ("", "t")


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.mark.usefixtures("far_west")
def test_a_month_is_one_of_utc_wherever_the_machine_stands() -> None:
    april = seconds("2027-04-01")
    assert Period("month").bounds(april - 1) == (seconds("2027-03-01"), april)
    assert Period("month").bounds(april) == (april, seconds("2027-05-01"))


@pytest.mark.usefixtures("far_west")
@pytest.mark.parametrize(
    ("per", "start", "end"), [("day", "2027-04-01", "2027-04-02"), ("week", "2027-03-29", "2027-04-05")]
)
def test_days_and_weeks_from_monday_are_those_of_utc(per: Any, start: str, end: str) -> None:
    first, after = seconds(start), seconds(end)
    assert [Period(per).bounds(at) for at in (first, after - 1)] == [(first, after)] * 2
    assert Period(per).bounds(after)[0] == after


def test_a_month_may_begin_on_another_day_where_shorter_ones_begin_on_their_last() -> None:
    period = Period("month", billing_day=31)
    assert period.bounds(seconds("2027-03-01")) == (seconds("2027-02-28"), seconds("2027-03-31"))


@pytest.mark.parametrize("per", ["day", "ever", timedelta(hours=1)])
def test_only_months_have_a_billing_day(per: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"billing_day=2: only per='month' has one"):
        Period(per, billing_day=2)


def test_what_was_used_before_counts_on_until_it_is_settled() -> None:
    october, november = seconds("2026-10-31"), seconds("2026-11-01")
    period = Period("month", settled_after=3600)
    for now in (october, november + 60):  # also where it is read only then
        spent = Spent([period])
        spent.add([("ann", TOKENS, october, Decimal(5))], now)
        spent.add([("ann", TOKENS, november, Decimal(2))], november + 60)
        spent.add([("ann", TOKENS, seconds("2026-09-30"), Decimal(9))], november + 60)
        sums = [spent.of(["ann"], TOKENS, period, november + after) for after in (60, 3599, 3600)]
        assert sums == [7, 7, 2]
    assert period.begins(november + 3599) == seconds("2026-10-01")
    assert period.begins(november + 3600) == november


def test_all_time_is_one_period() -> None:
    assert [Period("ever").bounds(at) for at in (0, seconds("2027-04-01"))] == [(0, None)] * 2


@pytest.mark.parametrize("hours", [1, 5, 36])
def test_spans_follow_each_other_from_the_unix_epoch_on(hours: int) -> None:
    length = hours * 3600
    assert Period(timedelta(hours=hours)).bounds(0) == (0, length)
    assert Period(timedelta(hours=hours)).bounds(7 * length + 1) == (7 * length, 8 * length)


def test_a_span_of_one_second_is_the_shortest() -> None:
    assert Period(timedelta(seconds=1)).bounds(7) == (7, 8)


@pytest.mark.parametrize(
    ("per", "told"),
    [
        (timedelta(0), "per=datetime.timedelta(0): a span is a whole number of seconds, at least one."),
        ("year", "per='year': use 'day', 'week', 'month', 'ever' or a timedelta."),
    ],
)
def test_a_period_that_is_refused_is_named_with_those_that_are_not(per: object, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Period(per)  # type: ignore[arg-type]
    assert str(caught.value) == told


# -- what was spent

day, ever = Period("day"), Period("ever")
TODAY = 100 * DAY


def test_what_somebody_has_used_can_become_anothers_in_every_period() -> None:
    spent, cost = Spent((day, ever)), ("", "c")
    spend(spent, TODAY, 5)
    spend(spent, TODAY - DAY, 2)
    spent.add([("bob", TOKENS, TODAY, Decimal(1)), ("ann", cost, TODAY, Decimal(7))], TODAY)
    spent.move("ann", "bob")
    spent.move("nobody", "bob")
    assert [spent.of(["bob"], TOKENS, period, TODAY) for period in (day, ever)] == [6, 8]
    assert [spent.of([name], cost, day, TODAY) for name in ("ann", "bob")] == [0, 7]


def spend(spent: Spent, at: int, amount: int, now: int = TODAY) -> None:
    spent.add([("ann", TOKENS, at, Decimal(amount))], now)


def test_what_lies_before_one_period_still_counts_in_the_longer_ones() -> None:
    spent = Spent((day, ever))
    spend(spent, TODAY - 1, 5)
    assert spent.of(["ann"], TOKENS, day, TODAY) == 0
    assert spent.of(["ann"], TOKENS, ever, TODAY) == 5


def test_what_comes_from_a_clock_ahead_counts_in_its_own_period_and_not_in_this() -> None:
    spent = Spent((day,))
    spend(spent, TODAY + DAY, 5)
    spend(spent, TODAY + DAY - 1, 2)
    assert spent.of(["ann"], TOKENS, day, TODAY) == 2
    assert spent.of(["ann"], TOKENS, day, TODAY + DAY) == 5


def test_one_period_back_is_kept_for_a_clock_that_is_set_back_and_no_more() -> None:
    spent = Spent((day,))
    for number in range(3):
        spend(spent, TODAY + number * DAY, number + 1, now=TODAY + number * DAY)
    assert [spent.of(["ann"], TOKENS, day, TODAY + number * DAY) for number in range(3)] == [0, 2, 3]


def test_nobody_has_spent_nothing() -> None:
    assert Spent((day,)).of((), TOKENS, day, TODAY) == 0
