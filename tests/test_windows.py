"""What Stripe's error reports do not name: found by its sums, once two looks at them saw the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from auditing import Books
from faults import settled
from sqlalchemy import update

from langchain_stripe_meter.audit.windows import Windows
from langchain_stripe_meter.core.doubts import LOOK_AGAIN, SUMS_LAG
from langchain_stripe_meter.delivery.courier import CHORES_SECONDS, Courier
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import reversals, sealing
from langchain_stripe_meter.ledger.schema import events
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.operations import cancel
from langchain_stripe_meter.sandbox import drop_answer, refuse, server_error

ADJUSTMENTS = "/v1/billing/meter_event_adjustments"


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    url: Any = tmp_path if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with Books(url) as books:
        yield books


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Books]:
    with Books(tmp_path) as books:
        yield books


def look_twice(books: Books) -> None:
    """Until Stripe's sums have been looked at twice, with the time in between that makes two looks of them."""
    for seconds in (SUMS_LAG, LOOK_AGAIN):
        books.sandbox.advance(seconds=seconds)
        books.do_chores()


def test_one_sample_of_fifty_and_nothing_at_stripe_rejects_all_fifty_once_its_sums_can_be_trusted(
    books: Books,
) -> None:
    books.sandbox.error_samples = 1
    keys = [f"run-{number}" for number in range(50)]
    minute = books.ledger.now() // 60 * 60 - 600
    for key in keys[:25]:
        books.record(key, at=minute)
    for number, key in enumerate(keys[25:]):
        books.record(key, at=minute - 60 * number, customer=f"cus_{number % 3 + 1}")
    books.deliver()
    books.deliver("other", at=minute, customer="cus_4")
    (result,) = books.take(*books.sandbox.reject(*keys))
    assert len(result.rejected) == 1
    for seconds in (0, SUMS_LAG - 120, 120):  # too early twice, and one look
        books.sandbox.advance(seconds=seconds)
        books.do_chores()
        books.do_chores()
        assert list(books.states().values()).count("rejected") == 1
    books.sandbox.advance(seconds=LOOK_AGAIN)
    books.do_chores()
    states = books.states()
    assert {state for key, state in states.items() if key != "other"} == {"rejected"}
    assert (states["other"], "window:" in books.snapshot()) == ("delivered", False)
    sealing.retry(books.ledger)
    books.deliver()
    assert set(books.states().values()) == {"delivered"}
    assert sum(event.billed for event in books.sandbox.events) == 51
    settled(books.ledger, books.sandbox, fault="Stripe rejects 50 events after it took them, and names one", tried=50)


def test_an_event_that_stripe_would_not_cancel_is_found_among_the_rejected(books: Books) -> None:
    """That somebody wished to cancel it explains nothing any more."""
    books.sandbox.error_samples = 1
    books.deliver("run-1")
    books.deliver("run-2", at=books.ledger.now() - 300)
    books.sandbox.fail(refuse(400, message="It is on an invoice that is final."), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="invoice"):
        cancel(books.ledger, books.gateway, "run-2")
    books.take(*books.sandbox.reject("run-1", "run-2"))
    look_twice(books)
    assert books.states() == {"run-1": "rejected", "run-2": "rejected"}


@pytest.mark.parametrize(("lag", "ahead"), [(60, 0), (3600, 0), (SUMS_LAG, 0), (60, 3600), (3600, 3600)])
def test_what_stripes_sums_do_not_show_yet_is_not_rejected_for_another_customers_error(
    small: Books, lag: int, ahead: int
) -> None:
    """Sums that lag, looked at by a courier whose clock is ahead: together they are what the wait is for."""
    small.sandbox.customer_check, small.sandbox.error_samples = "async", 0
    small.record("good", value=10)
    small.record("bad", value=7, customer="cus_gone")
    small.deliver()
    small.take(*small.sandbox.rejections)
    small.sandbox.summary_lag = lag
    other = Ledger(str(small.ledger.database.url), clock=lambda: small.ledger.now() + ahead)
    windows = Windows(other, small.gateway)
    for _ in range(20):
        windows.chore(other.now())
        small.sandbox.advance(seconds=LOOK_AGAIN)
    other.close()
    assert small.states() == {"good": "delivered", "bad": "rejected"}


def test_two_looks_that_saw_different_sums_decide_nothing(small: Books) -> None:
    small.sandbox.error_samples = 1
    small.deliver("run-1", "run-2")
    small.deliver("late", customer="cus_2")
    small.take(*small.sandbox.reject("run-1", "run-2"))
    small.sandbox.summary_lag = 86_400
    small.sandbox.advance(seconds=SUMS_LAG)
    small.do_chores()
    small.sandbox.summary_lag = 0
    small.sandbox.advance(seconds=LOOK_AGAIN)
    small.do_chores()
    assert small.states() == {"run-1": "rejected", "run-2": "delivered", "late": "delivered"}
    small.sandbox.advance(seconds=LOOK_AGAIN)
    small.do_chores()
    assert small.states() == {"run-1": "rejected", "run-2": "rejected", "late": "delivered"}


def test_a_part_of_a_minute_is_told_by_name_and_never_guessed(books: Books) -> None:
    books.sandbox.error_samples = 1
    minute = books.ledger.now() // 60 * 60 - 600
    books.deliver(*(f"run-{number}" for number in range(50)), at=minute)
    (result,) = books.take(*books.sandbox.reject(*(f"run-{number}" for number in range(10))))
    assert result.rejected == ("run-0",)
    look_twice(books)
    told = str(books.errors[-1])
    assert "cus_1 on ai_tokens" in told
    assert "delivered 49, Stripe has 40" in told
    assert "correct()" in told
    assert books.told()[-1].startswith("unexplained run-")
    assert list(books.states().values()).count("delivered") == 49
    before = books.snapshot()
    books.do_chores()
    assert books.snapshot() == before
    for number in range(1, 10):  # what the person finds out, here from later samples
        books.take(*books.sandbox.reject(f"run-{number}"))
    assert list(books.states().values()).count("delivered") == 40


def rejected(books: Books) -> list[str]:
    return sorted(key for key, state in books.states().items() if state == "rejected")


def test_values_of_both_signs_prove_nothing_at_a_sum_of_zero(small: Books) -> None:
    small.sandbox.error_samples = 1
    minute = small.ledger.now() // 60 * 60 - 600
    small.deliver("first", at=minute - 60)
    for key, value in (("a", 5), ("b", -5), ("c", 3)):
        small.deliver(key, value=value, at=minute)
    others = [f"other-{number}" for number in range(5)]
    small.deliver(*others, customer="cus_2")
    small.take(*small.sandbox.reject("first", "c", *others))
    look_twice(small)
    assert rejected(small) == ["first", *others]
    assert [told for told in small.told() if told.startswith("unexplained")] == ["unexplained a"]
    small.take(*small.sandbox.reject("c"))


def test_unnamed_refusals_of_both_signs_do_not_hide_each_other(books: Books) -> None:
    """In another minute each, which may be another day, or month."""
    books.sandbox.error_samples = 0
    minute = books.ledger.now() // 60 * 60
    books.deliver("more", value=5, at=minute - 60)
    books.deliver("less", value=-5, at=minute)
    books.deliver("stays", at=minute - 120)
    books.take(*books.sandbox.reject("more", "less"))
    look_twice(books)
    assert rejected(books) == ["less", "more"]


def test_two_reports_of_one_minute_are_believed_together(books: Books) -> None:
    books.sandbox.error_samples = 0
    books.deliver("a", "b", at=books.ledger.now() // 60 * 60)
    for key in ("a", "b"):
        (result,) = books.take(*books.sandbox.reject(key))
        assert result.ok
    look_twice(books)
    assert rejected(books) == ["a", "b"]
    look_twice(books)  # the other report's own looks
    assert ("window:" in books.snapshot(), len(books.errors)) == (False, 1)


@pytest.mark.parametrize("customers", [("cus_1", "cus_1"), ("cus_1", "cus_2")], ids=["one customer", "two customers"])
def test_no_more_is_rejected_than_stripe_says_it_refused(small: Books, customers: tuple[str, str]) -> None:
    """Two events are not in Stripe's sums, but it reported one more than it named: the sums may lag."""
    small.sandbox.error_samples = 1
    small.deliver("a", at=small.ledger.now() - 600)
    for key, customer in zip(("b", "c"), customers, strict=True):
        small.deliver(key, customer=customer)
    (rejection,) = small.sandbox.reject("a", "b")
    small.take(rejection)
    small.sandbox.summary_lag = 86_400
    look_twice(small)
    assert (rejected(small), "window:" in small.snapshot()) == (["a"], False)
    assert "Stripe has 0" in str(small.errors[-1])
    small.take(*small.sandbox.reject("b"))


def test_a_customer_that_stripe_never_knew_has_nothing_there(small: Books) -> None:
    small.sandbox.customer_check, small.sandbox.error_samples = "async", 1
    small.deliver("run-1", "run-2", customer="cus_x")
    small.take(*small.sandbox.reject("run-1", "run-2"))
    look_twice(small)
    assert rejected(small) == ["run-1", "run-2"]


def test_what_stripe_still_bills_on_an_archived_meter_of_the_same_name_is_left_alone(small: Books) -> None:
    small.sandbox.error_samples = 1
    small.deliver("run-1", "run-2", "run-3")
    small.sandbox.deactivate_meter("ai_tokens")
    small.sandbox.create_meter("ai_tokens")
    small.take(*small.sandbox.reject("run-1", "run-2"))
    look_twice(small)
    assert rejected(small) == ["run-1"]
    assert "delivered 2, Stripe has 1" in str(small.errors[-1])
    small.take(*small.sandbox.reject("run-2"))


def test_an_event_that_is_being_cancelled_counts_as_uncertain(small: Books) -> None:
    small.sandbox.error_samples = 1
    small.deliver("run-1")
    small.deliver("run-2", at=small.ledger.now() - 300)
    reversals.ask_to_cancel(small.ledger, "run-2")  # and nobody knows what came of it
    small.sandbox.reject("run-2")
    small.take(*small.sandbox.reject("run-1", "run-2"))
    look_twice(small)
    assert small.states() == {"run-1": "rejected", "run-2": "delivered"}
    small.take(small.sandbox.rejections[0])


def test_until_stripes_sums_have_lost_what_was_cancelled_they_prove_nothing(books: Books) -> None:
    books.sandbox.error_samples = 0
    minute = books.ledger.now() // 60 * 60
    books.deliver("run-1", "run-2", at=minute)
    books.take(*books.sandbox.reject("run-2"))
    books.sandbox.summary_lag = 3600
    books.sandbox.advance(seconds=SUMS_LAG - 120)
    cancel(books.ledger, books.gateway, "run-1")  # the sum is as if Stripe had refused nothing, until it settles
    books.sandbox.advance(seconds=120)
    for _ in range(2):
        books.do_chores()
        books.sandbox.advance(seconds=LOOK_AGAIN)
    assert (rejected(books), "window:" in books.snapshot()) == ([], True)
    look_twice(books)
    assert (rejected(books), "window:" in books.snapshot()) == (["run-2"], False)


def test_usage_of_the_same_minute_that_is_delivered_late_hides_no_refusal(books: Books) -> None:
    books.sandbox.error_samples = 0
    minute = books.ledger.now() // 60 * 60
    books.deliver("run-1", value=5, at=minute)
    books.take(*books.sandbox.reject("run-1"))
    books.sandbox.advance(seconds=SUMS_LAG - 600)
    books.deliver("run-2", value=5, at=minute)  # from the backlog of another process
    books.sandbox.advance(seconds=600)
    for _ in range(2):
        books.do_chores()
        books.sandbox.advance(seconds=LOOK_AGAIN)
    assert (books.errors, "window:" in books.snapshot()) == ([], True)
    look_twice(books)
    assert "delivered 10, Stripe has 5" in str(books.errors[-1])
    books.sandbox.error_samples = 1
    books.take(*books.sandbox.reject("run-1"))


def test_while_an_events_own_answer_is_awaited_no_look_decides(books: Books) -> None:
    """Its answer was lost, Stripe refused it later, without its name, and then answers nothing for an hour."""
    books.sandbox.error_samples = 0
    books.deliver("other", customer="cus_2")
    books.sandbox.fail(drop_answer())
    books.record("run-1", value=500)
    while len(books.sandbox.events) == 1 or books.courier.in_flight:
        books.courier.turn()
    books.take(*books.sandbox.reject("run-1"))
    books.sandbox.fail(refuse(503), times=None)
    for _ in range(240):
        books.do_chores()
    assert "window:" in books.snapshot()
    books.sandbox.clear_faults()
    books.deliver()
    look_twice(books)
    assert (rejected(books), "window:" in books.snapshot()) == (["run-1"], False)


def test_what_is_in_doubt_is_not_waited_for(small: Books) -> None:
    small.sandbox.error_samples = 0
    small.deliver("run-1", "run-2", at=small.ledger.now() // 60 * 60)
    with small.ledger.write() as connection:
        doubtful = update(events).where(events.c.identifier == "run-2").values(state="doubtful")
        connection.execute(doubtful.values(first_unknown_at=events.c.sent_at))
    small.take(*small.sandbox.reject("run-1", "run-2"))
    look_twice(small)
    assert small.states() == {"run-1": "rejected", "run-2": "doubtful"}


class _Asking(Gateway):
    """The real gateway; something happens while it waits for the first sum."""

    def __init__(self, real: Gateway, meanwhile: Callable[[], None]) -> None:
        super().__init__(real.client)
        self._meanwhile = [meanwhile]

    def billed(self, *arguments: Any) -> Decimal | None:
        while self._meanwhile:
            self._meanwhile.pop()()
        return super().billed(*arguments)


def test_what_is_delivered_while_stripe_is_asked_makes_the_look_void(small: Books) -> None:
    """Another customer's difference is there to be looked at a second time; this one's must be, too."""
    small.sandbox.error_samples = 0
    minute = small.ledger.now() // 60 * 60
    small.deliver("run-1", value=5, at=minute)
    small.deliver("other", customer="cus_2")
    small.take(*small.sandbox.reject("run-1", "other"))
    small.sandbox.advance(seconds=SUMS_LAG)

    def meanwhile() -> None:
        small.record("run-2", value=5, at=minute)
        courier = Courier(small.ledger, small.gateway)
        while small.states()["run-2"] != "delivered":
            courier.turn()

    Windows(small.ledger, _Asking(small.gateway, meanwhile)).chore(small.ledger.now())
    for seconds in (LOOK_AGAIN, SUMS_LAG, LOOK_AGAIN):
        small.sandbox.advance(seconds=seconds)
        small.do_chores()
    assert "delivered 10, Stripe has 5" in str(small.errors[-1])
    assert rejected(small) == ["other"]
    small.sandbox.error_samples = 1
    small.take(*small.sandbox.reject("run-1"))


def test_while_stripe_does_not_answer_a_window_stays_open(small: Books) -> None:
    small.sandbox.error_samples = 1
    small.deliver("run-1", "run-2")
    small.take(*small.sandbox.reject("run-1", "run-2"))
    small.sandbox.fail(server_error(), path="/v1/billing/meters/*/event_summaries")
    look_twice(small)
    assert rejected(small) == ["run-1"]
    small.sandbox.advance(seconds=LOOK_AGAIN)
    small.do_chores()
    assert rejected(small) == ["run-1", "run-2"]


def test_many_customers_are_looked_at_in_portions(small: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second time only those of whom Stripe had another sum."""
    monkeypatch.setattr("langchain_stripe_meter.audit.windows.CUSTOMERS_AT_ONCE", 1)
    small.sandbox.error_samples = 1
    keys = [f"run-{number}" for number in range(1, 5)]
    for number, key in enumerate(keys, 1):
        small.deliver(key, customer=f"cus_{number}")
    small.take(*small.sandbox.reject("run-1", "run-2", "run-4"))
    small.sandbox.advance(seconds=SUMS_LAG)
    before = len(small.sandbox.requests)
    for _ in range(LOOK_AGAIN // CHORES_SECONDS + 10):
        small.do_chores()
    assert rejected(small) == ["run-1", "run-2", "run-4"]
    asked = [request for request in small.sandbox.requests[before:] if request.path.endswith("event_summaries")]
    assert [request.params["customer"] for request in asked] == ["cus_2", "cus_3", "cus_4", "cus_2", "cus_4"]


def test_what_was_sent_again_while_stripe_still_knew_it_is_looked_for_where_a_report_does_not_name_it(
    books: Books,
) -> None:
    books.sandbox.error_samples = 0
    rejection = books.reject_before_it_is_sent_again("run-1")
    books.take(rejection)
    look_twice(books)
    assert books.states() == {"run-1": "rejected"}
