"""The ledger's totals against Stripe's: what is explained by what is on its way, and what is a difference."""

from __future__ import annotations

from decimal import Decimal, Inexact, localcontext
from typing import Any

import pytest

from langchain_stripe_meter.core.doubts import SUMS_LAG
from langchain_stripe_meter.core.totals import Comparison, Known, Verdict, compare, is_settled, judge

NOW = 1_790_000_000
UNSETTLED = ("sending", "doubtful", "just_delivered")


def known(**amounts: int) -> Known:
    """``just_delivered`` is what Stripe's sums may not show yet."""
    found = Known()
    for state, amount in amounts.items():
        found.add(Decimal(amount), state.removeprefix("just_"), is_settled=state not in UNSETTLED)
    return found


def held_against(at_stripe: int | None, later: Known | None = None, **amounts: int) -> tuple[Decimal, Comparison]:
    stripes = None if at_stripe is None else Decimal(at_stripe)
    found = compare("ai_tokens", "cus_1", known(**amounts), stripes, later=later)
    return found.difference, found


@pytest.mark.parametrize(
    ("at_stripe", "difference"), [(0, -10), (9, -1), (10, 0), (12, 0), (15, 0), (16, 1), (None, -10)]
)
def test_stripe_may_have_what_is_on_its_way_or_not_and_nothing_else(at_stripe: int | None, difference: int) -> None:
    assert held_against(at_stripe, delivered=10, sending=3, doubtful=2, held=7, pending=4)[0] == difference


@pytest.mark.parametrize(("at_stripe", "difference"), [(5, -1), (6, 0), (10, 0), (11, 1), (None, -6)])
def test_stripes_sums_may_lack_what_was_just_delivered_but_have_nothing_more(
    at_stripe: int | None, difference: int
) -> None:
    assert held_against(at_stripe, delivered=6, just_delivered=4, pending=9)[0] == difference


@pytest.mark.parametrize("amount", ["0.5", "1", "-0.5", "-1"])
def test_whatever_is_on_its_way_widens_what_is_possible_in_its_own_direction_alone(amount: str) -> None:
    found = Known()
    found.add(Decimal(amount), "sending", is_settled=False)
    assert (found.least, found.most) == (min(Decimal(amount), Decimal(0)), max(Decimal(amount), Decimal(0)))


def test_where_nothing_was_delivered_stripe_must_have_nothing() -> None:
    assert held_against(0, held=5)[0] == 0
    assert held_against(1, held=5)[0] == 1
    assert held_against(1)[0] == 1


def test_everything_is_recorded_in_whatever_state_and_the_report_says_what_is_uncertain() -> None:
    _, found = held_against(10, delivered=10, just_delivered=4, sending=3, held=7)
    assert (found.recorded, found.delivered, found.at_least, found.uncertain) == (24, 14, 10, 7)
    assert found.account == ""


@pytest.mark.parametrize(("at_stripe", "difference"), [(9, -1), (10, 0), (18, 0), (19, 1)])
def test_what_is_delivered_while_stripe_is_asked_is_no_difference(at_stripe: int, difference: int) -> None:
    later = known(delivered=10, just_delivered=5, sending=3)
    assert held_against(at_stripe, later, delivered=10, pending=8)[0] == difference


def test_what_was_on_its_way_stays_possible_though_less_is_later() -> None:
    assert held_against(15, known(delivered=10), delivered=10, sending=5)[0] == 0
    assert held_against(1, known(), held=1)[0] == 1


def test_a_correction_on_its_way_may_lower_stripes_sum() -> None:
    assert held_against(6, delivered=10, sending=-4)[0] == 0
    assert held_against(5, delivered=10, sending=-4)[0] == -1


@pytest.mark.parametrize(("at_stripe", "difference"), [(5, -1), (6, 0), (13, 0), (14, 1)])
def test_usage_and_a_correction_that_are_both_on_their_way_do_not_hide_each_other(
    at_stripe: int, difference: int
) -> None:
    assert held_against(at_stripe, delivered=10, just_delivered=3, sending=-4)[0] == difference


def test_a_comparison_names_whose_usage_of_what_on_which_account_it_is() -> None:
    found = compare("ai_tokens", "cus_1", Known(), None, "acct_1")
    assert (found.event_name, found.customer, found.account) == ("ai_tokens", "cus_1", "acct_1")
    assert {type(amount) for amount in (found.recorded, found.delivered, found.uncertain)} == {Decimal}


def test_where_stripe_could_not_be_asked_the_comparison_says_why_and_no_difference() -> None:
    found = compare("ai_tokens", "cus_1", known(delivered=5), None, problem="no access")
    assert (found.problem, found.difference) == ("no access", 0)


@pytest.mark.parametrize(
    ("delivered", "at_stripe", "difference"),
    [
        ("1000000000.000001", "1000000000", "0"),
        ("32321143.44571275", "32321143.4457127", "0"),  # a float's 15 digits round a half down, a decimal's to even
        ("32321143.44571275", "32321143.4457128", "0"),
        ("32321143.44571275", "32321143.4457130", "0.00000025"),
        ("32321143.44571275", "32321143.4457125", "-0.00000025"),
        ("-32321143.44571275", "-32321143.4457127", "0"),
        ("0.3", "0.300000000000001", "0"),
        ("0.3", "0.300000000000002", "0.000000000000002"),
        ("0", "0.000000000000001", "0.000000000000001"),
    ],
)
def test_what_stripes_fifteen_digits_cannot_say_is_no_difference(
    delivered: str, at_stripe: str, difference: str
) -> None:
    found = Known()
    found.add(Decimal(delivered), "delivered", is_settled=True)
    assert compare("ai_tokens", "cus_1", found, Decimal(at_stripe)).difference == Decimal(difference)
    agrees = judge([Decimal(delivered)], [], Decimal(at_stripe)) is Verdict.AGREES
    assert agrees is (Decimal(difference) == 0)


@pytest.mark.parametrize("traps", [[], [Inexact]])
def test_an_applications_own_decimal_context_hides_no_difference(traps: list[type[Inexact]]) -> None:
    with localcontext() as context:
        context.prec = 6
        for trap in traps:
            context.traps[trap] = True
        off, found = held_against(1_234_569, delivered=1_234_567, pending=7)
        assert (off, found.recorded) == (2, 1_234_574)
        assert held_against(1_234_568, delivered=1)[0] == 1_234_567
        later = known(delivered=1_234_570, sending=1_000_001)
        assert held_against(2_234_572, later, delivered=1_234_567, sending=3)[0] == 1


@pytest.mark.parametrize(
    ("state", "moments", "settled"),
    [
        ("delivered", {"settled_at": NOW - SUMS_LAG}, True),
        ("delivered", {"settled_at": NOW - SUMS_LAG + 1}, False),
        ("delivered", {}, True),
        ("delivered", {"settled_at": 1, "cancelled_at": NOW}, False),
        ("written_off", {"settled_at": NOW}, True),
        ("written_off", {"cancelled_at": NOW - SUMS_LAG + 1}, False),
        ("written_off", {"cancelled_at": NOW - SUMS_LAG}, True),
        ("sending", {}, False),
        ("doubtful", {"settled_at": 1}, False),
        ("pending", {}, True),
        ("pending", {"first_unknown_at": 1}, False),
        ("rejected", {"settled_at": NOW, "first_unknown_at": 1}, True),
        ("held", {}, True),
    ],
)
def test_what_stripe_may_have_and_its_sums_may_not_show_is_not_settled(
    state: str, moments: dict[str, int], settled: bool
) -> None:
    facts: dict[str, Any] = {"settled_at": None, "first_unknown_at": None, "cancelled_at": None} | moments
    assert is_settled(state, NOW, **facts) is settled
