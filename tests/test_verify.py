"""Verify: the ledger's totals against Stripe's own."""

from __future__ import annotations

import html
import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import stripe
from conftest import wait_until
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.audit.verify import Verification, verify
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.doubts import SUMS_LAG
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.totals import Known, compare
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import sealing, views
from langchain_stripe_meter.ledger.keeping import prune
from langchain_stripe_meter.ledger.schema import events, pruned, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer, rate_limited, refuse, server_error
from langchain_stripe_meter.sandbox.account import Stamp
from langchain_stripe_meter.sandbox.stripe_sandbox import AccountHandle

amounts = st.decimals(min_value=0, max_value=10**9, places=3)


@given(delivered=amounts, recent=amounts, sending=amounts, pending=amounts, share=st.floats(0, 1))
def test_any_sum_between_what_is_settled_and_all_that_stripe_may_have_agrees(
    delivered: Decimal, recent: Decimal, sending: Decimal, pending: Decimal, share: float
) -> None:
    known = Known()
    for amount, state, settled in (
        (delivered, "delivered", True), (recent, "delivered", False), (sending, "sending", False),
        (pending, "pending", True),
    ):  # fmt: skip
        known.add(amount, state, is_settled=settled)
    inside = delivered + (recent + sending) * Decimal(share)
    assert compare("m", "cus_1", known, inside).difference == 0
    assert compare("m", "cus_1", known, delivered + recent + sending + 1).difference == 1
    assert compare("m", "cus_1", known, delivered - 1).difference == -1
    assert compare("m", "cus_1", known, inside).recorded == delivered + recent + sending + pending


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for number in range(3):
            sandbox.create_customer(id=f"cus_{number}")
        yield sandbox


@pytest.fixture
def handler(sandbox: StripeSandbox, tmp_path: Path) -> Iterator[StripeMeterCallbackHandler]:
    client = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url})
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer=from_metadata("id"), stripe=client, ledger=f"sqlite:///{tmp_path}/l.db",
        clock=sandbox.now,
    ) as handler:  # fmt: skip
        yield handler


def use(handler: StripeMeterCallbackHandler) -> None:
    for number in range(3):
        usage = {"input_tokens": 100 + number, "output_tokens": 20}
        handler.record_usage(usage, id=f"job-{number}", metadata={"id": f"cus_{number}"})
    assert handler.flush(60).pending == 0


def test_what_was_delivered_agrees_with_stripe(handler: StripeMeterCallbackHandler) -> None:
    use(handler)
    verification = handler.verify()
    assert verification.agrees
    assert [(one.customer, one.at_stripe) for one in verification.comparisons] == [
        ("cus_0", 120), ("cus_1", 121), ("cus_2", 122),
    ]  # fmt: skip
    assert "cus_2" in verification._repr_html_()


def test_a_sum_with_more_digits_than_stripe_answers_with_agrees(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler
) -> None:
    for value in ("32321143.4457127", "0.00000005"):
        handler.correct("cus_0", "ai_tokens", Decimal(value), reason="converted", id=value)
    handler.flush(60)
    sandbox.advance(seconds=SUMS_LAG)
    verification = handler.verify()
    assert (verification.agrees, verification.comparisons[0].at_least) == (True, Decimal("32321143.44571275"))


def test_usage_that_the_ledger_does_not_know_is_a_difference_with_its_customer_and_amount(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler
) -> None:
    use(handler)
    stranger = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url})
    stranger.v1.billing.meter_events.create(
        {"event_name": "ai_tokens", "payload": {"stripe_customer_id": "cus_1", "value": "7"}}
    )
    verification = handler.verify()
    assert not verification.agrees
    assert [(one.customer, one.difference) for one in verification.differences] == [("cus_1", 7)]


def test_what_stripe_took_back_is_a_difference_below(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler
) -> None:
    use(handler)
    sandbox.reject(sandbox.events[0].identifier)
    sandbox.advance(hours=2)
    verification = handler.verify()
    assert [one.difference for one in verification.differences] == [-sandbox.events[0].value]
    assert "Stripe has less than was delivered" in verification._repr_html_()


def test_progress_is_told_and_older_usage_is_left_out(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler, tmp_path: Path
) -> None:
    use(handler)
    seen: list[tuple[int, int]] = []
    ledger, gateway = Ledger(f"sqlite:///{tmp_path}/l.db"), Gateway(sandbox.api_key, api_base=sandbox.url)
    verify(ledger, gateway, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert verify(ledger, gateway, since=sandbox.now() + 3600).comparisons == ()
    ledger.close()
    gateway.close()


def test_a_key_that_may_not_read_meters_cannot_verify(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler, tmp_path: Path
) -> None:
    use(handler)
    sandbox.allow("rk_test_writer", {"meter_events:write"})
    ledger, gateway = Ledger(f"sqlite:///{tmp_path}/l.db"), Gateway("rk_test_writer", api_base=sandbox.url)
    with pytest.raises(StripeError, match="may not read meters"):
        verify(ledger, gateway)
    ledger.close()
    gateway.close()


# -- much, old, elsewhere, and meanwhile


def fill(
    ledger: Ledger, sandbox: StripeSandbox, runs: int, customers: int, *, per_event: int = 1, account: str = ""
) -> None:
    """Usage of ``customers``, delivered: in the ledger and at Stripe, without a request for each."""
    now = ledger.now()
    known: Any = {"event_name": "ai_tokens", "value": Decimal(2), "state": ReadingState.RESOLVED}
    keys = [(f"{account}run-{n}", f"cus_{n // per_event % customers}", now - 60 - n % 3 * 86_400) for n in range(runs)]
    for start in range(0, runs, 5000):
        ledger.record([Entry(key, at=at, customer=who, **known) for key, who, at in keys[start : start + 5000]])
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).where(readings.c.account == "").values(account=account))
        while sealing.seal(connection, now, 3600 if per_event > 1 else None, [account]):
            pass
        delivered = update(events).where(events.c.state == "pending").values(state="delivered")
        connection.execute(delivered.values(settled_at=now - SUMS_LAG))  # so that Stripe's sums must show it
        sent = connection.execute(select(events).where(events.c.account == account)).all()
    at_stripe = sandbox.connect(account) if account else sandbox
    stamp = Stamp(now, "req_1", "")
    for row in sent:
        payload = {"stripe_customer_id": row.customer, "value": row.value}
        event = {"event_name": row.event_name, "identifier": row.identifier, "timestamp": row.at, "payload": payload}
        at_stripe._account.receive(event, stamp, v2=False)


@pytest.fixture
def ledger(sandbox: StripeSandbox, tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db", clock=sandbox.now, synchronous="NORMAL")
    yield ledger
    ledger.close()


@pytest.fixture
def gateway(sandbox: StripeSandbox) -> Iterator[Gateway]:
    gateway = Gateway(sandbox.api_key, api_base=sandbox.url)
    yield gateway
    gateway.close()


def test_a_hundred_thousand_events_are_compared_with_one_question_for_each_customer_and_meter(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3, 40):
        sandbox.create_customer(id=f"cus_{number}")
    fill(ledger, sandbox, 100_000, 40)
    asked, told = len(sandbox.requests), []
    began = time.perf_counter()
    verification = verify(ledger, gateway, progress=lambda done, all_: told.append((done, all_)))
    seconds, questions = time.perf_counter() - began, [request.path for request in sandbox.requests[asked:]]
    tracemalloc.start()
    views.totals(ledger)  # all that grows with the number of events
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with capsys.disabled():
        print(f" [100,000 events, 40 customers: {seconds:.1f} s, {peak / 2**20:.0f} MiB of Python's memory]", end="")
    assert verification.agrees
    assert sum(one.delivered for one in verification.comparisons) == 200_000
    assert sum(path.endswith("event_summaries") for path in questions) == 40
    assert len(questions) <= 50
    assert told == [(number, 40) for number in range(1, 41)]
    assert peak < 30 * 2**20


def test_what_stripe_cannot_be_asked_about_is_told_apart_and_of_many_some_are_named() -> None:
    known = Known()
    known.add(Decimal(5), "delivered", is_settled=True)
    more, less, gone = Decimal(6), Decimal(4), None
    found = Verification(tuple(compare("m", f"cus_{at}", known, at, "acct_1") for at in (more, less, gone)))
    assert [line.partition(". ")[0] for line in found.advice.splitlines()] == [
        "Stripe has more than this ledger knows of: cus_6 on m of acct_1 by +1",
        "Stripe has less than was delivered: cus_4 on m of acct_1 by -1",
        "Stripe has no such customer or meter: cus_None on m of acct_1 by -5",
    ]
    many = Verification(tuple(compare("m", f"cus_{number}", known, less) for number in range(12)))
    assert "cus_9 on m by -1 and 2 more." in many.advice
    assert Verification(tuple(compare("m", "cus", known, at) for at in [Decimal(5)])).advice == ""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[StripeSandbox, StripeMeterCallbackHandler]]:
    """A meter whose sums lag by five minutes, as a small account's may."""
    with StripeSandbox(summary_lag=300) as sandbox:
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1")
        client = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url})
        with StripeMeterCallbackHandler(
            Tokens("ai_tokens"), customer="cus_1", stripe=client, ledger=f"sqlite:///{tmp_path}/l.db", clock=sandbox.now
        ) as handler:
            yield sandbox, handler


def test_a_busy_meter_agrees_at_any_moment_and_its_report_says_what_is_uncertain(
    busy: tuple[StripeSandbox, StripeMeterCallbackHandler],
) -> None:
    sandbox, handler = busy
    for number in range(12):
        handler.record_usage({"input_tokens": 1}, id=f"job-{number}")
        handler.flush(60)
        sandbox.advance(seconds=600)
        found = handler.verify()
        assert found.agrees
    (one,) = found.comparisons
    assert (one.delivered, one.at_least, one.uncertain, one.at_stripe) == (12, 1, 11, 12)
    assert "uncertain" in found._repr_html_()


def test_an_excess_is_a_difference_however_much_was_just_delivered(
    busy: tuple[StripeSandbox, StripeMeterCallbackHandler],
) -> None:
    sandbox, handler = busy
    handler.record_usage({"input_tokens": 5}, id="job")
    handler.flush(60)
    stranger = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url})
    payload = {"stripe_customer_id": "cus_1", "value": "2"}
    stranger.v1.billing.meter_events.create({"event_name": "ai_tokens", "payload": payload})
    sandbox.advance(seconds=301)
    assert [one.difference for one in handler.verify().differences] == [2]


def test_what_stripe_may_have_taken_or_cancelled_without_a_word_is_no_difference(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler
) -> None:
    use(handler)
    taken = next(event for event in sandbox.events if event.customer == "cus_0")
    sandbox.advance(hours=2)
    assert handler.verify().agrees
    sandbox.fail(drop_answer(), path="/v1/billing/meter_event_adjustments")
    with pytest.raises(StripeError, match="Cancel it again"):
        handler.cancel(taken.identifier)
    assert handler.verify().agrees
    handler.cancel(taken.identifier)
    sandbox.fail(drop_answer(), refuse(503), times=None)
    handler.record_usage({"input_tokens": 9}, id="unclear", metadata={"id": "cus_1"})
    assert handler.flush(1).pending == 1
    found = handler.verify()
    sandbox.clear_faults()
    assert found.agrees
    assert [(one.uncertain, one.at_stripe) for one in found.comparisons] == [(120, 0), (9, 130), (0, 122)]


def test_a_month_that_is_over_is_compared_while_usage_of_this_one_flows(
    sandbox: StripeSandbox, handler: StripeMeterCallbackHandler
) -> None:
    midnight = sandbox.now() // 86_400 * 86_400
    handler.record_usage({"input_tokens": 7}, id="old", metadata={"id": "cus_0"}, at=midnight - 60)
    handler.record_usage({"input_tokens": 1}, id="new", metadata={"id": "cus_0"}, at=midnight)
    assert handler.flush(60).pending == 0
    sandbox.reject(next(event.identifier for event in sandbox.events if event.value == 7))
    sandbox.advance(hours=2)

    def compared(*span: int) -> list[tuple[Decimal, Decimal]]:
        return [(one.delivered, one.difference) for one in handler.verify(*span).comparisons]

    assert compared(0, midnight) == [(7, -7)]
    assert compared(0, midnight + 59) == [(7, -7)]
    assert compared(0, midnight + 60) == [(8, -7)]
    assert compared(midnight, midnight + 86_400) == [(1, 0)]
    assert compared(midnight) == [(1, 0)]
    assert compared(midnight - 60, midnight) == [(7, -7)]
    for since, until in ((midnight, midnight), (midnight, midnight + 59), (midnight, 0)):
        with pytest.raises(ConfigurationError, match=f"until={until} must be at least a minute after since={since}"):
            handler.verify(since, until)


def test_of_many_the_one_that_differs_is_named(sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway) -> None:
    fill(ledger, sandbox, 3000, 3)
    sandbox.reject(sandbox.events[7].identifier)
    (difference,) = verify(ledger, gateway).differences
    assert (difference.customer, difference.difference) == (sandbox.events[7].customer, -2)


def test_what_is_delivered_while_stripe_is_asked_is_no_difference(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway
) -> None:
    fill(ledger, sandbox, 300, 3)
    now = ledger.now()
    known: Any = {"event_name": "ai_tokens", "value": Decimal(5), "state": ReadingState.RESOLVED, "at": now}
    ledger.record([Entry(f"late-{number}", customer=f"cus_{number}", **known) for number in range(3)])
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=sandbox.url))

    real = views.amounts
    calls: list[int] = []

    def amounts_then_deliver(*given: Any) -> Any:
        found = list(real(*given))
        calls.append(1)
        if len(calls) == 1:
            courier.wake()
            wait_until(lambda: not views.status(ledger).pending)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "amounts", amounts_then_deliver)
        verification = verify(ledger, gateway)
    courier.close(5)
    courier.gateway.close()
    assert verification.agrees
    assert [one.uncertain for one in verification.comparisons] == [5, 5, 5]
    assert [one.at_stripe for one in verification.comparisons] == [205, 205, 205]


def test_what_stripe_has_too_much_of_differs_however_much_is_pending(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway
) -> None:
    fill(ledger, sandbox, 300, 3)
    now = ledger.now()
    known: Any = {"event_name": "ai_tokens", "value": Decimal(500), "state": ReadingState.RESOLVED, "at": now}
    ledger.record([Entry("pending", customer="cus_1", **known)])
    stranger = {"event_name": "ai_tokens", "payload": {"stripe_customer_id": "cus_1", "value": "7"}, "timestamp": now}
    sandbox._account.receive(stranger, Stamp(now, "req_2", ""), v2=False)
    assert [one.difference for one in verify(ledger, gateway).differences] == [7]


def test_rolled_up_usage_agrees_wherever_the_time_begins(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway
) -> None:
    fill(ledger, sandbox, 3000, 3, per_event=7)
    with ledger.read() as connection:
        assert connection.execute(select(func.count()).select_from(events)).scalar_one() < 3000
        first = connection.execute(select(func.min(readings.c.at))).scalar_one()
    for since in (0, first + 1, first + 61, first + 86_400):
        assert verify(ledger, gateway, since).agrees


def test_a_pruned_ledger_agrees_with_stripe(sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway) -> None:
    fill(ledger, sandbox, 3000, 3)
    sandbox.advance(days=60)
    assert prune(ledger).readings == 3000
    verification = verify(ledger, gateway)
    assert verification.agrees
    assert sum(one.recorded for one in verification.comparisons) == 6000
    with ledger.read() as connection:
        day = connection.execute(select(func.min(pruned.c.day))).scalar_one()
    assert verify(ledger, gateway, day + 86_400).agrees
    assert verify(ledger, gateway, 0, day + 86_400).agrees
    assert verify(ledger, gateway, day, day + 86_400).comparisons
    assert not verify(ledger, gateway, day + 3 * 86_400, day + 4 * 86_400).comparisons
    with pytest.raises(ConfigurationError, match=f"since={(day + 3600) // 60 * 60} .*midnight"):
        verify(ledger, gateway, day + 3600)
    with pytest.raises(ConfigurationError, match=r"until=.*midnight"):
        verify(ledger, gateway, 0, day + 3600)


def test_connected_accounts_are_each_compared_with_themselves(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway
) -> None:
    shop = sandbox.connect("acct_shop")
    shop.create_meter("ai_tokens")
    for number in range(3):
        shop.create_customer(id=f"cus_{number}")
    fill(ledger, sandbox, 30, 3)
    fill(ledger, sandbox, 60, 3, account="acct_shop")
    with ledger.deliver_lane().transaction() as connection:
        for table in (readings, events):
            named = table.c.key if table is readings else table.c.identifier
            connection.execute(update(table).where(~named.startswith("acct_shop")).values(account=""))
    found = verify(ledger, gateway)
    assert found.agrees
    assert [(one.account, one.at_stripe) for one in found.comparisons] == [("", 20)] * 3 + [("acct_shop", 40)] * 3


@pytest.fixture
def shops(sandbox: StripeSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[AccountHandle]:
    """Two connected accounts whose customer ``cus_0`` has used 15 tokens each, in the ledger that the commands find."""
    for name, value in {**sandbox.environment(), "STRIPE_METER_LEDGER": f"sqlite:///{tmp_path}/l.db"}.items():
        monkeypatch.setenv(name, value)
    shops = [sandbox.connect(name) for name in ("acct_a", "acct_b")]
    for shop in shops:
        shop.create_meter("ai_tokens")
        shop.create_customer(id="cus_0")
        with StripeMeterCallbackHandler(
            Tokens("ai_tokens"), customer="cus_0", stripe_account=shop.account_id
        ) as handler:
            handler.record_usage({"input_tokens": 15}, id="job")
            assert handler.flush(60).pending == 0
    return shops


@pytest.mark.parametrize("path", ["/v1/billing/meters", "*event_summaries"])
def test_an_account_that_is_closed_is_named_as_not_compared_and_the_others_are_compared(
    sandbox: StripeSandbox, shops: list[AccountHandle], path: str
) -> None:
    said = "The provided key does not have access to account 'acct_a'"
    sandbox.fail(
        refuse(403, code="account_invalid", message=said), path=path, times=None,
        where=lambda request: request.headers.get("stripe-account") == "acct_a",
    )  # fmt: skip
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_0") as handler:
        found = handler.verify()
    closed, other = found.comparisons
    assert (closed.account, closed.at_stripe, closed.difference, other.problem) == ("acct_a", None, 0, None)
    assert said in (closed.problem or "")
    assert (other.account, other.at_stripe) == ("acct_b", 15)
    assert (found.agrees, found.differences, found.not_compared) == (False, (), (closed,))
    assert said in html.unescape(found._repr_html_())


def test_the_command_names_the_account_that_was_not_compared_beside_what_differs(
    sandbox: StripeSandbox, shops: list[AccountHandle]
) -> None:
    gone, other = shops
    gone._account.connected = False
    other.reject(other.events[0].identifier)
    with closing(Ledger(os.environ["STRIPE_METER_LEDGER"])) as ledger, ledger.write() as connection:
        connection.execute(update(events).values(settled_at=events.c.settled_at - SUMS_LAG))
    told = CliRunner().invoke(app, ["verify"])
    words = " ".join(told.stderr.split())
    assert told.exit_code == 1
    assert "cus_0 on ai_tokens of acct_b by -15" in words
    assert "acct_a was not compared: HTTP 403: The provided key" in words
    told = CliRunner().invoke(app, ["verify", "--json"])
    closed, differs = json.loads(told.stdout)
    assert (closed["account"], closed["agrees"], closed["at_stripe"]) == ("acct_a", False, None)
    assert "does not have access" in closed["problem"]
    assert (differs["difference"], differs["problem"], told.exit_code) == ("-15", None, 1)


def test_what_a_meter_was_sent_before_another_of_its_name_replaced_it_counts(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway
) -> None:
    fill(ledger, sandbox, 30, 3)
    sandbox.deactivate_meter("ai_tokens")
    sandbox.create_meter("ai_tokens")
    gateway.forget_meters()
    now = ledger.now()
    sandbox._account.receive(
        {"event_name": "ai_tokens", "payload": {"stripe_customer_id": "cus_1", "value": "7"}, "timestamp": now},
        Stamp(now, "req_2", ""), v2=False,
    )  # fmt: skip
    verification = verify(ledger, gateway)
    assert [(one.at_stripe, one.difference) for one in verification.comparisons] == [(20, 0), (27, 7), (20, 0)]


def test_a_question_that_stripe_has_no_time_for_is_asked_again(
    sandbox: StripeSandbox, ledger: Ledger, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_stripe_meter.audit.verify.PATIENCE", 0)
    fill(ledger, sandbox, 30, 3)
    sandbox.fail(rate_limited(1), server_error(), path="*event_summaries", times=2)
    sandbox.fail(rate_limited(1), path="/v1/billing/meters", times=1)
    assert verify(ledger, gateway).agrees
    sandbox.fail(refuse(403), path="*event_summaries", times=1)
    with pytest.raises(StripeError, match="403"):
        verify(ledger, gateway)
