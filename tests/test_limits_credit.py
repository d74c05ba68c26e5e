"""A limit that is Stripe's remaining credit: known without asking Stripe while a run waits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, Inexact, localcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import wait_until

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.agents.budget import Spender
from langchain_stripe_meter.agents.limits import Budget, SpendLimit, StripeCredit
from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.errors import ConfigurationError, SpendLimitError, StripeError
from langchain_stripe_meter.gateway.customers import credit_of
from langchain_stripe_meter.sandbox import StripeSandbox, refuse

SUMMARY = "/v1/billing/credit_balance_summary"


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1", email="ann@example.com")
        yield sandbox


@pytest.fixture
def meter(sandbox: StripeSandbox, tmp_path: Path) -> Iterator[StripeMeterCallbackHandler]:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", ledger=ledger) as meter:
        yield meter


def asked(sandbox: StripeSandbox) -> int:
    return sum(request.path == SUMMARY for request in sandbox.requests)


def use(meter: StripeMeterCallbackHandler, tokens: int, job: str) -> None:
    meter.record_usage({"input_tokens": tokens}, id=job)


def test_a_customer_may_use_what_the_credits_pay_for(sandbox: StripeSandbox, meter: StripeMeterCallbackHandler) -> None:
    sandbox.set_credit("cus_1", 200)
    credit = StripeCredit(meter, unit_price=Decimal("0.002"))
    assert credit.refresh("cus_1") == 100_000
    budget = Budget(meter, SpendLimit("ai_tokens", credit))
    use(meter, 60_000, "job-1")
    assert budget.remaining("cus_1") == 40_000
    use(meter, 40_000, "job-2")
    with pytest.raises(SpendLimitError):
        budget.check("cus_1")


def test_no_credit_is_used_twice_while_stripe_has_not_taken_a_period_off_it(
    sandbox: StripeSandbox, tmp_path: Path
) -> None:
    """Stripe does so when it finalises the period's invoice, an hour after its end."""
    begins, ledger = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp()), f"sqlite:///{tmp_path}/l.db"
    now = begins - 60
    options: dict[str, Any] = {"customer": "cus_1", "ledger": ledger, "clock": lambda: now}
    sandbox.set_credit("cus_1", 10)
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), **options) as meter:
        credit = StripeCredit(meter, unit_price=1)
        credit.refresh("cus_1")
        meter.record_usage({"input_tokens": 10}, id="of October", at=now)
        budget = Budget(meter, SpendLimit("ai_tokens", credit))
        for moment, left in (
            (begins - 1, 0),
            (begins, 0),
            (begins + 3659, 0),
            (begins + 3660, 10),
        ):  # and as old as an answer may be
            now = moment
            assert budget.remaining("cus_1") == left
            assert Budget(meter, SpendLimit("ai_tokens", credit)).remaining("cus_1") == left  # after a start
        with pytest.raises(ConfigurationError, match=r"settled_after=.* is no shorter than a 'day'"):
            SpendLimit("ai_tokens", StripeCredit(meter, unit_price=1, settled_after=timedelta(days=1)), per="day")
        assert Budget(meter, SpendLimit("ai_tokens", Mock(return_value=5))).remaining("cus_1") == 5
        slow = StripeCredit(meter, unit_price=1, settled_after=timedelta(days=3))
        slow.refresh("cus_1")
        assert Budget(meter, SpendLimit("ai_tokens", slow)).remaining("cus_1") == 0
        assert Budget(meter, SpendLimit("ai_tokens", 10)).remaining("cus_1") == 10  # a plain limit begins anew


def test_what_the_credits_paid_for_is_told_in_plain_digits(
    sandbox: StripeSandbox, meter: StripeMeterCallbackHandler
) -> None:
    sandbox.set_credit("cus_1", 6)
    credit = StripeCredit(meter, unit_price=Decimal("0.1"))  # 6 / 0.1 is 6E+1 in decimal arithmetic
    credit.refresh("cus_1")
    use(meter, 70, "job-1")
    with pytest.raises(SpendLimitError, match=r"limit of 60 ai_tokens is used up \(70 were used\)"):
        Budget(meter, SpendLimit("ai_tokens", credit)).check("cus_1")


def test_a_check_never_waits_for_stripe_which_is_asked_once_meanwhile(
    sandbox: StripeSandbox, meter: StripeMeterCallbackHandler
) -> None:
    sandbox.set_credit("cus_1", 3)
    credit = StripeCredit(meter, unit_price=1, until_known=7)
    ann = Spender(Reference("email", "ann@example.com"), Facts())
    assert [credit(ann) for _ in range(100)].count(7) > 0
    wait_until(lambda: credit(ann) == 3)
    assert asked(sandbox) == 1


def test_what_stripe_said_last_counts_while_it_says_nothing(
    sandbox: StripeSandbox, meter: StripeMeterCallbackHandler, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.set_credit("cus_1", 5)
    credit = StripeCredit(meter, unit_price=1, max_age=0)
    assert credit.refresh("cus_1") == 5
    spender = Spender(Reference("id", "cus_1"), Facts())
    with sandbox.outage():
        assert credit(spender) == 5
        wait_until(lambda: "credit balance could not be read" in caplog.text)
        assert credit(spender) == 5
    sandbox.set_credit("cus_1", 9)
    wait_until(lambda: credit(spender) == 9)


def test_who_has_no_credit_or_is_unknown_may_use_nothing(
    sandbox: StripeSandbox, meter: StripeMeterCallbackHandler
) -> None:
    credit = StripeCredit(meter, unit_price=1)
    assert credit.refresh("cus_1") == 0
    sandbox.set_credit("cus_1", 5, "eur")
    assert credit.refresh("cus_1") == 0
    nobody = Spender(Reference("email", "nobody@example.com"), Facts())
    wait_until(lambda: credit(nobody) == 0)


def test_after_a_failure_stripe_is_left_alone_for_a_while(
    sandbox: StripeSandbox, meter: StripeMeterCallbackHandler, caplog: pytest.LogCaptureFixture
) -> None:
    credit = StripeCredit(meter, unit_price=1, max_age=0)
    sandbox.fail(refuse(500), path=SUMMARY, times=None)
    spender = Spender(Reference("id", "cus_1"), Facts())
    credit(spender)
    wait_until(lambda: "could not be read" in caplog.text and not credit._asked)
    sandbox.clear_faults()
    for _ in range(100):
        assert credit(spender) is None
    sandbox.create_customer(id="cus_2")
    wait_until(lambda: credit(Spender(Reference("id", "cus_2"), Facts())) == 0)  # asked for after it, and answered
    assert credit(spender) is None


@pytest.mark.parametrize("context", [Context(prec=3), Context(prec=3, traps=[Inexact])])
def test_amounts_are_exact_whatever_the_application_rounds_to(
    context: Context, sandbox: StripeSandbox, meter: StripeMeterCallbackHandler
) -> None:
    sandbox.set_credit("cus_1", 1_000_999)
    credit = StripeCredit(meter, unit_price=2)
    use(meter, 499, "job-1")
    with localcontext(context):
        assert credit.refresh("cus_1") == Decimal("500499.5")
        assert Budget(meter, SpendLimit("ai_tokens", credit)).remaining("cus_1") == Decimal("500000.5")


def test_a_balance_below_zero_leaves_nothing(sandbox: StripeSandbox, meter: StripeMeterCallbackHandler) -> None:
    sandbox.set_credit("cus_1", -5)
    credit = StripeCredit(meter, unit_price=1)
    assert credit.refresh("cus_1") == 0
    with pytest.raises(SpendLimitError):
        Budget(meter, SpendLimit("ai_tokens", credit), on_failure="allow").check("cus_1")


def test_a_currency_may_be_written_in_capitals(sandbox: StripeSandbox, meter: StripeMeterCallbackHandler) -> None:
    sandbox.set_credit("cus_1", 7)
    assert StripeCredit(meter, unit_price=1, currency="USD").refresh("cus_1") == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"currency": "dollars"}, "'dollars' is no currency"),
        ({"currency": 840}, "840 is no currency"),
        ({"max_age": -1}, "max_age=-1"),
        ({"max_age": "60"}, "max_age='60'"),
        ({"max_age": float("nan")}, "max_age=nan"),
        ({"max_age": True}, "max_age=True"),
        ({"until_known": 0.5}, "until_known=: .* not 0.5"),
        ({"until_known": -1}, "until_known=: .* not -1"),
        ({"until_known": "7"}, "until_known=: .* not str"),
        ({"settled_after": 3600}, "settled_after=3600: a timedelta"),
        ({"settled_after": timedelta(seconds=-1)}, "settled_after=.*: a timedelta"),
    ],
)
def test_what_would_open_the_door_later_is_refused_when_it_is_made(
    meter: StripeMeterCallbackHandler, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StripeCredit(meter, unit_price=1, **wrong)


def test_a_customer_is_refreshed_on_the_handlers_account_or_on_the_one_that_is_said(
    sandbox: StripeSandbox, tmp_path: Path
) -> None:
    there = sandbox.connect("acct_there")
    there.create_customer(id="cus_1")
    there.set_credit("cus_1", 11)
    options: dict[str, Any] = {"customer": "cus_1", "ledger": f"sqlite:///{tmp_path}/l.db"}
    with StripeMeterCallbackHandler(Tokens("t"), **options, stripe_account="acct_there") as one:
        assert StripeCredit(one, unit_price=1).refresh("cus_1") == 11
    with StripeMeterCallbackHandler(Tokens("t"), **options, tenant=lambda facts: None) as several:
        credit = StripeCredit(several, unit_price=1)
        assert credit.refresh("cus_1", "acct_there") == 11
        assert credit.refresh("cus_1", "") == 0
        with pytest.raises(ConfigurationError, match=r"tenant=.*account="):
            credit.refresh("cus_1")


def test_credits_belong_to_an_account(sandbox: StripeSandbox, meter: StripeMeterCallbackHandler) -> None:
    there = sandbox.connect("acct_there")
    there.create_customer(id="cus_1")
    there.set_credit("cus_1", 11)
    assert StripeCredit(meter, unit_price=1).refresh("cus_1", "acct_there") == 11
    assert StripeCredit(meter, unit_price=1).refresh("cus_1") == 0


def test_a_key_that_may_not_read_credits_is_told(sandbox: StripeSandbox, meter: StripeMeterCallbackHandler) -> None:
    assert meter._courier is not None
    sandbox.allow(sandbox.api_key, {"meter_events:write"})
    with pytest.raises(StripeError, match="read the customer's credit balance"):
        credit_of(meter._courier.gateway, "cus_1", "usd")


@pytest.mark.parametrize("price", [0, -1, Decimal("NaN")])
def test_a_price_that_is_none_is_refused(meter: StripeMeterCallbackHandler, price: Decimal) -> None:
    with pytest.raises(ConfigurationError, match="unit_price"):
        StripeCredit(meter, unit_price=price)


def test_a_handler_that_only_records_cannot_ask(tmp_path: Path) -> None:
    meter = StripeMeterCallbackHandler(Tokens("t"), ledger=f"sqlite:///{tmp_path}/l.db", deliver=False)
    with pytest.raises(ConfigurationError, match="deliver=False"):
        StripeCredit(meter, unit_price=1)
