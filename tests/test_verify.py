"""Verify: the ledger's totals against Stripe's own."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.audit.verify import verify
from langchain_stripe_meter.core.totals import compare
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

amounts = st.decimals(min_value=0, max_value=10**9, places=3)


@given(delivered=amounts, uncertain=amounts, pending=amounts, share=st.floats(0, 1))
def test_any_sum_between_delivered_and_delivered_plus_uncertain_agrees(
    delivered: Decimal, uncertain: Decimal, pending: Decimal, share: float
) -> None:
    states = {"delivered": delivered, "sending": uncertain, "pending": pending}
    inside = delivered + uncertain * Decimal(share)
    assert compare("m", "cus_1", states, inside).difference == 0
    assert compare("m", "cus_1", states, delivered + uncertain + 1).difference == 1
    assert compare("m", "cus_1", states, delivered - 1).difference == -1
    assert compare("m", "cus_1", states, inside).recorded == delivered + uncertain + pending


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
        Tokens("ai_tokens"), customer=from_metadata("id"), stripe=client, ledger=f"sqlite:///{tmp_path}/l.db"
    ) as handler:
        yield handler


def use(handler: StripeMeterCallbackHandler) -> None:
    for number in range(3):
        usage = {"input_tokens": 100 + number, "output_tokens": 20}
        handler.record_usage(usage, id=f"job-{number}", metadata={"id": f"cus_{number}"})
    assert handler.flush(10).pending == 0


def test_what_was_delivered_agrees_with_stripe(handler: StripeMeterCallbackHandler) -> None:
    use(handler)
    verification = handler.verify()
    assert verification.agrees
    assert [(one.customer, one.at_stripe) for one in verification.comparisons] == [
        ("cus_0", 120), ("cus_1", 121), ("cus_2", 122),
    ]  # fmt: skip
    assert "cus_2" in verification._repr_html_()


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
    assert [one.difference for one in handler.verify().differences] == [-sandbox.events[0].value]


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
