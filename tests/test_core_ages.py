"""Ages of usage: which spans are alarms at a moment, what is told again, and the words: pure."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from langchain_stripe_meter.core.periods import Late, Span, billing_period, check_billing_day, sentence, spans, untold
from langchain_stripe_meter.errors import ConfigurationError

DAY = 86_400


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


NOON = seconds("2027-03-12 12:00:00")
MARCH, APRIL, MAY = seconds("2027-03-01"), seconds("2027-04-01"), seconds("2027-05-01")


def closing(now: int, billing_day: int = 1) -> list[Span]:
    return [span for span in spans(now, billing_day) if span.ends is not None]


# -- billing periods


@pytest.mark.parametrize(
    ("now", "day", "start", "end"),
    [
        ("2027-03-01 00:00:00", 1, "2027-03-01", "2027-04-01"),
        ("2027-02-28 23:59:59", 1, "2027-02-01", "2027-03-01"),
        ("2027-03-14 23:59:59", 15, "2027-02-15", "2027-03-15"),
        ("2027-03-15 00:00:00", 15, "2027-03-15", "2027-04-15"),
        ("2027-02-28 00:00:00", 31, "2027-02-28", "2027-03-31"),
        ("2027-03-30 12:00:00", 31, "2027-02-28", "2027-03-31"),
        ("2027-01-05 00:00:00", 10, "2026-12-10", "2027-01-10"),
        ("2026-12-10 00:00:00", 10, "2026-12-10", "2027-01-10"),
    ],
)
def test_a_billing_period_begins_on_its_day_or_on_the_last_of_a_shorter_month(
    now: str, day: int, start: str, end: str
) -> None:
    assert billing_period(seconds(now), day) == (seconds(start), seconds(end))


def test_a_billing_period_is_a_calendar_month_unless_told() -> None:
    assert billing_period(NOON) == (MARCH, APRIL)
    assert spans(APRIL) == spans(APRIL, 1)


@pytest.mark.usefixtures("far_west")
def test_billing_periods_are_in_utc_wherever_the_machine_stands() -> None:
    assert billing_period(APRIL - 1, 1) == (MARCH, APRIL)
    assert billing_period(APRIL, 1) == (APRIL, MAY)


def test_the_first_and_the_last_day_of_a_month_are_billing_days() -> None:
    assert [check_billing_day(day) for day in (1, 31)] == [1, 31]
    with pytest.raises(ConfigurationError) as caught:
        check_billing_day(32)
    assert str(caught.value) == "billing_day=32: the day of the month on which periods begin, 1 to 31."


# -- what is an alarm


def test_an_alarm_is_about_usage_of_one_age_however_old_and_is_crossed_by_the_newest_of_it() -> None:
    assert spans(NOON) == [
        Span("34 days", 0, NOON - 34 * DAY, 34 * DAY),
        Span("30 days", NOON - 34 * DAY, NOON - 30 * DAY, 30 * DAY),
        Span("21 days", NOON - 30 * DAY, NOON - 21 * DAY, 21 * DAY),
        Span("7 days", NOON - 21 * DAY, NOON - 7 * DAY, 7 * DAY),
    ]


def test_a_period_closes_in_its_last_day() -> None:
    assert closing(APRIL - DAY - 1) == []
    for now in (APRIL - DAY, APRIL - 1):
        assert closing(now) == [Span("closing", MARCH, APRIL, 600, APRIL)]


def test_a_closed_period_still_takes_usage_for_an_hour_and_is_the_whole_one_before() -> None:
    for now in (APRIL, APRIL + 3599):
        assert closing(now) == [Span("closed", MARCH, APRIL, 600, APRIL)]
    assert closing(APRIL + 3600) == []


def test_a_period_that_begins_on_another_day_closes_on_that_day() -> None:
    tenth = seconds("2027-03-10")
    assert closing(tenth - 60, 10) == [Span("closing", seconds("2027-02-10"), tenth, 600, tenth)]
    assert closing(tenth + 60, 10) == [Span("closed", seconds("2027-02-10"), tenth, 600, tenth)]


def test_an_alarm_of_one_period_says_nothing_of_the_next() -> None:
    assert [span.name for span in closing(APRIL)] == [f"closed {APRIL}"]
    assert [span.name for span in spans(NOON)] == ["34 days", "30 days", "21 days", "7 days"]


# -- what is told again

WEEK = Span("7 days", NOON - 21 * DAY, NOON - 7 * DAY, 7 * DAY)


def late(newest: int, meter: str = "t") -> Late:
    return Late(meter, 1, newest - 5, newest)


def test_a_meter_that_was_never_told_is_told_and_each_by_itself() -> None:
    both = [late(NOON - 8 * DAY, "t"), late(NOON - 8 * DAY, "m")]
    assert untold(WEEK, both, {}, NOON) == both
    assert untold(WEEK, both, {"t": NOON - 60}, NOON) == both[1:]


@pytest.mark.parametrize(("crossed_after_it_was_told", "again"), [(0, False), (1, True)])
def test_only_what_crossed_since_is_told_again(crossed_after_it_was_told: int, again: bool) -> None:
    told = NOON - 2 * DAY
    more = late(told - 7 * DAY + crossed_after_it_was_told)
    assert untold(WEEK, [more], {"t": told}, NOON) == ([more] if again else [])


@pytest.mark.parametrize(("since", "again"), [(DAY - 1, False), (DAY, True)])
def test_a_day_passes_before_it_is_told_again(since: int, again: bool) -> None:
    more = late(NOON - 7 * DAY - 1)
    assert untold(WEEK, [more], {"t": NOON - since}, NOON) == ([more] if again else [])


# -- in words


def test_an_alarm_of_age_names_how_much_is_how_old_on_which_meters() -> None:
    assert sentence(WEEK, iter([Late("t", 1234, 0, 0), Late("m", 1, 0, 0)])) == (
        "Undelivered usage is older than 7 days: 1,234 on t, 1 on m. Stripe refuses it at 35 days."
    )
    assert sentence(spans(NOON)[0], [Late("t", 5, 0, 0)]) == (
        "Undelivered usage is older than 34 days: 5 on t. It is not sent, for Stripe refuses it at 35 days: retime() "
        "it or write_off() it."
    )


@pytest.mark.usefixtures("far_west")
def test_an_alarm_of_a_period_names_when_it_closes_in_utc() -> None:
    span = Span("closing", MARCH, APRIL, 600, APRIL)
    assert sentence(span, [Late("t", 2, 0, 0)]) == (
        "A billing period closes at 2027-04-01 00:00 UTC, and usage of it is undelivered: 2 on t."
    )
    assert "period closed at 2027-04-01 00:00 UTC" in sentence(Span("closed", MARCH, APRIL, 600, APRIL), [])
