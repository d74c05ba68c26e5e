"""How much is sent at once, and what rests meanwhile: arithmetic on what Stripe answered, in Unix seconds."""

from __future__ import annotations

import pytest

from langchain_stripe_meter.delivery.guard import LONGEST_REST, QUIET_SECONDS, RESTING_AT_MOST, Pace
from langchain_stripe_meter.ledger.outbox import Line

NOW = 1_800_000_000


def line(number: int = 1) -> Line:
    return "", f"cus_{number}", "ai_tokens"


def test_every_refusal_halves_what_is_in_flight_and_every_answer_adds_one_up_to_the_most() -> None:
    pace, limits = Pace(9), []
    for _ in range(4):
        limits.append(pace.slots(0, NOW))
        pace.slower(line(), None, NOW)
    assert limits == [9, 4, 2, 1]
    for _ in range(10):
        pace.faster()
        limits.append(pace.slots(0, NOW))
    assert limits[4:] == [2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


def test_what_is_in_flight_takes_slots() -> None:
    assert Pace(9).slots(4, NOW) == 5


def test_everything_rests_when_not_even_one_at_a_time_is_taken_until_an_answer_comes() -> None:
    pace = Pace(1)
    assert not pace.is_quiet(0)
    pace.slower(line(), None, NOW)
    assert [pace.slots(0, NOW + passed) for passed in range(QUIET_SECONDS + 1)] == [0] * QUIET_SECONDS + [1]
    pace.faster()
    assert pace.slots(0, NOW) == 1
    assert pace.quiet_until <= 0


def test_a_refusal_of_more_than_one_at_a_time_lets_the_others_go_on() -> None:
    pace = Pace(2)
    pace.slower(line(), None, NOW)
    assert pace.slots(0, NOW) == 1


def test_a_pause_ends_with_one_event_at_a_time_and_no_later_refusal_shortens_it() -> None:
    pace = Pace(8)
    pace.probe(NOW + 30)
    assert pace.slots(0, NOW + 30) == 1
    pace.slower(line(), None, NOW)
    assert [pace.slots(0, NOW + passed) for passed in (0, 29, 30)] == [0, 0, 1]


def test_whom_stripe_asked_to_wait_rests_as_long_as_it_said_and_only_they() -> None:
    pace = Pace(8)
    pace.slower(line(1), 40, NOW)
    pace.slower(line(2), None, NOW)
    assert [pace.at_rest(NOW + passed) for passed in (0, 39, 40)] == [[line(1)], [line(1)], []]


@pytest.mark.parametrize("wish", [LONGEST_REST, 5 * LONGEST_REST])
def test_a_long_wish_is_obeyed_for_an_hour(wish: int) -> None:
    pace = Pace(8)
    pace.slower(line(), wish, NOW)
    pace.rest(wish, NOW)
    for passed, rests in ((0, True), (LONGEST_REST - 1, True), (LONGEST_REST, False)):
        assert (pace.at_rest(NOW + passed) == [line()], pace.is_quiet(NOW + passed)) == (rests, rests)


def test_what_a_clock_told_that_was_set_back_since_does_not_count() -> None:
    pace, ahead = Pace(1), NOW + 2 * LONGEST_REST
    pace.slower(line(), 40, ahead)
    assert (pace.at_rest(NOW), pace.is_quiet(NOW)) == ([], False)
    pace.slower(line(), None, NOW)
    assert [pace.is_quiet(NOW), pace.is_quiet(NOW + QUIET_SECONDS)] == [True, False]


def test_of_very_many_that_rest_the_newest_are_minded() -> None:
    pace = Pace(8)
    for number in range(RESTING_AT_MOST + 5):
        pace.slower(line(number), 40, NOW)
    assert pace.at_rest(NOW) == [line(number) for number in range(5, RESTING_AT_MOST + 5)]
