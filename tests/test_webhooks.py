"""Stripe's asynchronous rejections: what it took and refused later is rejected, found, and sent again exactly once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from auditing import ERROR_REPORT, Books
from conftest import assert_invariant
from faults import settled
from sqlalchemy import select, update

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.audit.verify import verify
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import acts, epoch, reports, sealing, views
from langchain_stripe_meter.ledger.doubts import settle_doubt
from langchain_stripe_meter.ledger.schema import events, readings, webhook_events
from langchain_stripe_meter.sandbox import Rejection, drop_answer, refuse, server_error


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    url: Any = tmp_path if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with Books(url) as books:
        yield books


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Books]:
    with Books(tmp_path) as books:
        yield books


# -- what a report names


def lose_an_answer_about(books: Books, key: str) -> Rejection:
    """Stripe takes it, the answer is lost, and Stripe refuses it later."""
    before = len(books.sandbox.events)
    books.sandbox.fail(drop_answer())
    books.record(key)
    while len(books.sandbox.events) == before or books.courier.in_flight:
        books.courier.turn()
    (rejection,) = books.sandbox.reject(key)
    return rejection


def test_what_stripes_sums_showed_after_a_report_is_not_rejected_by_it(books: Books) -> None:
    """It was sent again meanwhile, and billed, and then the ledger was restored: the report still waits."""
    books.take(lose_an_answer_about(books, "run-1"))
    with books.sandbox.outage():
        books.sandbox.advance(hours=24)
        books.courier.turn()
    assert books.states() == {"run-1": "doubtful"}
    event = {"event_name": "ai_tokens", "identifier": "run-1-again", "timestamp": books.ledger.now() - 86_400}
    stripe: Any = books.gateway.client
    stripe.v1.billing.meter_events.create({**event, "payload": {"stripe_customer_id": "cus_1", "value": "1"}})
    for _ in range(300):
        books.do_chores()
    assert books.states() == {"run-1": "delivered"}
    assert "sent again later: run-1" in str(books.errors[-1])


@pytest.mark.parametrize("as_it_stands", ["sealed", "resolved", "on the own account", "held", "skipped"])
def test_a_report_about_what_a_restored_ledger_has_not_sent_yet_waits(books: Books, as_it_stands: str) -> None:
    """Stripe had it, and refused it, after the backup was made."""
    books.deliver("run-0")
    facts: dict[str, dict[str, Any]] = {
        "on the own account": {"account": books.sandbox.account_id},
        "held": {"state": ReadingState.HELD},
        "skipped": {"state": ReadingState.SKIPPED, "customer": None, "session": "s1", "reads": ("email",)},
    }
    books.record("run-1", value=500, **facts.get(as_it_stands, {}))
    if as_it_stands == "sealed":
        with books.ledger.write() as connection:
            sealing.seal(connection, books.ledger.now())
    with books.ledger.read() as connection:
        (row,) = connection.execute(select(readings).where(readings.c.key == "run-1")).mappings().all()
    stripe: Any = books.gateway.client
    event = {"event_name": "ai_tokens", "identifier": "run-1", "timestamp": row["at"]}
    stripe.v1.billing.meter_events.create({**event, "payload": {"stripe_customer_id": "cus_1", "value": "500"}})
    epoch.restored(books.ledger)
    (result,) = books.take(*books.sandbox.reject("run-1"))
    assert (result.rejected, result.unknown) == ((), 0)
    if as_it_stands == "held":
        acts.assign(books.ledger, [row["id"]], "cus_1")
    if as_it_stands == "skipped":  # as when its lead is captured
        claimed = {"state": ReadingState.RESOLVED.value, "customer": "cus_1", "session": None, "reads": None}
        with books.ledger.write() as connection:
            connection.execute(update(readings).where(readings.c.key == "run-1").values(**claimed))
    books.deliver()
    for _ in range(3):
        books.do_chores()
    assert books.states() == {"run-0": "delivered", "run-1": "rejected"}
    sealing.retry(books.ledger)
    books.deliver()
    assert (books.states(), books.billed()) == ({"run-0": "delivered", "run-1": "delivered"}, 501)


def test_a_report_names_why_stripe_knew_what_it_lacked_so_nobody_need_be_asked(books: Books) -> None:
    """It took it, its answer was lost, and it refused it later; a day after, it was found absent, and sent again."""
    books.take(lose_an_answer_about(books, "run-1"))
    with books.sandbox.outage():
        books.sandbox.advance(hours=23, seconds=300)
        books.courier.turn()
    assert books.states() == {"run-1": "doubtful"}
    settle_doubt(books.ledger, ["run-1"], delivered=False)
    for _ in range(3):
        books.do_chores()
    assert books.states() == {"run-1": "rejected"}
    assert "Stripe rejected 1 meter events" in str(books.errors[-1])
    sealing.retry(books.ledger)
    books.deliver()
    assert (books.states(), books.billed()) == ({"run-1": "delivered"}, 1)


def test_usage_on_the_keys_own_account_is_found_also_where_that_was_named(books: Books) -> None:
    """``stripe_account=`` may name it; Stripe's reports and sums of the own account name none."""
    books.deliver("run-1", "run-2", account=books.sandbox.account_id)
    books.deliver("run-3")
    (result,) = books.take(*books.sandbox.reject("run-1"))
    assert (result.rejected, result.unknown) == (("run-1",), 0)
    sealing.retry(books.ledger)
    books.deliver()
    books.sandbox.advance(hours=3)
    found = verify(books.ledger, books.gateway)
    assert [(one.account, one.delivered, one.at_stripe, one.difference) for one in found.comparisons] == [("", 3, 3, 0)]


def test_where_the_key_may_not_read_its_account_its_reports_are_of_whatever_account_was_named(small: Books) -> None:
    """Which one is its own cannot be known; what they name is this ledger's all the same."""
    small.sandbox.fail(refuse(403, message="may not"), path="/v1/account", times=None)
    small.deliver("run-1", account=small.sandbox.account_id)
    (result,) = small.take(*small.sandbox.reject("run-1"))
    assert (small.ledger.note("account"), result.rejected, result.unknown) == (None, ("run-1",), 0)


@pytest.mark.parametrize("shape", ["identifier", "idempotency_key", "request"])
def test_a_named_event_is_rejected_and_sent_again_under_an_identifier_that_stripe_has_not_seen(
    books: Books, shape: Any
) -> None:
    books.sandbox.sample_shape = shape
    books.deliver("run-1", "run-2", value=5)
    (result,) = books.take(*books.sandbox.reject("run-1", code="meter_event_invalid_value"))
    assert (result.status, result.rejected, result.unknown) == (200, ("run-1",), 0)
    assert books.states() == {"run-1": "rejected", "run-2": "delivered"}
    assert books.told() == ["rejected later run-1"]
    assert acts.every_act(books.ledger)[0].detail == "meter_event_invalid_value; it is now run-1-r1"
    assert [str(error)[:50] for error in books.errors] == ["Stripe rejected 1 meter events after it took them "]
    assert sealing.retry(books.ledger) == 1
    books.deliver()
    assert books.states() == {"run-1": "delivered", "run-2": "delivered"}
    assert [event.identifier for event in books.sandbox.events if event.billed] == ["run-2", "run-1-r1"]
    assert books.billed() == 10


def test_what_is_rejected_again_gets_one_more_identifier(small: Books) -> None:
    small.deliver("run-1")
    for identifier in ("run-1", "run-1-r1", "run-1-r2"):
        small.take(*small.sandbox.reject(identifier))
        sealing.retry(small.ledger)
        small.deliver()
    assert [event.identifier for event in small.sandbox.events if event.billed] == ["run-1-r3"]


def test_a_new_identifier_keeps_to_100_characters_and_meets_no_other(small: Books) -> None:
    long = "x" * 99
    small.deliver(f"{long}a", f"{long}b", f"{'x' * 97}-r1")
    result = small.take(*small.sandbox.reject(f"{long}a", f"{long}b"))[0]
    assert len(result.rejected) == 2
    with small.ledger.read() as connection:
        names = connection.execute(select(events.c.identifier).order_by(events.c.id)).scalars().all()
    assert set(names) == {f"{'x' * 97}-r{number}" for number in (1, 2, 3)}


def test_a_report_of_no_meter_rejects_too_and_the_meters_are_looked_at_again(books: Books) -> None:
    books.deliver("run-1")
    assert books.gateway.meter("ai_tokens").status == "active"  # type: ignore[union-attr]
    books.sandbox.deactivate_meter("ai_tokens")
    books.take(*books.sandbox.reject("run-1", code="archived_meter"))
    assert books.gateway.meter("ai_tokens").status == "inactive"  # type: ignore[union-attr]
    assert books.states() == {"run-1": "rejected"}


def test_an_event_without_a_meter_is_reported_without_one(small: Books) -> None:
    """Stripe's stream takes what has no meter; we send such a thing only if it is deleted in between."""
    small.deliver("run-1")
    (rejection,) = small.sandbox.reject("run-1", code="no_meter")
    body = {**rejection.notification(), "type": "v1.billing.meter.no_meter_found"}
    del body["related_object"]
    raw = json.dumps(body).encode()
    result = small.webhooks.handle(raw, small.sign(raw))
    assert (result.status, result.rejected) == (200, ("run-1",))


def test_what_stripe_reports_as_a_duplicate_is_not_refused(small: Books) -> None:
    small.sandbox.error_samples = 1
    small.deliver("run-1", "run-2")
    (result,) = small.take(*small.sandbox.reject("run-1", "run-2", code="duplicate_meter_event"))
    assert (result.rejected, small.states()) == ((), {"run-1": "delivered", "run-2": "delivered"})
    assert "window:" not in small.snapshot()
    small.sandbox.error_samples = 2
    small.take(*small.sandbox.reject("run-1", "run-2"))  # the sandbox bills neither


def test_samples_that_are_not_this_ledgers_are_counted_and_change_nothing(small: Books) -> None:
    small.deliver("run-1")
    client: Any = small.gateway.client
    params = {"event_name": "ai_tokens", "identifier": "alien",
              "payload": {"stripe_customer_id": "cus_2", "value": "1"}}  # fmt: skip
    client.v1.billing.meter_events.create(params)
    (result,) = small.take(*small.sandbox.reject("alien"))
    assert (result.status, result.rejected, result.unknown) == (200, (), 1)
    assert small.states() == {"run-1": "delivered"}


def test_a_report_that_overtakes_the_events_own_answer_waits_for_it(books: Books) -> None:
    """The answer was lost, so the event goes out again, is a duplicate, and only then is known to be delivered."""
    books.sandbox.fail(drop_answer())
    books.record("run-1")
    while not books.sandbox.events or books.courier.in_flight:
        books.courier.turn()
    assert books.states() == {"run-1": "pending"}
    (result,) = books.take(*books.sandbox.reject("run-1"))
    assert (result.rejected, books.states()) == ((), {"run-1": "pending"})
    books.deliver()
    books.do_chores()
    assert books.states() == {"run-1": "rejected"}
    assert "window:" not in books.snapshot()
    books.sandbox.advance(days=2)  # nothing is unknown of the new identifier, however long ago the old one was
    sealing.retry(books.ledger)
    books.deliver()
    assert (books.states(), books.billed()) == ({"run-1": "delivered"}, 1)


def test_a_report_of_what_was_sent_again_while_stripe_still_knew_it_is_about_all_its_sends(books: Books) -> None:
    """The answer was lost, and Stripe was away for a while: what it then answered as a duplicate is what it names."""
    rejection = books.reject_before_it_is_sent_again("run-1")
    (result,) = books.take(rejection)
    assert (result.rejected, books.states()) == (("run-1",), {"run-1": "rejected"})
    sealing.retry(books.ledger)
    books.deliver()
    assert (books.states(), books.billed()) == ({"run-1": "delivered"}, 1)


def test_a_report_from_before_the_event_was_sent_again_is_told_and_changes_nothing(small: Books) -> None:
    """Sent again under its own identifier after a day in doubt: what is billed now is not what the report is about."""
    small.sandbox.fail(drop_answer())
    small.record("run-1")
    while not small.sandbox.events or small.courier.in_flight:
        small.courier.turn()
    (rejection,) = small.sandbox.reject("run-1")
    small.sandbox.advance(hours=30)
    with small.ledger.deliver_lane().transaction() as connection:  # as who compared with Stripe's sums decides
        connection.execute(update(events).values(first_unknown_at=None))
    small.deliver()
    (result,) = small.take(rejection)
    assert (result.rejected, small.states(), small.billed()) == ((), {"run-1": "delivered"}, 1)
    assert "sent again later: run-1" in str(small.errors[-1])
    assert "bill it with correct()" in str(small.errors[-1])


def test_a_report_of_a_connected_accounts_event_rejects_there_only(small: Books) -> None:
    connected = small.sandbox.connect("acct_x")
    connected.create_meter("ai_tokens")
    connected.create_customer(id="cus_1")
    small.deliver("run-1")
    client: Any = small.gateway.client
    params = {"event_name": "ai_tokens", "identifier": "run-1",
              "payload": {"stripe_customer_id": "cus_1", "value": "1"}}  # fmt: skip
    client.v1.billing.meter_events.create(params, {"stripe_account": "acct_x"})
    (result,) = small.take(*connected.reject("run-1"))
    assert (result.unknown, small.states()) == (1, {"run-1": "delivered"})


# -- once


def test_a_repeated_notification_changes_nothing_even_after_the_event_was_sent_again(books: Books) -> None:
    books.deliver("run-1")
    rejections = books.sandbox.reject("run-1")
    books.take(*rejections)
    sealing.retry(books.ledger)
    books.deliver()
    before = books.snapshot()
    (again,) = books.take(*rejections)
    assert (again.status, again.rejected) == (200, ())
    assert books.snapshot() == before
    settled(books.ledger, books.sandbox, fault="a webhook is repeated")


def test_a_notification_is_new_once(books: Books) -> None:
    with books.ledger.deliver_lane().transaction() as connection:
        assert [reports.is_new(connection, "evt_1", 1) for _ in range(3)] == [True, False, False]


def test_eight_threads_with_one_notification_have_one_effect(books: Books) -> None:
    books.deliver(*(f"run-{number}" for number in range(5)))
    (rejection,) = books.sandbox.reject(*(f"run-{number}" for number in range(5)))
    request = books.sandbox.thin_event(rejection)
    barrier = threading.Barrier(8)

    def at_once(_: int) -> Any:
        barrier.wait(60)
        return books.webhooks.handle(*request)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(at_once, range(8)))
    assert {result.status for result in results} == {200}
    assert sorted(len(result.rejected) for result in results) == [0] * 7 + [5]
    assert len(books.told()) == 5
    sealing.retry(books.ledger)
    books.deliver()
    settled(books.ledger, books.sandbox, fault="a webhook is repeated", tried=7)


def test_two_reports_that_name_one_event_reject_it_once_in_either_order(books: Books) -> None:
    books.deliver("run-1")
    first, second = books.sandbox.reject("run-1")[0], books.sandbox.reject("run-1")[0]
    results = books.take(second, first)
    assert [(result.rejected, result.unknown) for result in results] == [(("run-1",), 0), ((), 1)]
    assert books.told() == ["rejected later run-1"]


def test_while_stripe_does_not_answer_nothing_changes_and_the_next_delivery_does_it(books: Books) -> None:
    books.deliver("run-1")
    rejections = books.sandbox.reject("run-1")
    before = books.snapshot()
    books.sandbox.fail(server_error(), path="/v2/core/events/*")
    (failed,) = books.take(*rejections)
    assert (failed.status, failed.ok, books.snapshot()) == (503, False, before)
    (result,) = books.take(*rejections)
    assert (result.ok, result.rejected) == (True, ("run-1",))


def test_other_types_are_taken_and_ignored_without_asking_stripe(small: Books) -> None:
    small.deliver("run-1")
    before, asked = small.snapshot(), len(small.sandbox.requests)
    body = json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "v1.something.new", "livemode": False,
                       "created": "2027-01-15T08:00:00.000Z"}).encode()  # fmt: skip
    result = small.webhooks.handle(body, small.sign(body))
    assert (result.status, result.event_id) == (200, "evt_1")
    assert (small.snapshot(), len(small.sandbox.requests)) == (before, asked)


# -- the handler's


def test_the_handler_takes_webhooks_in(tmp_path: Path, small: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    client = small.gateway.client
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer="cus_1", stripe=client, ledger=f"sqlite:///{tmp_path}/own.db",
        webhook_secret="whsec_sandbox",
    ) as handler:  # fmt: skip
        handler.record_usage({"input_tokens": 5}, id="job-1")
        assert handler.flush(60).pending == 0
        (rejection,) = small.sandbox.reject(small.sandbox.events[-1].identifier)
        assert len(handler.webhooks.handle(*small.sandbox.thin_event(rejection)).rejected) == 1
        assert handler.status().rejected == 1
        assert [act.act for act in handler.acts()] == ["rejected later"]
        assert "rejected later" in handler.acts()._repr_html_()
        assert handler.retry() == 1
        assert handler.flush(60).pending == 0
    assert small.billed() == 5
    with StripeMeterCallbackHandler(Tokens("t"), stripe=client, ledger=f"sqlite:///{tmp_path}/n.db") as handler:
        with pytest.raises(ConfigurationError, match="STRIPE_WEBHOOK_SECRET"):
            _ = handler.webhooks
        monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", "whsec_sandbox")
        assert "whsec" not in repr(handler.webhooks)
    with (
        StripeMeterCallbackHandler(Tokens("t"), ledger=f"sqlite:///{tmp_path}/r.db", deliver=False) as handler,
        pytest.raises(ConfigurationError, match="deliver=False"),
    ):
        _ = handler.webhooks


def test_a_notification_that_names_nothing_is_remembered_and_changes_nothing_else(small: Books) -> None:
    small.deliver("run-1")
    (rejection,) = small.sandbox.reject("run-1")
    rejection.data.clear()
    assert small.take(rejection)[0].rejected == ()
    with small.ledger.read() as connection:
        assert connection.execute(select(webhook_events.c.id)).scalars().all() == [rejection.id]
    assert rejection.type == ERROR_REPORT
    small.take(*small.sandbox.reject("run-1"))


def test_an_identifier_that_stripe_took_and_refused_is_never_sent_again_whatever_becomes_of_the_customer(
    small: Books,
) -> None:
    """Refused later, tried again, held because the customer is gone, assigned to another: Stripe knows the first."""
    small.deliver("run-1", value=500)
    small.sandbox.delete_customer("cus_1")
    small.take(*small.sandbox.reject("run-1"))
    sealing.retry(small.ledger)
    small.deliver()
    (held,) = views.held(small.ledger)
    acts.assign(small.ledger, held.ids, "cus_2")
    small.deliver()
    assert small.sandbox.billed("ai_tokens", "cus_2") == 500
    assert small.states() == {"run-1": "delivered"}
    assert [event.identifier for event in small.sandbox.events if event.billed] == ["run-1-r1"]
    assert_invariant(small.ledger, small.sandbox, settled=True)


def test_what_was_refused_later_and_rolled_up_is_billed_to_whoever_it_is_assigned_to(books: Books) -> None:
    """Rolled up again, the same readings would get the identifier that Stripe took and refused: that bills nothing."""
    books.courier = Courier(books.ledger, books.gateway, on_error=books.errors.append, roll_up=60)
    books.deliver("run-1", "run-2", value=5)
    (first,) = books.sandbox.events
    customer = "cus_1"
    for other in ("cus_2", "cus_3"):  # refused again, under its second identifier
        (result,) = books.take(*books.sandbox.reject(books.sandbox.events[-1].identifier))
        assert len(result.rejected) == 1
        sealing.retry(books.ledger)
        books.sandbox.delete_customer(customer)
        books.deliver()
        assert books.states() == {"run-1": "held", "run-2": "held"}
        (held,) = views.held(books.ledger)
        assert (held.customer, held.value) == (customer, 10)
        acts.assign(books.ledger, held.ids, other)
        books.deliver()
        assert books.states() == {"run-1": "delivered", "run-2": "delivered"}
        assert books.billed(other) == 10
        customer = other
    (billed,) = [event for event in books.sandbox.events if event.billed]
    assert billed.identifier == f"{first.identifier}-r2"
    assert (books.billed("cus_1"), books.billed("cus_2")) == (0, 0)


def test_what_was_refused_later_in_one_event_may_be_billed_to_several(books: Books) -> None:
    rolled_up = Courier(books.ledger, books.gateway, on_error=books.errors.append, roll_up=60)
    books.courier, alone = rolled_up, books.courier
    books.deliver("run-1", "run-2", "run-3", value=5)
    books.take(*books.sandbox.reject(books.sandbox.events[-1].identifier))
    sealing.retry(books.ledger)
    books.sandbox.delete_customer("cus_1")
    books.deliver()
    (held,) = views.held(books.ledger)
    acts.assign(books.ledger, held.ids[:2], "cus_2")
    books.deliver()
    acts.assign(books.ledger, held.ids[2:], "cus_3")
    books.courier = alone
    books.deliver()
    assert (books.billed("cus_2"), books.billed("cus_3")) == (10, 5)


def test_long_identifiers_that_were_refused_later_stay_apart_when_both_are_assigned_to_another(small: Books) -> None:
    long = "x" * 99
    small.deliver(f"{long}a", f"{long}b", value=3)
    small.take(*small.sandbox.reject(f"{long}a", f"{long}b"))
    sealing.retry(small.ledger)
    small.sandbox.delete_customer("cus_1")
    small.deliver()
    (held,) = views.held(small.ledger)
    acts.assign(small.ledger, held.ids, "cus_2")
    small.deliver()
    assert small.billed("cus_2") == 6
