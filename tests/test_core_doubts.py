"""The decision about doubtful events: from the ledger's facts and Stripe's sum to a verdict: pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import chain, combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_stripe_meter.core.doubts import (
    ASK_AGAIN,
    LOOK_AGAIN,
    PERSON,
    SUMS_LAG,
    Facts,
    Look,
    Trace,
    Verdict,
    decide,
    is_ready,
)
from langchain_stripe_meter.core.states import STALE_AFTER, EventState, Move

NOW = 1_780_000_020
DAY = 86_400

amounts = st.decimals("0.001", "1e9", places=3)


def doubts_of(values: list[Decimal], delivered: Decimal | list[Decimal], seen: Decimal | None) -> Facts:
    settled = NOW - SUMS_LAG - LOOK_AGAIN
    in_doubt = [
        Trace(number, f"run-{number}", value, EventState.DOUBTFUL, NOW - DAY, settled, settled, settled - DAY,
              seen, NOW - LOOK_AGAIN)
        for number, value in enumerate(values)
    ]  # fmt: skip
    known = [
        Trace(99 + number, f"known-{number}", value, EventState.DELIVERED, NOW - DAY, settled - DAY, settled - DAY)
        for number, value in enumerate(delivered if isinstance(delivered, list) else [delivered])
    ]
    return Facts((*known, *in_doubt))


def parts_of(values: list[Decimal]) -> Iterator[tuple[Decimal, ...]]:
    return chain.from_iterable(combinations(values, many) for many in range(1, len(values) + 1))


def as_stripe(values: list[Decimal]) -> Decimal:
    """A sum in the digits that Stripe answers with."""
    return Decimal(f"{float(sum(values)):.15g}")


@given(st.lists(amounts, min_size=1, max_size=6), st.sets(st.integers(0, 5)), amounts, st.sampled_from([1, -1]))
def test_the_verdict_is_the_truth_or_a_persons(
    values: list[Decimal], taken: set[int], delivered: Decimal, sign: int
) -> None:
    has = [value for number, value in enumerate(values) if number in taken]
    assume(not any(sum(some) == delivered for some in parts_of(values)))
    at_stripe = as_stripe([delivered, *(value * sign for value in has)])
    facts = doubts_of([value * sign for value in values], delivered, at_stripe)
    assert is_ready(facts, NOW)
    verdict = decide(facts, Look(at_stripe), NOW)
    expected = {0: Move.ABSENT_AT_STRIPE, len(values): Move.SEEN_AT_STRIPE}.get(len(has))
    assert verdict.move is expected
    assert (verdict.reason is None) == (expected is not None)


small = st.integers(-3, 9).filter(bool).map(Decimal)


@given(st.lists(small, min_size=1, max_size=4), st.sets(st.integers(0, 3)), st.lists(small, max_size=4), st.data())
def test_nor_is_it_wrong_where_stripe_has_refused_one_event_or_all_unheard_of(
    values: list[Decimal], taken: set[int], delivered: list[Decimal], data: st.DataObject
) -> None:
    refused = data.draw(st.sampled_from([[], delivered, *([value] for value in delivered)]))
    there = [value for number, value in enumerate(values) if number in taken]
    at_stripe = as_stripe([*there, *delivered, *(-value for value in refused)])
    move = decide(doubts_of(values, delivered, at_stripe), Look(at_stripe), NOW).move
    assert move in (None, {0: Move.ABSENT_AT_STRIPE, len(values): Move.SEEN_AT_STRIPE}.get(len(there)))


def test_so_many_doubts_that_chance_explains_any_sum_are_a_persons() -> None:
    values = [Decimal(2**number) + Decimal("0.5") for number in range(12)]
    assert "either" in str(decide(doubts_of(values, Decimal(9999), Decimal(9999)), Look(Decimal(9999)), NOW).reason)
    assert decide(doubts_of(values, [], Decimal(0)), Look(Decimal(0)), NOW).move is Move.ABSENT_AT_STRIPE


@pytest.mark.parametrize("at_stripe", ["123456789012345", "123456789012346"])
def test_sums_with_more_digits_than_stripe_answers_with_tell_nothing(at_stripe: str) -> None:
    facts = doubts_of([Decimal("0.5")], Decimal("123456789012345"), Decimal(at_stripe))
    assert "15 digits" in str(decide(facts, Look(Decimal(at_stripe)), NOW).reason)


def test_usage_and_its_correction_in_one_minute_tell_nothing() -> None:
    facts = doubts_of([Decimal(5), Decimal(-5)], Decimal(1), Decimal(1))
    assert "corrections" in str(decide(facts, Look(Decimal(1)), NOW).reason)


@pytest.mark.parametrize(
    ("doubt", "delivered", "at_stripe"),
    [("10", ["30", "-10"], "30"), ("0.5", ["0.5", "30"], "30.5"), ("-10", ["30", "10"], "30")],
)
def test_a_sum_that_delivered_usage_in_the_place_of_the_doubt_would_explain_is_a_persons(
    doubt: str, delivered: list[str], at_stripe: str
) -> None:
    facts = doubts_of([Decimal(doubt)], [Decimal(value) for value in delivered], Decimal(at_stripe))
    assert decide(facts, Look(Decimal(at_stripe)), NOW).move is None


def test_a_person_is_told_what_else_the_sum_may_show() -> None:
    facts = doubts_of([Decimal(10)], [Decimal(30), Decimal(10)], Decimal(40))
    assert decide(facts, Look(Decimal(40)), NOW).reason == (
        "A person must decide: Stripe has 40 in that minute: either what is delivered, or as much of what is in doubt, "
        "if it refused the other later."
    )


def test_what_stripe_knew_by_its_identifier_is_not_called_absent_but_a_persons_and_its_neighbours_wait() -> None:
    """That Stripe knows it is the only sign that a sum which lacks it, and them, may be wrong."""
    known, other = (replace(doubt, is_contradicted=doubt.id == 0) for doubt in doubts_of(
        [Decimal(5), Decimal(7)], [], Decimal(0)
    ).events)  # fmt: skip
    verdict = decide(Facts((known, other)), Look(Decimal(0)), NOW)
    assert verdict.move is None
    assert verdict.reason_of(other) == (
        "A person must decide: Stripe's sums lack it, but also another doubtful event of that minute, whose identifier "
        "Stripe knows: they may be wrong. Settle that one first."
    )
    assert verdict.reason_of(known) == (
        "A person must decide: Stripe knows its identifier, though it was said to lack it, and its sums lack it: it "
        "refused it later, or somebody cancelled it there. If it refused it, settle it as absent, and it goes out "
        "under a new identifier; if it was cancelled, write it off."
    )


def test_that_stripe_knew_its_identifier_is_told_with_whatever_else_is_told_and_changes_nothing_else() -> None:
    known = replace(doubts_of([Decimal(5)], [], Decimal(3)).events[0], is_contradicted=True)
    assert decide(Facts((known,)), Look(Decimal(3)), NOW).reason_of(known) == (
        "A person must decide: Stripe has 3 in that minute; 0 is delivered, 5 in doubt. Stripe knows its identifier, "
        "though it was said to lack it."
    )
    for seen, expected in ((None, Verdict()), (Decimal(5), Verdict(Move.SEEN_AT_STRIPE))):
        verdict = decide(Facts((replace(known, seen_value=seen),)), Look(Decimal(5)), NOW)
        assert (verdict, verdict.reason_of(known)) == (expected, None)


@pytest.mark.parametrize("delivered", [0, 7])
def test_a_doubt_about_nothing_is_no_doubt(delivered: int) -> None:
    facts = doubts_of([Decimal(0)], Decimal(delivered), Decimal(delivered))
    assert decide(facts, Look(Decimal(delivered)), NOW).move is Move.SEEN_AT_STRIPE


@pytest.mark.parametrize("value", [5, -5])
def test_a_doubt_about_nothing_shares_the_fate_of_the_others(value: int) -> None:
    facts = doubts_of([Decimal(0), Decimal(value)], Decimal(7), Decimal(7))
    assert decide(facts, Look(Decimal(7)), NOW).move is Move.ABSENT_AT_STRIPE


@pytest.mark.parametrize("back", [1, 1800, 10 * DAY])
def test_a_clock_that_ran_back_makes_us_wait(back: int) -> None:
    facts = doubts_of([Decimal(5)], Decimal(7), Decimal(7))
    assert is_ready(facts, NOW)
    assert not is_ready(facts, NOW - back)


def test_a_look_from_before_the_sums_had_settled_does_not_count() -> None:
    facts = doubts_of([Decimal(5)], Decimal(7), Decimal(7))
    late = Trace(5, "late", Decimal(1), EventState.DELIVERED, NOW - DAY, NOW - SUMS_LAG, NOW - SUMS_LAG)
    early = Facts((*facts.events, late))
    assert is_ready(early, NOW)
    assert decide(early, Look(Decimal(7)), NOW) == Verdict()


@pytest.mark.parametrize(
    "changed", [{"sent_at": NOW - SUMS_LAG, "settled_at": NOW - SUMS_LAG}, {"cancelled_at": NOW - SUMS_LAG}]
)
def test_activity_in_the_minute_puts_the_next_look_off(changed: dict[str, int]) -> None:
    doubt, other = beside(**changed).events
    facts = Facts((replace(doubt, seen_at=None), other))
    assert is_ready(facts, NOW)
    assert not is_ready(facts, NOW - 1)


def test_sums_settle_for_two_hours_and_are_looked_at_ten_minutes_apart_or_an_hour_where_a_person_was_told() -> None:
    assert (SUMS_LAG, LOOK_AGAIN, ASK_AGAIN) == (2 * 3600, 10 * 60, 3600)


def test_once_a_person_was_told_looks_are_an_hour_apart() -> None:
    told = replace(doubts_of([Decimal(5)], Decimal(7), Decimal(9)).events[1], error=PERSON + "why")
    assert told.seen_at is not None
    assert not is_ready(Facts((told,)), told.seen_at + ASK_AGAIN - 1)
    assert is_ready(Facts((told,)), told.seen_at + ASK_AGAIN)


# -- what makes a look tell nothing

AGO = NOW - SUMS_LAG - LOOK_AGAIN - DAY


def beside(**known: object) -> Facts:
    """One doubt about 5, and another event of its minute; nothing else is delivered there."""
    (*_, doubt) = doubts_of([Decimal(5)], Decimal(0), Decimal(5)).events
    other: dict[str, object] = {
        "id": 9, "identifier": "other", "value": Decimal(0), "state": EventState.DELIVERED, "at": NOW - DAY,
        "sent_at": AGO, "settled_at": AGO,
    }  # fmt: skip
    return Facts((doubt, Trace(**{**other, **known})))  # type: ignore[arg-type]


def reason(facts: Facts, at_stripe: int = 5) -> str | None:
    return decide(facts, Look(Decimal(at_stripe)), NOW).reason


def test_without_a_doubt_there_is_nothing_to_look_for() -> None:
    known = Trace(1, "known", Decimal(1), EventState.DELIVERED, NOW - DAY, AGO, AGO)
    assert not is_ready(Facts((known,)), NOW)


@pytest.mark.parametrize(
    ("state", "first_unknown", "is_open"),
    [
        (EventState.SENDING, None, True),
        (EventState.PENDING, AGO, True),
        (EventState.PENDING, None, False),
        (EventState.REJECTED, AGO, False),
    ],
)
def test_while_stripe_may_be_taking_another_event_of_the_minute_its_sum_is_not_looked_at(
    state: EventState, first_unknown: int | None, is_open: bool
) -> None:
    assert is_ready(beside(state=state, first_unknown_at=first_unknown), NOW) is not is_open


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (replace(beside(), pruned=True), "what was delivered in that minute has been pruned from the ledger."),
        (
            beside(state=EventState.WRITTEN_OFF, first_unknown_at=AGO),
            "an event of that minute was written off while it was in doubt.",
        ),
        (
            beside(cancelled_at=AGO),
            "an event of that minute was asked to be cancelled, and it is not settled whether it was.",
        ),
        (doubts_of([Decimal(6), Decimal(-1)], Decimal(0), Decimal(5)),
         "usage and corrections of the same minute are in doubt."),
        (doubts_of([Decimal(5)], Decimal(10**15 - 5), Decimal(5)), "Stripe's sums have 15 digits, too few to tell."),
        (doubts_of([Decimal(4)], Decimal(2), Decimal(5)), "Stripe has 5 in that minute; 2 is delivered, 4 in doubt."),
    ],
)  # fmt: skip
def test_a_person_is_told_why_the_sum_tells_nothing(facts: Facts, why: str) -> None:
    assert reason(facts) == "A person must decide: " + why


@pytest.mark.parametrize(
    "facts",
    [
        beside(state=EventState.WRITTEN_OFF),
        beside(cancelled_at=AGO, state=EventState.WRITTEN_OFF),
        doubts_of([Decimal(5)], Decimal(0), Decimal(5)),
        replace(beside(), events=beside().events[:1]),
    ],
)
def test_what_is_settled_in_the_minute_makes_nothing_unclear(facts: Facts) -> None:
    assert decide(facts, Look(Decimal(5)), NOW) == Verdict(Move.SEEN_AT_STRIPE)


@pytest.mark.parametrize(("over", "move"), [(0, Move.ABSENT_AT_STRIPE), (1, None)])
def test_what_stripe_does_not_have_is_sent_again_until_it_is_34_days_old(over: int, move: Move | None) -> None:
    (doubt,) = doubts_of([Decimal(5)], Decimal(0), Decimal(0)).doubts
    verdict = decide(Facts((replace(doubt, at=NOW - STALE_AFTER - over),)), Look(Decimal(0)), NOW)
    assert verdict.move is move
    if move is None:
        assert verdict.reason == (
            "A person must decide: Stripe does not have it, but it is older than 34 days, and Stripe would refuse it."
        )
