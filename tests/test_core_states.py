"""States: the two tables, what an attempt's outcome means, how long to wait."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from langchain_stripe_meter.core.states import (
    CLOCK_MARGIN,
    EVENT_MOVES,
    MAX_DELAY,
    MAX_WISH,
    READING_MOVES,
    SAFE_WINDOW,
    STALE_AFTER,
    Attempt,
    EventState,
    Move,
    Outcome,
    ReadingState,
    backoff,
    next_event_state,
    next_reading_state,
    out_of_window,
    picture,
    settle,
)
from langchain_stripe_meter.errors import IllegalMoveError

NOW = 1_780_000_000
HOUR = 3600

outcome_moves = st.sampled_from([*EVENT_MOVES[EventState.SENDING].keys() - {Move.OUT_OF_WINDOW, Move.CONTRADICTED}])
later_moves = st.sampled_from([Move.REFUSED_FOR_NOW, Move.UNAUTHORISED, Move.NO_ACCESS, Move.UNKNOWN])
ages = st.integers(-2 * SAFE_WINDOW, 40 * 86_400)
wishes = st.none() | st.integers(-10, 10**12)
attempts = st.builds(
    Attempt, st.text(max_size=20), st.integers(0, 10**6), st.integers(NOW, NOW + 300), st.none() | st.just(NOW - HOUR)
)


def attempt(*, first_unknown: int | None = None, tries: int = 0, sent: int = NOW) -> Attempt:
    return Attempt("run-1", tries, sent, first_unknown)


# -- the tables


def test_every_state_has_its_row_and_every_move_leads_to_a_known_state() -> None:
    assert set(READING_MOVES) == set(ReadingState)
    assert set(EVENT_MOVES) == set(EventState)
    assert {new for moves in READING_MOVES.values() for new in moves.values()} <= set(ReadingState)
    assert {new for moves in EVENT_MOVES.values() for new in moves.values()} <= set(EventState)
    assert {move for table in (READING_MOVES, EVENT_MOVES) for moves in table.values() for move in moves} == set(Move)


def test_what_is_written_off_or_withdrawn_never_moves_again() -> None:
    assert {state for state, moves in READING_MOVES.items() if not moves} == {ReadingState.WRITTEN_OFF}
    gone = {EventState.WITHDRAWN, EventState.WRITTEN_OFF}
    assert {state for state, moves in EVENT_MOVES.items() if not moves} == gone


def test_what_was_skipped_is_billed_only_when_its_lead_claims_it() -> None:
    assert READING_MOVES[ReadingState.SKIPPED] == {Move.CLAIM: ReadingState.RECORDED}


@given(st.sampled_from(ReadingState), st.sampled_from(EventState), st.sampled_from(Move))
def test_a_move_that_is_not_in_the_table_is_refused_by_name(
    reading: ReadingState, event: EventState, move: Move
) -> None:
    if move in READING_MOVES[reading]:
        assert next_reading_state(reading, move) is READING_MOVES[reading][move]
    else:
        with pytest.raises(IllegalMoveError, match=f"reading that is {reading} cannot {move}"):
            next_reading_state(reading, move)
    if move in EVENT_MOVES[event]:
        assert next_event_state(event, move) is EVENT_MOVES[event][move]
    else:
        with pytest.raises(IllegalMoveError, match=f"event that is {event} cannot {move}"):
            next_event_state(event, move)


def test_nothing_is_sent_but_from_pending() -> None:
    assert [state for state, moves in EVENT_MOVES.items() if Move.SEND in moves] == [EventState.PENDING]
    assert [state for state, moves in EVENT_MOVES.items() if EventState.SENDING in moves.values()] == [
        EventState.PENDING
    ]


def test_a_doubtful_event_moves_only_after_a_look_at_stripe_or_by_a_person() -> None:
    looked = {Move.SEEN_AT_STRIPE, Move.ABSENT_AT_STRIPE, Move.REJECTED_LATER}
    assert set(EVENT_MOVES[EventState.DOUBTFUL]) == looked | {Move.WRITE_OFF}


def test_the_picture_draws_every_move_of_both_tables() -> None:
    drawn = picture()
    for table in (READING_MOVES, EVENT_MOVES):
        for old, moves in table.items():
            for move, new in moves.items():
                assert f"{old} --> {new}: {move}" in drawn


# -- outcomes


@given(attempts, outcome_moves, wishes, ages)
def test_an_attempt_always_settles_and_never_back_into_sending(
    before: Attempt, move: Move, wish: int | None, age: int
) -> None:
    after = settle(before, Outcome(move, retry_after=wish), NOW + age)
    assert after.state is not EventState.SENDING
    assert after.attempts == before.attempts + (move not in (Move.UNAUTHORISED, Move.NO_ACCESS))
    assert after.due > NOW + age


@given(attempts, outcome_moves, ages)
def test_an_event_is_never_queued_again_outside_the_safe_window(before: Attempt, move: Move, age: int) -> None:
    now = NOW + age
    after = settle(before, Outcome(move), now)
    if after.state is EventState.PENDING and after.first_unknown_at is not None:
        assert not out_of_window(after.first_unknown_at, now)
        assert now - after.first_unknown_at < 24 * HOUR - HOUR + 1


@given(attempts, outcome_moves, ages)
def test_the_first_unknown_outcome_is_never_forgotten_nor_moved(before: Attempt, move: Move, age: int) -> None:
    after = settle(before, Outcome(move), NOW + age)
    if before.first_unknown_at is not None:
        assert after.first_unknown_at == before.first_unknown_at
    else:
        assert after.first_unknown_at == (before.sent_at if move is Move.UNKNOWN else None)


@pytest.mark.parametrize("move", [Move.ACCEPTED, Move.DUPLICATE])
@pytest.mark.parametrize("first", [None, NOW - HOUR, NOW - 40 * 86_400])
def test_stripes_yes_is_delivered_however_old_the_doubt(move: Move, first: int | None) -> None:
    assert settle(attempt(first_unknown=first), Outcome(move), NOW).state is EventState.DELIVERED


@pytest.mark.parametrize(
    ("was_absent", "first", "move", "state", "unknown"),
    [
        (True, None, Move.DUPLICATE, EventState.DOUBTFUL, NOW - 5),
        (True, None, Move.ACCEPTED, EventState.DELIVERED, None),
        (True, NOW - HOUR, Move.DUPLICATE, EventState.DOUBTFUL, NOW - HOUR),  # it may know it from before, all the same
        (False, None, Move.DUPLICATE, EventState.DELIVERED, None),
    ],
)
def test_that_stripe_knows_what_it_was_said_to_lack_is_doubted(
    was_absent: bool, first: int | None, move: Move, state: EventState, unknown: int | None
) -> None:
    before = Attempt("run-1", 2, NOW - 5, first, was_absent=was_absent)
    after = settle(before, Outcome(move), NOW)
    assert (after.state, after.first_unknown_at) == (state, unknown)


def test_an_event_whose_customer_is_gone_is_withdrawn_but_after_an_unknown_outcome_it_is_doubtful() -> None:
    assert settle(attempt(), Outcome(Move.UNSEAL), NOW).state is EventState.WITHDRAWN
    assert settle(attempt(first_unknown=NOW - 1), Outcome(Move.UNSEAL), NOW).state is EventState.DOUBTFUL


def test_a_final_refusal_is_rejected_but_after_an_unknown_outcome_it_is_doubtful() -> None:
    assert settle(attempt(), Outcome(Move.REFUSED), NOW).state is EventState.REJECTED
    assert settle(attempt(first_unknown=NOW - 1), Outcome(Move.REFUSED), NOW).state is EventState.DOUBTFUL


@given(later_moves)
def test_the_safe_window_is_23_hours_from_when_the_unknown_attempt_was_sent(move: Move) -> None:
    first = NOW - SAFE_WINDOW
    assert settle(attempt(first_unknown=first + 1), Outcome(move), NOW).state is EventState.PENDING
    assert settle(attempt(first_unknown=first), Outcome(move), NOW).state is EventState.DOUBTFUL
    late = settle(attempt(sent=first), Outcome(Move.UNKNOWN), NOW)
    assert (late.state, late.first_unknown_at) == (EventState.DOUBTFUL, first)


def test_the_safe_window_leaves_an_hour_of_stripes_24_to_a_clock_that_errs() -> None:
    assert SAFE_WINDOW + CLOCK_MARGIN == 24 * HOUR
    assert not out_of_window(NOW, NOW + 23 * HOUR - 1)
    assert out_of_window(NOW, NOW + 23 * HOUR)


def test_a_clock_that_ran_backwards_errs_to_the_safe_side() -> None:
    assert not out_of_window(NOW, NOW - 60)
    assert not out_of_window(NOW, NOW - HOUR + 1)
    assert out_of_window(NOW, NOW - HOUR)
    assert out_of_window(NOW, NOW - 30 * HOUR)


def test_a_refused_key_burns_no_attempt_however_often() -> None:
    now, before = NOW, attempt(tries=3)
    for _ in range(100):
        after = settle(before, Outcome(Move.UNAUTHORISED), now)
        assert (after.state, after.attempts, after.first_unknown_at) == (EventState.PENDING, 3, None)
        now, before = after.due, attempt(tries=after.attempts, sent=after.due)


def test_stripes_wish_is_obeyed_unless_it_is_absurd() -> None:
    assert settle(attempt(), Outcome(Move.REFUSED_FOR_NOW, retry_after=90), NOW).due == NOW + 90
    assert settle(attempt(), Outcome(Move.REFUSED_FOR_NOW, retry_after=-90), NOW).due > NOW
    assert settle(attempt(), Outcome(Move.REFUSED_FOR_NOW, retry_after=10**12), NOW).due == NOW + MAX_WISH
    assert MAX_WISH == 6 * HOUR < SAFE_WINDOW


@pytest.mark.parametrize("move", [Move.SEND, Move.FOUND, Move.WRITE_OFF, Move.SEEN_AT_STRIPE, Move.REJECTED_LATER])
def test_what_is_no_outcome_of_sending_cannot_settle(move: Move) -> None:
    with pytest.raises(IllegalMoveError):
        settle(attempt(), Outcome(move), NOW)


def test_usage_is_held_a_day_before_stripe_would_refuse_it() -> None:
    assert STALE_AFTER == 34 * 24 * HOUR


# -- backoff


@given(st.integers(-5, 10**9), st.text(max_size=20))
def test_a_wait_is_at_least_a_second_at_most_ten_minutes_and_always_the_same(tries: int, identifier: str) -> None:
    delay = backoff(tries, identifier)
    assert 1 <= delay <= MAX_DELAY == 600
    assert delay == backoff(tries, identifier)


@given(st.text(max_size=20))
def test_waits_grow_until_they_reach_ten_minutes(identifier: str) -> None:
    delays = [backoff(tries, identifier) for tries in range(1, 30)]
    assert all(later >= earlier for earlier, later in pairwise(delays[:9]))
    assert all(delay >= MAX_DELAY // 2 for delay in delays[9:])


def test_two_events_do_not_march_in_step() -> None:
    assert len({backoff(10, f"run-{n}") for n in range(100)}) > 50
    assert len({settle(Attempt(f"run-{n}", 9, NOW), Outcome(Move.UNKNOWN), NOW).due for n in range(100)}) > 50


@pytest.mark.parametrize("tries", range(1, 30))
def test_a_wait_is_whole_seconds(tries: int) -> None:
    assert type(backoff(tries, "run-1")) is int


# -- an event's life, with Stripe remembering identifiers for 24 hours only


class Life(RuleBasedStateMachine):
    """Sends one event in any weather; Stripe bills it anew once it has forgotten the identifier."""

    @initialize()
    def begin(self) -> None:
        self.now, self.due = NOW, NOW
        self.state, self.tries = EventState.PENDING, 0
        self.first_unknown: int | None = None
        self.billed: list[int] = []

    @rule(seconds=st.integers(0, 30 * HOUR))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.state is EventState.PENDING)
    @rule(
        weather=st.sampled_from(["fine", "answer lost", "request lost", "busy", "bad key", "refused"]),
        seconds=st.integers(0, 26 * HOUR),
    )
    def send(self, weather: str, seconds: int) -> None:
        self.now = max(self.now, self.due)
        if self.first_unknown is not None and out_of_window(self.first_unknown, self.now):
            self.state = next_event_state(self.state, Move.OUT_OF_WINDOW)
            return
        sent = self.now
        outcome = Outcome(self._answer(weather, sent))
        self.now += seconds if outcome.move is Move.UNKNOWN else 1
        after = settle(Attempt("run-1", self.tries, sent, self.first_unknown), outcome, self.now)
        self.state, self.tries = after.state, after.attempts
        self.due, self.first_unknown = after.due, after.first_unknown_at

    def _answer(self, weather: str, sent: int) -> Move:
        plain = {"busy": Move.REFUSED_FOR_NOW, "bad key": Move.UNAUTHORISED, "request lost": Move.UNKNOWN}
        if weather in plain:
            return plain[weather]
        if weather == "refused":
            return Move.REFUSED
        known = any(sent - at < 24 * HOUR for at in self.billed)
        if not known:
            self.billed.append(sent)
        if weather == "answer lost":
            return Move.UNKNOWN
        return Move.DUPLICATE if known else Move.ACCEPTED

    @invariant()
    def it_is_never_billed_twice_and_never_called_rejected_when_billed(self) -> None:
        assert len(self.billed) <= 1
        if self.state is EventState.DELIVERED:
            assert len(self.billed) == 1
        if self.state is EventState.REJECTED:
            assert not self.billed


TestLife = Life.TestCase
