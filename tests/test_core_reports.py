"""What Stripe's reports say, and what its sums say of what they do not name: pure."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter.core.totals import (
    MINUTE,
    Minute,
    Sample,
    Verdict,
    disagreeing,
    identifier_of,
    judge,
    read_report,
)

NOW = 1_800_000_000


def test_a_report_is_read_in_both_documented_shapes() -> None:
    data = {
        "validation_start": "2027-01-15T08:00:00.000Z",
        "validation_end": "2027-01-15T08:00:10.000Z",
        "reason": {
            "error_count": 5,
            "error_types": [
                {"code": "a", "error_count": 3, "sample_errors": [
                    {"request": {"identifier": "run-1"}}, {"request": {"id": "r", "idempotency_key": "run-2.0-17"}},
                ]},
                {"code": "b", "error_count": 2, "sample_errors": [{"request": {"identifier": "run-3.4-5"}}]},
            ],
        },
    }  # fmt: skip
    report = read_report(data, NOW)
    assert report.samples == (Sample("run-1", "a"), Sample("run-2", "a"), Sample("run-3", "b"))
    assert (report.errors, report.codes, report.start, report.end) == (
        5, {"a", "b"}, 1_800_000_000, 1_800_000_010,
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"reason": None},
        {"reason": []},
        {"reason": {"error_types": "x"}},
        {"reason": {"error_types": [None, 1, {}]}},
        {"reason": {"error_types": [{"code": None, "error_count": "3", "sample_errors": {}}]}},
        {"reason": {"error_types": [{"code": "a", "sample_errors": [None, {"request": "x"}, {"request": {}}]}]}},
        {"validation_start": 1, "validation_end": "soon"},
        {"validation_start": "2027-01-15", "validation_end": "99999-01-01T00:00:00Z"},
    ],
)
def test_a_report_that_is_not_as_documented_names_nothing_and_is_of_the_last_day(data: Any) -> None:
    report = read_report(data, NOW)
    assert (report.samples, report.errors, report.start, report.end) == ((), 0, NOW - 86_400, NOW)


def test_what_stripe_refused_as_a_repetition_is_no_refusal_of_the_event() -> None:
    kinds = [
        {"code": code, "error_count": count, "sample_errors": [{"request": {"identifier": f"run-{count}"}}]}
        for code, count in (("duplicate_meter_event", 3), ("a", 2))
    ]
    report = read_report({"reason": {"error_types": kinds}}, NOW)
    assert (report.samples, report.errors, report.codes) == ((Sample("run-2", "a"),), 2, {"a"})


@pytest.mark.parametrize("request_", [{}, {"identifier": None}, {"identifier": 7}, {"id": "req_1"}])
def test_a_sample_that_names_no_event_is_none_of_ours(request_: dict[str, Any]) -> None:
    assert identifier_of(request_) == ""


positive = st.decimals(min_value=1, max_value=10**6, places=2)
anything = st.decimals(min_value=-(10**6), max_value=10**6, places=2)


@given(st.lists(st.tuples(positive, st.booleans()), min_size=1), st.lists(st.tuples(positive, st.booleans())))
def test_with_one_sign_nothing_is_called_absent_of_which_stripe_has_a_part(
    delivered: list[tuple[Decimal, bool]], uncertain: list[tuple[Decimal, bool]]
) -> None:
    at_stripe = sum((value for value, there in [*delivered, *uncertain] if there), Decimal(0))
    verdict = judge([value for value, _ in delivered], [value for value, _ in uncertain], at_stripe)
    if any(there for _, there in [*delivered, *uncertain]):
        assert verdict is not Verdict.ABSENT
    else:
        assert verdict is Verdict.ABSENT
    if all(there for _, there in delivered):
        assert verdict is Verdict.AGREES


@given(st.lists(anything, min_size=1), anything)
def test_a_sum_is_absent_only_at_zero_and_only_with_one_sign(delivered: list[Decimal], at_stripe: Decimal) -> None:
    for asked in (at_stripe, Decimal(0), None):
        if judge(delivered, [], asked) is Verdict.ABSENT:
            assert asked == 0
            assert all(value >= 0 for value in delivered) or all(value <= 0 for value in delivered)


@given(st.lists(st.lists(st.tuples(positive, st.booleans()), min_size=1, max_size=4), max_size=20))
def test_every_minute_of_which_something_is_missing_is_found_and_no_other(
    facts: list[list[tuple[Decimal, bool]]],
) -> None:
    minutes = [
        Minute(NOW + MINUTE * number, {f"{number}-{index}": value for index, (value, _) in enumerate(events)})
        for number, events in enumerate(facts)
    ]

    def ask(start: int, end: int) -> Decimal:
        inside = range((start - NOW) // MINUTE, (end - NOW) // MINUTE)
        return sum((value for number in inside for value, there in facts[number] if there), Decimal(0))

    found = {minute.start: verdict for minute, verdict, _ in disagreeing(minutes, ask)}
    expected = {
        minute.start: Verdict.PARTIAL if any(there for _, there in events) else Verdict.ABSENT
        for minute, events in zip(minutes, facts, strict=True)
        if not all(there for _, there in events)
    }
    assert found == expected


def test_what_agrees_costs_one_question() -> None:
    minutes = [Minute(NOW + MINUTE * number, {str(number): Decimal(1)}) for number in range(1440)]
    asked = []

    def ask(start: int, end: int) -> Decimal:
        asked.append((start, end))
        return Decimal((end - start) // MINUTE)

    assert list(disagreeing(minutes, ask)) == []
    assert asked == [(NOW, NOW + 1440 * MINUTE)]


@pytest.mark.parametrize(
    ("first", "second", "sums"),
    [
        (Minute(NOW, {"a": Decimal(5)}), Minute(NOW + MINUTE, {"b": Decimal(-5)}), (0, 0)),
        (Minute(NOW, {"a": Decimal(5)}), Minute(NOW + MINUTE, {}, (Decimal(5),)), (0, 5)),
        (Minute(NOW, {"a": Decimal(5)}), Minute(NOW + MINUTE, {}, (Decimal(-5),)), (0, 0)),
    ],
)
def test_what_is_missing_in_one_minute_is_not_made_up_for_by_another(
    first: Minute, second: Minute, sums: tuple[int, int]
) -> None:
    def ask(start: int, end: int) -> Decimal:
        return sum((Decimal(sums[at]) for at in (0, 1) if start <= NOW + at * MINUTE < end), Decimal(0))

    found = [minute for minute, verdict, _ in disagreeing([first, second], ask) if verdict is Verdict.ABSENT]
    assert found[0] is first


@pytest.mark.parametrize(
    "minutes",
    [
        [{}, {}],
        [{"a": 0}, {"b": 5}],
        [{"a": -5}, {"b": 0}],
        [{"a": 5}, {"b": Decimal("0.5")}],
        [{"a": 5, "b": -5}],  # in one minute, nothing can be told apart
    ],
)
def test_of_one_sign_or_one_minute_the_sum_of_all_is_enough(minutes: list[dict[str, int | Decimal]]) -> None:
    given_ = [
        Minute(NOW + MINUTE * at, {name: Decimal(value) for name, value in one.items()})
        for at, one in enumerate(minutes)
    ]
    asked: list[int] = []

    def ask(start: int, end: int) -> Decimal:
        asked.append(start)
        return sum(
            (value for one in given_ if start <= one.start < end for value in one.delivered.values()), Decimal(0)
        )

    assert list(disagreeing(given_, ask)) == []
    assert asked == [NOW]


def test_where_stripe_cannot_be_asked_every_minute_is_for_a_person() -> None:
    minutes = [Minute(NOW + MINUTE * number, {str(number): Decimal(1)}) for number in range(3)]
    assert [verdict for _, verdict, _ in disagreeing(minutes, lambda _start, _end: None)] == [Verdict.PARTIAL] * 3


@pytest.mark.parametrize(
    ("delivered", "uncertain", "at_stripe", "verdict"),
    [
        (["2"], ["0.5"], "2", Verdict.AGREES),
        (["2"], ["0.5"], "2.5", Verdict.AGREES),
        (["2"], ["0.5"], "3", Verdict.PARTIAL),
        (["2"], ["-0.5"], "1.5", Verdict.AGREES),
        (["2"], ["-0.5"], "2.5", Verdict.PARTIAL),
        (["0.5"], [], "0", Verdict.ABSENT),
        (["0", "5"], [], "0", Verdict.ABSENT),
        (["0", "-5"], [], "0", Verdict.ABSENT),
        (["-5", "0.5"], [], "0", Verdict.PARTIAL),
        (["5", "-0.5"], [], "0", Verdict.PARTIAL),
        ([], [], "0", Verdict.AGREES),
        ([], [], "1", Verdict.PARTIAL),
    ],
)
def test_fractions_zeros_and_corrections_are_judged_exactly(
    delivered: list[str], uncertain: list[str], at_stripe: str, verdict: Verdict
) -> None:
    values = [Decimal(value) for value in delivered], [Decimal(value) for value in uncertain]
    assert judge(*values, Decimal(at_stripe)) is verdict
