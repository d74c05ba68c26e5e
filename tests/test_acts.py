"""What a person decides about usage that is recorded already: written down, all or nothing, never billed twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from auditing import Books
from faults import tally
from sqlalchemy import delete, update
from typer.testing import CliRunner, Result

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.audit.verify import verify
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import (
    ConfigurationError,
    ForeignLedgerError,
    IllegalMoveError,
    InvalidValueError,
    StripeError,
)
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import cancel as ask_stripe
from langchain_stripe_meter.ledger import acts, epoch, reversals, sealing, views
from langchain_stripe_meter.ledger.keeping import prune
from langchain_stripe_meter.ledger.schema import events, readings
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.operations import cancel
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer, drop_request, hang, refuse, server_error
from langchain_stripe_meter.sandbox.faults import Fault

ADJUSTMENTS = "/v1/billing/meter_event_adjustments"
DAY = 86_400


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    url: Any = tmp_path if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with Books(url) as books:
        yield books


def refused(books: Books, kind: type[Exception], words: str, act: Any, *arguments: Any, **named: Any) -> None:
    """It raises, naming what is wrong, and changes nothing."""
    before = books.snapshot()
    with pytest.raises(kind, match=words):
        act(books.ledger, *arguments, **named)
    assert books.snapshot() == before


# -- cancel


def take_back(books: Books, identifier: str) -> None:
    cancel(books.ledger, books.gateway, identifier)


def test_a_delivered_event_is_cancelled_at_stripe_and_written_off(books: Books) -> None:
    books.deliver("run-1", "run-2", value=5)
    take_back(books, "run-1")
    assert (books.states(), books.billed()) == ({"run-1": "written_off", "run-2": "delivered"}, 5)
    assert books.told() == ["cancel asked run-1", "cancelled run-1"]


def test_cancelling_again_is_safe_also_when_nobody_knows_what_came_of_it(books: Books) -> None:
    books.deliver("run-1")
    for fault, billed in ((drop_request(), 1), (server_error(), 1), (drop_answer(), 0)):
        books.sandbox.fail(fault, path=ADJUSTMENTS)
        with pytest.raises(StripeError, match=r"unknown.*again"):
            take_back(books, "run-1")
        assert (books.states(), books.billed()) == ({"run-1": "delivered"}, billed)
    take_back(books, "run-1")
    take_back(books, "run-1")
    assert (books.states(), books.billed()) == ({"run-1": "written_off"}, 0)
    assert books.told() == ["cancel asked run-1", "cancelled run-1"]


def lose_the_answer(books: Books, fault: Fault) -> None:
    """A cancelling of ``run-1`` of which nobody knows what came of it, and 25 hours later."""
    books.deliver("run-1")
    books.sandbox.fail(fault, path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="unknown"):
        take_back(books, "run-1")
    books.sandbox.advance(hours=25)


def test_what_was_cancelled_unknown_to_us_is_found_out_by_cancelling_again_a_day_later(books: Books) -> None:
    lose_the_answer(books, drop_answer())
    take_back(books, "run-1")
    assert (books.states(), books.billed()) == ({"run-1": "written_off"}, 0)


def test_where_stripe_is_too_late_to_say_what_came_of_a_cancelling_nothing_is_concluded(books: Books) -> None:
    """Neither that it is billed, nor that the total should be corrected."""
    lose_the_answer(books, drop_request())
    for _ in range(2):
        with pytest.raises(StripeError, match=r"run-1: .*24 hours.*An earlier try may have.*verify\(\)"):
            take_back(books, "run-1")
    assert books.told() == ["cancel asked run-1"]
    books.take(*books.sandbox.reject("run-1"))
    assert (books.states(), sealing.retry(books.ledger)) == ({"run-1": "written_off"}, 0)


def test_verify_names_what_may_have_been_cancelled_and_a_persons_word_settles_it(books: Books) -> None:
    books.deliver("run-0")
    refused(
        books,
        IllegalMoveError,
        r"run-0 is delivered, .*It is billed: cancel\(\) it",
        acts.write_off,
        "run-0",
        reason="x",
    )
    lose_the_answer(books, drop_answer())
    found = verify(books.ledger, books.gateway)
    assert [one.difference for one in found.differences] == [-1]
    assert "may have been cancelled: run-1. Where that" in found.advice
    assert acts.write_off(books.ledger, "run-1", reason="Stripe has one less") == 1
    assert books.told() == ["cancel asked run-1", "cancelled run-1"]
    assert (books.states(), verify(books.ledger, books.gateway).advice) == (
        {"run-0": "delivered", "run-1": "written_off"},
        "",
    )


@pytest.mark.parametrize("fault", [refuse(403, message="may not"), refuse(429)])
def test_what_stripe_surely_did_not_cancel_is_not_taken_for_maybe_cancelled(books: Books, fault: Fault) -> None:
    books.deliver("run-1")
    books.sandbox.fail(fault, path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="did not cancel the meter event run-1"):
        take_back(books, "run-1")
    assert books.told() == ["cancel asked run-1", "cancel refused run-1"]
    books.sandbox.advance(hours=25)
    with pytest.raises(IllegalMoveError, match="24 hours"):
        take_back(books, "run-1")
    refused(books, IllegalMoveError, "run-1 is delivered", acts.write_off, "run-1", reason="x")


def test_a_clock_that_was_ahead_when_it_was_delivered_keeps_no_cancelling_open(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.fail(drop_answer(), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="unknown"):
        take_back(books, "run-1")
    with books.ledger.write() as connection:
        connection.execute(update(events).values(settled_at=books.ledger.now() + 20 * DAY))
    assert acts.write_off(books.ledger, "run-1", reason="Stripe has one less") == 1


def test_what_may_have_been_cancelled_is_not_pruned_before_a_person_has_looked(books: Books) -> None:
    lose_the_answer(books, drop_answer())
    books.sandbox.advance(days=41)
    prune(books.ledger, 40)
    assert "may have been cancelled: run-1" in verify(books.ledger, books.gateway).advice
    acts.write_off(books.ledger, "run-1", reason="Stripe has one less")
    assert (books.states(), verify(books.ledger, books.gateway).agrees) == ({"run-1": "written_off"}, True)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [({"account_id": "acct_1Other"}, "belongs to acct_1Other"), ({"api_key": "sk_live_1"}, "one for live mode")],
)
def test_with_a_key_of_another_account_or_mode_nothing_is_cancelled_and_nothing_concluded(
    books: Books, theirs: Any, said: str
) -> None:
    """There, no meter of the name is known: that says nothing of the event here."""
    books.deliver("run-1")
    before = books.snapshot()
    with StripeSandbox(**theirs) as other, closing(Gateway(other.api_key, api_base=other.url)) as key:
        with pytest.raises(ForeignLedgerError, match=said):
            cancel(books.ledger, key, "run-1")
        assert not any(request.path == ADJUSTMENTS for request in other.requests)
    assert books.snapshot() == before


@pytest.mark.parametrize("refuses", [False, True])
def test_what_stripe_rejects_while_it_is_being_cancelled_is_written_off(books: Books, refuses: bool) -> None:
    """The report overtakes Stripe's answer to the wish; whatever that is, nothing is billed, now or by a retry."""
    books.deliver("run-1")
    asked, go = threading.Event(), threading.Event()
    fault = replace(refuse(400, message="It is rejected."), until=go) if refuses else hang(go)
    books.sandbox.fail(fault, path=ADJUSTMENTS, where=lambda _: asked.set() is None)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(take_back, books, "run-1")
        assert asked.wait(60)
        (result,) = books.take(*books.sandbox.reject("run-1"))
        go.set()
        done.result(60)
    assert (result.status, result.rejected) == (200, ())
    assert (books.states(), sealing.retry(books.ledger)) == ({"run-1": "written_off"}, 0)
    assert books.told() == ["cancel asked run-1", "cancelled run-1"]
    take_back(books, "run-1")
    assert books.errors == []


def test_what_stripe_rejects_after_a_cancelling_of_which_nobody_knows_what_came_is_written_off(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.fail(drop_answer(), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match=r"unknown.*again"):
        take_back(books, "run-1")
    books.take(*books.sandbox.reject("run-1"))
    assert (books.states(), sealing.retry(books.ledger)) == ({"run-1": "written_off"}, 0)
    take_back(books, "run-1")


def test_what_stripe_rejects_after_it_refused_to_cancel_it_may_be_sent_again(books: Books) -> None:
    """Who was told of the refusal may have corrected the total instead, which counts on the event being billed."""
    books.deliver("run-1")
    for _ in range(2):
        books.sandbox.fail(refuse(400, message="It is on an invoice that is final."), path=ADJUSTMENTS)
        with pytest.raises(StripeError, match=r"run-1: .*invoice"):
            take_back(books, "run-1")
    assert books.told() == ["cancel asked run-1", "cancel refused run-1"] * 2
    books.take(*books.sandbox.reject("run-1"))
    assert (books.states(), sealing.retry(books.ledger)) == ({"run-1": "rejected"}, 1)
    books.deliver()
    assert (books.states(), books.billed()) == ({"run-1": "delivered"}, 1)


def test_cancelling_pins_the_ledger_to_nobodys_account(books: Books) -> None:
    """Where the key that delivers may not read its account, another's that may must not decide whose ledger it is."""
    narrow = {"meter_events:write", "meters:read"}
    books.sandbox.allow("rk_test_narrow", narrow)
    with closing(Gateway("rk_test_narrow", api_base=books.sandbox.url)) as key:
        courier = Courier(books.ledger, key)
        books.record("run-1")
        while books.states() != {"run-1": "delivered"}:
            courier.turn()
        courier.close(5)
    other = StripeSandbox(account_id="acct_1Other")
    with (
        other,
        closing(Gateway(other.api_key, api_base=other.url)) as key,
        pytest.raises(StripeError, match="did not cancel"),
    ):
        cancel(books.ledger, key, "run-1")
    assert books.ledger.note("account") is None
    take_back(books, "run-1")
    assert (books.states(), books.billed()) == ({"run-1": "written_off"}, 0)


def test_a_no_says_nothing_of_an_earlier_cancelling_of_which_nobody_knows_what_came(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.fail(drop_answer(), refuse(404, message="No active meter found"), path=ADJUSTMENTS)
    for words in ("unknown", r"run-1: .*No active meter.*An earlier try may have"):
        with pytest.raises(StripeError, match=words):
            take_back(books, "run-1")
    assert books.told() == ["cancel asked run-1"]
    take_back(books, "run-1")
    assert (books.states(), books.billed()) == ({"run-1": "written_off"}, 0)


def test_what_stripe_refused_to_cancel_is_as_certain_as_before(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.advance(hours=3)
    books.sandbox.fail(refuse(400, message="It is on an invoice that is final."), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="invoice"):
        take_back(books, "run-1")
    (compared,) = verify(books.ledger, books.gateway).comparisons
    assert (compared.at_least, compared.uncertain) == (1, 0)


def test_what_was_sent_again_while_stripe_answered_is_not_said_to_be_cancelled(books: Books) -> None:
    books.deliver("run-1")
    event = reversals.ask_to_cancel(books.ledger, "run-1")
    assert event is not None
    reversals.settle_cancel(books.ledger, event, "another's wish was refused")
    books.take(*books.sandbox.reject("run-1"))
    with pytest.raises(IllegalMoveError, match="run-1 was rejected while it was being cancelled"):
        reversals.settle_cancel(books.ledger, event, None)
    assert books.states() == {"run-1": "rejected"}


def test_what_is_too_old_for_stripe_is_refused_by_name(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.advance(seconds=DAY + 1)
    with pytest.raises(IllegalMoveError, match=r"run-1 .* 24 hours"):
        take_back(books, "run-1")
    assert (books.states(), books.told()) == ({"run-1": "delivered"}, [])


def test_stripes_own_refusal_is_told_and_written_down(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.fail(refuse(400, message="It is on an invoice that is final."), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match=r"run-1: .*invoice"):
        take_back(books, "run-1")
    assert books.states() == {"run-1": "delivered"}
    assert books.told() == ["cancel asked run-1", "cancel refused run-1"]


def test_a_refused_key_is_told_and_nothing_is_concluded(books: Books) -> None:
    books.deliver("run-1")
    books.sandbox.revoke(books.sandbox.api_key)
    with pytest.raises(StripeError, match="Expired API Key"):
        take_back(books, "run-1")
    books.sandbox.allow(books.sandbox.api_key)
    assert (books.states(), books.told()) == ({"run-1": "delivered"}, [])


def test_what_was_not_delivered_or_is_unknown_is_refused_by_name(books: Books) -> None:
    books.record("run-1")
    books.record("run-2", at=books.ledger.now() - 40 * DAY)
    books.courier.turn()
    refused(books, ConfigurationError, "nothing with the identifier 'nobody'", reversals.ask_to_cancel, "nobody")
    refused(books, IllegalMoveError, "run-2 is held", reversals.ask_to_cancel, "run-2")
    books.deliver()
    books.take(*books.sandbox.reject("run-1"))
    refused(books, IllegalMoveError, "run-1-r1 is rejected", reversals.ask_to_cancel, "run-1")
    assert not any(request.path == ADJUSTMENTS for request in books.sandbox.requests)


def test_one_reading_of_a_rolled_up_event_is_refused_and_the_event_itself_is_not(books: Books) -> None:
    courier = Courier(books.ledger, books.gateway, roll_up=60)
    books.record("run-1", "run-2", at=books.ledger.now() // 60 * 60 - 60)
    while views.status(books.ledger).pending:
        courier.turn()
    courier.close(5)
    (event,) = books.sandbox.events
    with pytest.raises(IllegalMoveError, match=f"one of 2 .*{event.identifier}"):
        take_back(books, "run-1")
    take_back(books, event.identifier)
    assert (set(books.states().values()), books.billed()) == ({"written_off"}, 0)


def test_an_event_that_got_a_new_identifier_is_cancelled_under_it(books: Books) -> None:
    books.deliver("run-1")
    books.take(*books.sandbox.reject("run-1"))
    sealing.retry(books.ledger)
    books.deliver()
    take_back(books, "run-1")
    assert [event.cancelled for event in books.sandbox.events] == [False, True]
    assert books.states() == {"run-1": "written_off"}


@pytest.mark.parametrize("words", ["has already been canceled", "was already cancelled"])
def test_stripe_may_say_that_it_is_cancelled_in_either_spelling(shop: Books, words: str) -> None:
    shop.sandbox.fail(refuse(400, message=f"This event {words}."), path=ADJUSTMENTS)
    assert ask_stripe(shop.gateway, "ai_tokens", "run-1", "").move == "accepted"


# -- correct


def test_a_correction_is_delivered_like_any_usage_and_once_for_its_id(books: Books) -> None:
    books.deliver("run-1", value=500)
    first = acts.correct(books.ledger, "cus_1", "ai_tokens", -120, reason="counted twice", id="ticket-9")
    again = acts.correct(books.ledger, "cus_1", "ai_tokens", Decimal(-120), reason="once more", id="ticket-9")
    books.deliver()
    assert (first == again, books.billed()) == (True, 380)
    assert (books.sandbox.events[-1].identifier, books.sandbox.events[-1].value) == (first, -120)
    assert books.told() == [f"corrected {first}"]
    assert acts.every_act(books.ledger)[0].detail == "ai_tokens of cus_1 by -120: counted twice"


def test_a_correction_is_of_the_time_that_it_is_given(books: Books) -> None:
    at = books.ledger.now() - 5 * DAY
    acts.correct(books.ledger, "cus_1", "ai_tokens", 7, reason="forgotten", id="a", at=at)
    books.deliver()
    assert books.sandbox.events[0].timestamp == at


def test_a_correction_on_a_connected_account_is_billed_there(books: Books) -> None:
    connected = books.sandbox.connect("acct_x")
    connected.create_meter("ai_tokens")
    connected.create_customer(id="cus_1")
    for account in ("", "acct_x"):
        acts.correct(books.ledger, "cus_1", "ai_tokens", 7, reason="forgotten", id="a", account=account)
    books.deliver()
    assert (books.billed(), connected.billed("ai_tokens", "cus_1")) == (7, 7)
    with books.ledger.deliver_lane().transaction() as connection:  # the invariant looks at the key's own account only
        connection.execute(delete(readings).where(readings.c.account == "acct_x"))
        connection.execute(delete(events).where(events.c.account == "acct_x"))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"value": -1}, ConfigurationError, "'a' stands for -5 of cus_1 on ai_tokens"),
        ({"customer": "cus_2"}, ConfigurationError, "'a' stands for"),
        ({"value": 0, "id": "b"}, InvalidValueError, "by 0"),
        ({"value": "1e400", "id": "b"}, InvalidValueError, "far beyond"),
        ({"value": float("nan"), "id": "b"}, InvalidValueError, "finite"),
        ({"value": True, "id": "b"}, InvalidValueError, "True"),
        ({"customer": "ann@example.com", "id": "b"}, InvalidValueError, "not a Stripe customer id"),
        ({"event_name": "", "id": "b"}, InvalidValueError, "event name"),
        ({"reason": " ", "id": "b"}, ConfigurationError, "reason="),
        ({"reason": "two\nlines", "id": "b"}, ConfigurationError, "reason="),
        ({"id": ""}, ConfigurationError, "id="),
        ({"at": 1, "id": "b"}, InvalidValueError, "35 days"),
    ],
)
def test_a_correction_that_cannot_be_is_refused_by_name(
    shop: Books, change: dict[str, Any], kind: type[Exception], words: str
) -> None:
    facts = {"customer": "cus_1", "event_name": "ai_tokens", "value": -5, "reason": "typo", "id": "a"}
    acts.correct(shop.ledger, **facts)  # type: ignore[arg-type]
    refused(shop, kind, words, acts.correct, **{**facts, **change})
    shop.deliver("usage", value=50)


# -- re-time, write off


def too_old(books: Books, *keys: str, **facts: Any) -> tuple[int, ...]:
    """Held readings of 40 days ago; their ids."""
    books.record(*keys, **{"at": books.ledger.now() - 40 * DAY, **facts})
    books.courier.turn()
    return tuple(number for group in views.held(books.ledger) for number in group.ids)


def test_usage_that_is_too_old_is_held_and_billed_under_a_new_time_when_a_person_says_so(books: Books) -> None:
    ids = too_old(books, "run-1", "run-2")
    assert set(books.states().values()) == {"held"}
    before = books.ledger.now()
    assert acts.retime(books.ledger, views.held(books.ledger)[0]) == 2
    books.deliver()
    assert (set(books.states().values()), books.billed(), len(ids)) == ({"delivered"}, 2, 2)
    assert all(event.timestamp >= before for event in books.sandbox.events)
    assert books.told() == ["re-timed run-1", "re-timed run-2"]
    tally("usage is older than 35 days", tried=2, needed_a_person=2)


def test_a_new_time_can_be_chosen(books: Books) -> None:
    ids, at = too_old(books, "run-1"), books.ledger.now() - 3 * DAY
    acts.retime(books.ledger, ids, at)
    books.deliver()
    assert books.sandbox.events[0].timestamp == at
    assert f"to {at}" in acts.every_act(books.ledger)[0].detail


def test_what_may_have_been_billed_before_a_restore_is_retimed_once_a_person_has_looked(books: Books) -> None:
    ids = too_old(books, "run-1", "run-2")
    epoch.restored(books.ledger)
    refused(books, IllegalMoveError, r"run-1\) .*backup", acts.retime, ids)
    assert acts.retime(books.ledger, ids, not_billed=True) == 2
    books.deliver()
    assert (set(books.states().values()), books.billed()) == ({"delivered"}, 2)


def test_what_cannot_be_retimed_is_refused_by_name_and_then_nothing_is(books: Books) -> None:
    (old,) = too_old(books, "old")
    nameless = too_old(books, "nameless", customer=None, state=ReadingState.HELD)[-1]
    young = too_old(books, "young", at=books.ledger.now(), state=ReadingState.HELD, reason="no such meter")[-1]
    books.deliver("sent")
    sent = young + 1
    refused(books, IllegalMoveError, "nameless.*lacks its customer", acts.retime, [old, nameless])
    refused(books, IllegalMoveError, r"young\) is not too old.*no such meter", acts.retime, [old, young])
    refused(books, IllegalMoveError, r"sent\) is sealed", acts.retime, [old, sent])
    refused(books, ConfigurationError, "no reading 999", acts.retime, [old, 999])
    refused(books, InvalidValueError, "34 days", acts.retime, [old], books.ledger.now() - 34 * DAY - 5)
    refused(books, InvalidValueError, "35 days", acts.retime, [old], 1)
    refused(books, InvalidValueError, "5 minutes", acts.retime, [old], books.ledger.now() + DAY)
    assert acts.retime(books.ledger, [old]) == 1


def test_what_is_not_held_cannot_be_assigned_and_then_nothing_is(books: Books) -> None:
    held = too_old(books, "held-1", "held-2")
    books.deliver("sent")
    sent = held[-1] + 1
    refused(
        books, IllegalMoveError, rf"reading {sent} \(sent\) is sealed, not held", acts.assign, [*held, sent], "cus_2"
    )
    refused(books, ConfigurationError, "no reading 999", acts.assign, [*held, 999], "cus_2")
    assert acts.assign(books.ledger, [*held, held[0]], "cus_2") == 2


def test_who_is_named_is_looked_up_once_a_person_says_how_much_it_was(books: Books) -> None:
    ann = books.sandbox.create_customer(email="ann@example.com")
    who: dict[str, Any] = {"customer": None, "reference": Reference("email", "ann@example.com")}
    why = {"state": ReadingState.HELD, "reason": "the provider reported no usage"}
    at = books.ledger.now()
    books.ledger.record([Entry(key, "ai_tokens", None, at, **who, **why) for key in ("run-1", "run-2", "run-3")])
    books.record("bob", **{**who, "reference": Reference("email", "bob@example.com")}, **why)
    assert acts.assign(books.ledger, [1, 4], value=7) == 1
    assert books.states() == {"run-1": "recorded", "run-2": "held", "run-3": "held", "bob": "held"}
    assert acts.assign(books.ledger, [2], "cus_1", 5) == 1
    books.deliver()
    assert (books.sandbox.billed("ai_tokens", ann), books.billed()) == (7, 5)
    assert [one.value for one in views.held(books.ledger)] == [None, 1]


on_held = pytest.mark.parametrize(
    "act",
    [
        lambda ledger, what: acts.assign(ledger, what, "cus_9"),
        lambda ledger, what: acts.retime(ledger, what),
        lambda ledger, what: acts.write_off(ledger, what, reason="goodwill"),
    ],
    ids=["assign", "retime", "write_off"],
)


@on_held
def test_held_readings_are_named_by_what_held_returns_or_by_their_ids(books: Books, act: Any) -> None:
    for number in range(6):
        too_old(books, f"{number}a", f"{number}b", customer=f"cus_{number}")
    one, two, three, four, five, six = views.held(books.ledger)
    ways = [one, [two], (three, *four.ids), five.ids[0], iter([*six.ids, *six.ids])]
    assert [act(books.ledger, way) for way in ways] == [2, 2, 4, 1, 2]
    assert act(books.ledger, views.held(books.ledger)) == 1
    assert act(books.ledger, views.held(books.ledger)) == 0


@on_held
@pytest.mark.parametrize("other", [None, 1.5, True, b"1", [[1]], views.status], ids=lambda one: type(one).__name__)
def test_what_names_nothing_held_is_refused_and_then_nothing_is_done(books: Books, act: Any, other: Any) -> None:
    ids = too_old(books, "a", "b")
    refused(books, ConfigurationError, r"held\(\).*, not \w+", act, other)
    refused(books, ConfigurationError, r"held\(\).*, not \w+", act, [*ids, other])


def test_identifiers_name_what_is_written_off_and_nothing_else(books: Books) -> None:
    ids = too_old(books, "a", "b")
    for act, arguments in ((acts.assign, ["cus_9"]), (acts.retime, [])):
        for what in ("a", ["1"], [*ids, "a"]):
            refused(books, ConfigurationError, r"held\(\).*, not str", act, what, *arguments)
    assert acts.write_off(books.ledger, [ids[0], "b"], reason="goodwill") == 2


def test_what_a_wrong_meter_held_is_looked_at_again_and_what_stripe_refused_when_it_is_due(books: Books) -> None:
    later = books.ledger.now() + 60
    why = {
        "meter": ("no such meter", later),
        "gone": ("HTTP 400: No such customer", later),
        "due": ("HTTP 400", later - 60),
    }
    why["decided"] = ("older than 34 days", None)
    too_old(books, *why, state=ReadingState.HELD)
    with books.ledger.deliver_lane().transaction() as connection:
        for key, (reason, due) in why.items():
            connection.execute(update(readings).where(readings.c.key == key).values(reason=reason, due=due))
    assert sealing.look_again(books.ledger) == 2
    assert books.states() == {"meter": "resolved", "gone": "held", "due": "resolved", "decided": "held"}


def test_a_retry_passes_over_what_is_too_old_and_holds_what_stripe_rejected_then(
    books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    held = too_old(books, "held")
    books.deliver("old", "young", at=books.ledger.now() - 20 * DAY, value=3)
    books.deliver("new")
    books.take(*books.sandbox.reject("old", "new"))
    books.sandbox.advance(days=15)
    assert sealing.retry(books.ledger) == 1
    assert books.states() == {"held": "held", "old": "held", "young": "delivered", "new": "pending"}
    assert "1 meter events are held: older than 34 days" in caplog.text
    assert {one.reason.partition(":")[0] for one in views.held(books.ledger)} == {"older than 34 days"}
    assert acts.retime(books.ledger, [*held, 2]) == 2
    books.deliver()
    assert set(books.states().values()) == {"delivered"}
    assert books.billed() == 8


def test_held_usage_is_shown_with_what_to_do_about_it(books: Books) -> None:
    assert "To do" not in views.held(books.ledger)._repr_html_()
    too_old(books, "held-1")
    shown = views.held(books.ledger)._repr_html_()
    assert shown.endswith("</p>")
    assert "account</th>" not in shown  # all of it is of the key's own
    for act in ("assign(", "retry(", "retime(", "write_off("):
        assert act in shown


def test_held_rejected_and_doubtful_usage_is_written_off_with_its_reason(books: Books) -> None:
    held = too_old(books, "held-1", "held-2")
    books.deliver("rejected", "doubtful")
    books.take(*books.sandbox.reject("rejected", "doubtful"))
    with books.ledger.deliver_lane().transaction() as connection:
        doubt = update(events).where(events.c.identifier == "doubtful-r1")
        connection.execute(doubt.values(state="doubtful", identifier="doubtful"))
    assert acts.write_off(books.ledger, [held[0], "held-2", "rejected", "doubtful"], reason="goodwill") == 4
    assert (set(books.states().values()), views.status(books.ledger).written_off) == ({"written_off"}, 4)
    assert [act for act in books.told() if act.startswith("written off")] == [
        "written off held-1", "written off held-2", "written off rejected-r1", "written off doubtful",
    ]  # fmt: skip
    assert sealing.retry(books.ledger) == 0
    books.deliver()
    assert books.billed() == 0


def test_a_group_and_a_single_name_can_be_written_off(books: Books) -> None:
    too_old(books, "a", "b")
    assert acts.write_off(books.ledger, views.held(books.ledger)[0], reason="goodwill") == 2
    too_old(books, "c")
    assert acts.write_off(books.ledger, "c", reason="goodwill") == 1


def test_writing_off_forgets_the_person_that_was_named(books: Books) -> None:
    books.record("run-1", state=ReadingState.RECORDED, customer=None, reference=Reference("email", "eve@example.com"))
    while books.states() != {"run-1": "held"}:
        books.courier.turn()
    assert "eve@example.com" in books.snapshot()
    acts.write_off(books.ledger, "run-1", reason="nobody")
    assert "eve@example.com" not in books.snapshot()


def test_what_cannot_be_written_off_is_refused_by_name_and_then_nothing_is(books: Books) -> None:
    (old,) = too_old(books, "old")
    books.deliver("sent")
    books.record("open")
    refused(books, IllegalMoveError, "sent is delivered", acts.write_off, [old, "sent"], reason="x")
    refused(books, IllegalMoveError, r"open\) is resolved", acts.write_off, [old, "open"], reason="x")
    refused(books, ConfigurationError, "no reading 999", acts.write_off, [old, 999], reason="x")
    refused(books, ConfigurationError, "identifier 'nobody'", acts.write_off, [old, "nobody"], reason="x")
    refused(books, ConfigurationError, "reason=", acts.write_off, [old], reason="")
    assert acts.write_off(books.ledger, [old], reason="x") == 1


# -- the handler and the command line


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """Books whose ledger and sandbox the commands find."""
    with Books(tmp_path) as books:
        for name, value in books.sandbox.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("STRIPE_METER_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
        books.courier.turn()
        yield books


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


def test_the_handler_does_all_of_it(shop: Books, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer="cus_1", stripe=shop.gateway.client, ledger=url, clock=shop.sandbox.now
    ) as handler:
        handler.record_usage({"input_tokens": 5}, id="job-1")
        shop.record("old-1", "old-2", at=shop.ledger.now() - 40 * DAY)
        assert handler.flush(60).held == 2
        handler.cancel(shop.sandbox.events[0].identifier)
        assert handler.correct("cus_1", "ai_tokens", 8, reason="forgotten", id="c")
        (held,) = handler.held()
        assert handler.write_off([held.ids[0]], reason="goodwill") == 1
        assert handler.retime(held.ids[1:]) == 1
        assert handler.flush(60).pending == 0
        assert [act.act for act in handler.acts()] == [
            "cancel asked", "cancelled", "corrected", "written off", "re-timed",
        ]  # fmt: skip
        assert "goodwill" in handler.acts()._repr_html_()
    assert shop.billed() == 9


def test_the_commands_do_all_of_it(shop: Books) -> None:
    assert "Nothing was decided" in call("acts").stdout
    shop.deliver("run-1", value=5)
    too_old(shop, "old-1", "old-2", "old-3")
    assert as_json("cancel", "run-1")["cancelled"] is True
    assert "is cancelled" in call("cancel", "run-1").stdout
    made = as_json("correct", "cus_1", "ai_tokens", "-2", "--reason", "typo", "--id", "c")["identifier"]
    assert call("correct", "cus_1", "ai_tokens", "6", "--reason", "typo", "--id", "d").exit_code == 0
    ids = as_json("held")[0]["ids"]
    assert as_json("write-off", str(ids[0]), "old-2", "--reason", "goodwill") == {"written_off": 2}
    assert as_json("retime", str(ids[2])) == {"moved": 1}
    assert [(act["act"], act["subject"]) for act in as_json("acts")][1:3] == [
        ("cancelled", "run-1"),
        ("corrected", made),
    ]
    assert "goodwill" in call("acts").stdout
    call("deliver", "--once")
    assert shop.billed() == 5


def test_the_handler_and_the_command_take_a_persons_word_for_what_comes_from_a_backup(
    shop: Books, tmp_path: Path
) -> None:
    ids = too_old(shop, "old-1", "old-2")
    epoch.restored(shop.ledger)
    assert "--not-billed" in " ".join(call("retime", "1-2", code=2).output.split())
    assert as_json("retime", "1", "--not-billed") == {"moved": 1}
    with StripeMeterCallbackHandler(Tokens("t"), ledger=f"sqlite:///{tmp_path}/ledger.db", deliver=False) as handler:
        with pytest.raises(IllegalMoveError, match="not_billed=True"):
            handler.retime(ids[1:])
        assert handler.retime(ids[1:], not_billed=True) == 1
    assert set(shop.states().values()) == {"resolved"}


def test_the_commands_refuse_by_name(shop: Books) -> None:
    assert "'nobody'" in call("cancel", "nobody", code=2).output
    assert "no reading 7" in call("retime", "7", code=2).output
    assert "no reading 7" in call("write-off", "7-8", "--reason", "x", code=2).output
    assert "customer id" in call("correct", "bob", "ai_tokens", "1", "--reason", "x", "--id", "y", code=2).output
