"""Weeks of trouble, from hundreds of seeds: nothing is lost, nothing is billed twice, nothing is stuck.

``STRIPE_METER_SIMULATED_SEEDS=5000`` plays more of them. A failure names its seed: ``simulation.play([seed])``.
"""

from __future__ import annotations

import os

import pytest
from faults import tally
from simulation import play

from langchain_stripe_meter.core import doubts, states
from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.ledger import outbox

USUAL_SEEDS = 200
SEEDS = int(os.environ.get("STRIPE_METER_SIMULATED_SEEDS", USUAL_SEEDS))
AT_ONCE = 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_weeks_of_trouble_lose_nothing_and_bill_nothing_twice(first: int) -> None:
    seeds = range(first, min(first + AT_ONCE, SEEDS))
    total = play(seeds)
    print(total)
    assert total.seeds == len(seeds)
    assert total.settled_by_themselves > total.needed_a_person
    assert total.kills > 0
    if SEEDS == USUAL_SEEDS:
        fault = "weeks of outages, lost answers, kills and jumping clocks, from a seed"
        tally(fault, tried=len(seeds), needed_a_person=total.amount_for_a_person)


def test_the_same_holds_over_http() -> None:
    assert play(range(3), 40, over_http=True).seeds == 3


def find_a_failure(match: str) -> None:
    """At least one of a few seeds must notice what is wrong."""
    with pytest.raises(AssertionError, match=match):
        play(range(100))


@pytest.mark.timeout(300)
def test_it_notices_an_identifier_that_is_repeated_after_stripe_forgot_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SAFE_WINDOW", 40 * 3600)
    find_a_failure("billed twice")


@pytest.mark.timeout(300)
def test_it_notices_a_decision_after_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "_saw_the_same", lambda *_: True)
    monkeypatch.setattr(doubts, "_could_have_been_swapped", lambda *_, **__: False)  # it leaves less to the looks
    find_a_failure("billed twice|lost")


@pytest.mark.timeout(300)
def test_it_notices_a_killed_courier_that_is_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "Outcome", lambda _move, why: Outcome(Move.REFUSED_FOR_NOW, why))
    find_a_failure("billed twice|lost|not known as delivered")
