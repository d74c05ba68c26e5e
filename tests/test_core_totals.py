"""The ledger's totals against Stripe's: what is explained by what is on its way, and what is a difference."""

from __future__ import annotations

from decimal import Decimal, Inexact, localcontext

import pytest

from langchain_stripe_meter.core.totals import Comparison, compare


def held_against(
    at_stripe: int | None, later: dict[str, Decimal] | None = None, **amounts: int
) -> tuple[Decimal, Comparison]:
    known = {state: Decimal(amount) for state, amount in amounts.items()}
    found = compare("ai_tokens", "cus_1", known, None if at_stripe is None else Decimal(at_stripe), later=later)
    return found.difference, found


@pytest.mark.parametrize(
    ("at_stripe", "difference"), [(0, -10), (9, -1), (10, 0), (12, 0), (15, 0), (16, 1), (None, -10)]
)
def test_stripe_may_have_what_is_on_its_way_or_not_and_nothing_else(at_stripe: int | None, difference: int) -> None:
    assert held_against(at_stripe, delivered=10, sending=3, doubtful=2, held=7, pending=4)[0] == difference


def test_where_nothing_was_delivered_stripe_must_have_nothing() -> None:
    assert held_against(0, held=5)[0] == 0
    assert held_against(1, held=5)[0] == 1
    assert held_against(1)[0] == 1


def test_everything_is_recorded_in_whatever_state() -> None:
    _, found = held_against(10, delivered=10, sending=3, held=7)
    assert (found.recorded, found.delivered, found.uncertain, found.account) == (20, 10, 3, "")


@pytest.mark.parametrize(("at_stripe", "difference"), [(9, -1), (10, 0), (18, 0), (19, 1)])
def test_what_is_delivered_while_stripe_is_asked_is_no_difference(at_stripe: int, difference: int) -> None:
    later = {"delivered": Decimal(15), "sending": Decimal(3)}
    assert held_against(at_stripe, later, delivered=10, pending=8)[0] == difference


def test_what_was_on_its_way_stays_possible_though_less_is_later() -> None:
    assert held_against(15, {"delivered": Decimal(10)}, delivered=10, sending=5)[0] == 0
    assert held_against(1, {}, held=1)[0] == 1


def test_a_correction_on_its_way_may_lower_stripes_sum() -> None:
    assert held_against(6, delivered=10, sending=-4)[0] == 0
    assert held_against(5, delivered=10, sending=-4)[0] == -1


def test_a_comparison_names_whose_usage_of_what_on_which_account_it_is() -> None:
    found = compare("ai_tokens", "cus_1", {}, None, "acct_1")
    assert (found.event_name, found.customer, found.account) == ("ai_tokens", "cus_1", "acct_1")
    assert {type(amount) for amount in (found.recorded, found.delivered, found.uncertain)} == {Decimal}


@pytest.mark.parametrize("traps", [[], [Inexact]])
def test_an_applications_own_decimal_context_hides_no_difference(traps: list[type[Inexact]]) -> None:
    with localcontext() as context:
        context.prec = 6
        for trap in traps:
            context.traps[trap] = True
        off, found = held_against(1_234_569, delivered=1_234_567, pending=7)
        assert (off, found.recorded) == (2, 1_234_574)
        later = {"delivered": Decimal(1_234_570), "sending": Decimal(1_000_001)}
        assert held_against(2_234_572, later, delivered=1_234_567, sending=3)[0] == 1
