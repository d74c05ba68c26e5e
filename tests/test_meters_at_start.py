"""A meter that cannot bill what it is sent is refused by name when a server starts; Stripe's silence is not."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import settled
from metering import Shop
from test_cli import call
from test_lifespan import HEAD, STARLETTE

import langchain_stripe_meter.handler
from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.core.tenants import Tenant
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.sandbox import StripeSandbox, hang, refuse

METERS = "/v1/billing/meters"
WRONG: dict[str, tuple[Any, str]] = {
    "unknown": (lambda sandbox: None, "stripe-meter meters create bad"),
    "inactive": (lambda sandbox: sandbox.create_meter("bad") and sandbox.deactivate_meter("bad"), "reactivate it"),
    "last": (lambda sandbox: sandbox.create_meter("bad", formula="last"), "by 'sum'"),
    "count": (lambda sandbox: sandbox.create_meter("bad", formula="count"), "by 'sum'"),
    "windowed": (lambda sandbox: sandbox.create_meter("bad", event_time_window="day"), "make one without"),
    "one key": (lambda sandbox: sandbox.create_meter("bad", customer_key="k", value_key="k"), "make one with two"),
    "clash": (lambda sandbox: sandbox.create_meter("bad", customer_key="model"), "make one with other keys"),
}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, Tokens("good")) as shop:
        yield shop


def start(handler: StripeMeterCallbackHandler, then: Callable[[], object] = lambda: None, **options: Any) -> None:
    """Start and stop a server that does nothing but ``then``."""

    async def serve() -> None:
        async with handler.lifespan(**options):
            then()

    asyncio.run(serve())


@pytest.mark.parametrize("kind", WRONG)
def test_a_server_does_not_start_on_a_meter_that_would_bill_wrongly(shop: Shop, kind: str) -> None:
    make, advice = WRONG[kind]
    make(shop.sandbox)
    handler = StripeMeterCallbackHandler(Tokens("good"), Tokens("bad", split=True), **shop._options)
    with pytest.raises(ConfigurationError, match=f"1 of 2 meters .*'bad'.*{advice}") as refusal:
        start(handler)
    assert "'good'" not in str(refusal.value)
    with pytest.raises(ConfigurationError, match="'bad'"):
        handler.check()
    assert not handler._courier.is_running  # type: ignore[union-attr]
    handler.close()


def test_every_wrong_meter_is_named(shop: Shop) -> None:
    shop.sandbox.create_meter("last", formula="last")
    meters = (Tokens("good"), Tokens("last"), Messages("absent"))
    handler = StripeMeterCallbackHandler(*meters, **shop._options)
    with pytest.raises(ConfigurationError, match=r"2 of 3 meters .*'last'.*'absent'"):
        handler.check()
    handler.close()


def test_making_a_handler_asks_stripe_nothing_and_its_check_sees_what_was_repaired(shop: Shop) -> None:
    shop.sandbox.deactivate_meter("good")
    handler = shop.another_handler()
    assert not shop.sandbox.requests
    with pytest.raises(ConfigurationError, match="'good' is inactive"):
        handler.check()
    shop.sandbox.reactivate_meter("good")
    handler.check()
    start(handler)


def test_a_meter_with_payload_keys_of_its_own_is_right(shop: Shop) -> None:
    shop.sandbox.create_meter("own", customer_key="who", value_key="tokens")
    handler = StripeMeterCallbackHandler(Tokens("own", split=True), **shop._options)
    handler.check()
    handler.close()


@pytest.mark.parametrize("fault", ["away", "revoked", "narrow", "silent"])
def test_where_stripe_does_not_say_the_server_starts_and_the_log_tells(
    shop: Shop, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.sandbox.create_meter("bad", formula="last")
    handler, answer = StripeMeterCallbackHandler(Tokens("bad"), **shop._options), threading.Event()
    if fault == "away":
        shop.sandbox.stop()
    elif fault == "revoked":
        shop.sandbox.revoke(shop.sandbox.api_key)
    elif fault == "narrow":
        shop.sandbox.allow(shop.sandbox.api_key, {"meter_events:write"})
    else:
        monkeypatch.setattr(langchain_stripe_meter.handler, "START_SECONDS", 0.05)
        shop.sandbox.fail(hang(answer), path=METERS, times=None)
    with caplog.at_level(logging.WARNING):
        start(handler, then=answer.set)
    assert "the meters could not be checked at the start" in caplog.text


def test_the_check_that_a_person_asks_for_says_that_stripe_did_not_say(shop: Shop) -> None:
    shop.sandbox.fail(refuse(503), path=METERS, times=None)
    with pytest.raises(StripeError, match="list the meters"):
        shop.handler.check()
    shop.sandbox.clear_faults()
    shop.sandbox.allow(shop.sandbox.api_key, {"meter_events:write"})
    with pytest.raises(StripeError, match="Billing meters: Read"):
        shop.handler.check()


def test_a_server_may_be_started_all_the_same_and_only_that_meter_stops(shop: Shop) -> None:
    shop.sandbox.create_meter("bad", formula="last")
    handler = StripeMeterCallbackHandler(Tokens("good"), Tokens("bad"), **shop._options)
    handler.record_usage({"input_tokens": 3}, id="job-1", customer="cus_1")
    start(handler, check=False)
    assert [held.event_name for held in handler.held()] == ["bad"]
    assert shop.sandbox.billed("good", "cus_1") == 3
    settled(handler._ledger, shop.sandbox, fault="a meter that adds up wrongly")


def test_with_tenants_each_account_is_checked_by_name(shop: Shop) -> None:
    account = shop.sandbox.connect("acct_one")
    account.create_meter("good", formula="last")
    handler = shop.another_handler(tenant=lambda facts: Tenant("acct_one"))
    start(handler)  # nobody knows yet whose runs will come
    with pytest.raises(ConfigurationError, match="stripe_account="):
        handler.check()
    with pytest.raises(ConfigurationError, match="'last'"):
        handler.check("acct_one")
    handler.check("")
    one = shop.another_handler(stripe_account="acct_one")
    with pytest.raises(ConfigurationError, match="'last'"):
        start(one)


def test_a_handler_that_only_records_cannot_ask(shop: Shop) -> None:
    handler = shop.another_handler(deliver=False, stripe=None)
    with pytest.raises(ConfigurationError, match="deliver=False"):
        handler.check()


def test_uvicorn_exits_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HEAD + STARLETTE)
    with StripeSandbox() as sandbox:
        sandbox.create_meter("tokens", event_time_window="day")
        environment = {**sandbox.environment(), "STRIPE_METER_LEDGER": f"sqlite:///{tmp_path}/ledger.db"}
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"]
        ended = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
        )
    assert ended.returncode == 3  # uvicorn's own, for an application that failed to start
    assert "'tokens' has an event_time_window (day); make one without" in ended.stderr


def test_deliver_refuses_the_meters_that_it_is_told_to_bill_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        sandbox.create_meter("good")
        sandbox.create_meter("last", formula="last")
        sandbox.create_customer(id="cus_1")
        url = f"sqlite:///{tmp_path}/ledger.db"
        with StripeMeterCallbackHandler(
            Tokens("good"), Tokens("last"), customer="cus_1", ledger=url, deliver=False
        ) as handler:
            handler.record_usage({"input_tokens": 5}, id="job")
        told = call("deliver", "--once", "--ledger", url, "--meter", "good", "--meter", "last", "--meter", "no", code=2)
        assert "'last'" in told.stderr
        assert "'no'" in told.stderr
        assert not sandbox.events
        sandbox.fail(refuse(503), path=METERS)
        told = call("deliver", "--once", "--ledger", url, "--meter", "last")
        assert "could not be checked" in told.stderr
        assert sandbox.billed("good", "cus_1") == 5
        assert "by 'last'" in call("held", "--ledger", url).stdout
