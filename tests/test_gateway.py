"""Every request that the real client sends, held against Stripe's published request schemas."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import stripe

from langchain_stripe_meter import StripeMeterCallbackHandler, StripeMeterEvent, Tokens
from langchain_stripe_meter.core.events import MeterEvent
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import Move
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.gateway.client import Gateway, check_key
from langchain_stripe_meter.gateway.meters import make_meter
from langchain_stripe_meter.gateway.replies import classify
from langchain_stripe_meter.sandbox import StripeSandbox, rate_limited, refuse
from langchain_stripe_meter.sandbox.faults import Fault
from langchain_stripe_meter.sandbox.wire import Reply

SPEC = Path(__file__).parent.parent.parent / "shared" / "spec" / "stripe-meters.subset.json"


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1", email="ann@example.com", name="Ann Smith", phone="+4915112345678")
        yield sandbox


@pytest.fixture
def gateway(sandbox: StripeSandbox) -> Iterator[Gateway]:
    gateway = Gateway(sandbox.api_key, api_base=sandbox.url)
    yield gateway
    gateway.close()


def event(sandbox: StripeSandbox, **changes: Any) -> MeterEvent:
    facts: dict[str, Any] = {
        "event_name": "ai_tokens",
        "customer": "cus_1",
        "value": Decimal("12.5"),
        "identifier": "run-1",
        "timestamp": sandbox.now(),
    }
    return MeterEvent(**{**facts, **changes})


def typed(schema: Any, value: Any) -> Any:
    """Form bodies carry text only: give numbers back their type before the schema looks at them."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return {key: typed(properties.get(key, {}), inner) for key, inner in value.items()}
    return int(value) if schema.get("type") == "integer" else value


def schema_of(spec: Any, method: str, path: str) -> Any:
    for template, operations in spec["paths"].items():
        parts, names = path.split("/"), template.split("/")
        if len(parts) == len(names) and all(
            n in (p, *["{"]) or n.startswith("{") for p, n in zip(parts, names, strict=True)
        ):
            return operations.get(method.lower())
    return None


@pytest.mark.skipif(not SPEC.exists(), reason="Stripe's request schemas are not at hand")
def test_each_request_body_is_what_stripes_schema_allows(sandbox: StripeSandbox, gateway: Gateway) -> None:
    gateway.send(event(sandbox), 0)
    gateway.send(event(sandbox, identifier="run-2", dimensions={"model": "openai/gpt-4o", "token_type": "input"}), 3)
    make_meter(gateway, "another", "Another meter")
    gateway.find_customers(Reference("email", "ann@example.com"))
    gateway.find_customers(Reference("name", 'Ann "the" Smith\\'))
    StripeMeterEvent(stripe=gateway.client).invoke({"event_name": "ai_tokens", "customer_id": "cus_1", "value": 1})
    spec = json.loads(SPEC.read_text())
    checked = 0
    for request in sandbox.requests:
        operation = schema_of(spec, request.method, request.path)
        assert operation is not None, request.path
        if request.method == "POST":
            (media,) = operation["requestBody"]["content"].values()
            resolver = jsonschema.Draft202012Validator({**media["schema"], "components": spec.get("components", {})})
            resolver.validate(typed(media["schema"], request.params))
            checked += 1
        else:
            allowed = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert set(request.params) <= allowed
    assert checked == 4


def test_an_accepted_event_and_a_repeated_one_are_told_apart_and_billed_once(
    sandbox: StripeSandbox, gateway: Gateway
) -> None:
    assert gateway.send(event(sandbox), 0).move is Move.ACCEPTED
    assert gateway.send(event(sandbox), 1).move is Move.DUPLICATE
    assert sandbox.billed("ai_tokens", "cus_1") == Decimal("12.5")


def test_the_idempotency_key_changes_with_every_attempt_and_the_identifier_does_not(
    sandbox: StripeSandbox, gateway: Gateway
) -> None:
    for attempt in range(3):
        gateway.send(event(sandbox), attempt)
    sent = [request for request in sandbox.requests if request.path == "/v1/billing/meter_events"]
    assert {request.params["identifier"] for request in sent} == {"run-1"}
    assert [request.headers["idempotency-key"] for request in sent] == ["run-1.0", "run-1.1", "run-1.2"]


@pytest.mark.parametrize(
    ("status", "move"),
    [
        (400, Move.REFUSED),
        (404, Move.REFUSED),
        (401, Move.UNAUTHORISED),
        (403, Move.UNAUTHORISED),
        (429, Move.REFUSED_FOR_NOW),
        (409, Move.UNKNOWN),
        (423, Move.UNKNOWN),
        (424, Move.UNKNOWN),
        (425, Move.UNKNOWN),
        (500, Move.UNKNOWN),
        (503, Move.UNKNOWN),
    ],
)
def test_each_status_has_its_meaning(sandbox: StripeSandbox, gateway: Gateway, status: int, move: Move) -> None:
    sandbox.fail(refuse(status), path="/v1/billing/meter_events")
    outcome = gateway.send(event(sandbox), 0)
    assert outcome.move is move
    assert str(status) in outcome.message


@pytest.mark.parametrize("account", ["", "acct_1Theirs"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 451])
@pytest.mark.parametrize(
    "body",
    [{"page": "Blocked"}, {"error": "invalid_request"}, {"error": {"code": "Blocked", "message": "x"}}, {"error": {}}],
    ids=["page", "oauth", "gateway", "empty"],
)
def test_a_no_without_stripes_own_words_is_none_of_stripes(
    sandbox: StripeSandbox, gateway: Gateway, status: int, account: str, body: dict[str, Any]
) -> None:
    """As from a proxy or a firewall on the way: whether Stripe got the request, it does not say."""
    sandbox.connect("acct_1Theirs").create_meter("ai_tokens")
    gateway.load_meters(account)
    page = Fault(works=False, reply=Reply(status, body))
    sandbox.fail(page, path=None, times=None)
    assert gateway.send(event(sandbox, account=account), 0).move is Move.UNKNOWN
    for ask in (gateway.account_id, lambda: gateway.load_meters(account)):
        with pytest.raises(StripeError) as told:
            ask()
        assert gateway.outcome_of(told.value, account).move is Move.UNKNOWN
    gateway.forget_meters(account)
    assert gateway.send(event(sandbox, account=account), 0).move is Move.REFUSED_FOR_NOW


@pytest.mark.parametrize(
    ("status", "listing", "move"),
    [
        (401, False, Move.UNAUTHORISED),
        (401, True, Move.UNAUTHORISED),
        (403, False, Move.NO_ACCESS),
        (400, True, Move.NO_ACCESS),
        (404, True, Move.NO_ACCESS),
        (400, False, Move.REFUSED),
    ],
)
def test_a_no_about_a_connected_account_concerns_that_account_alone(
    sandbox: StripeSandbox, gateway: Gateway, status: int, listing: bool, move: Move
) -> None:
    sandbox.connect("acct_1Theirs")
    sandbox.fail(refuse(status), path="/v1/billing/meters" if listing else "/v1/billing/meter_events")
    assert gateway.send(event(sandbox, account="acct_1Theirs"), 0).move is move


def test_an_account_that_is_closed_is_no_key_that_may_not_read_meters(sandbox: StripeSandbox, gateway: Gateway) -> None:
    with pytest.raises(StripeError, match="does not have access to account 'acct_gone'"):
        gateway.load_meters("acct_gone")
    sandbox.fail(refuse(403, code="more_permissions_required"), path="/v1/billing/meters")
    assert gateway.load_meters() is None


def test_a_no_that_stripe_says_to_try_again_is_not_final() -> None:
    body = {"error": {"type": "invalid_request_error", "message": "Lock timeout.", "code": "lock_timeout"}}
    error = stripe.InvalidRequestError(
        "Lock timeout.", None, http_status=400, json_body=body, headers={"Stripe-Should-Retry": "true"}
    )
    assert classify(error).move is Move.UNKNOWN


@pytest.mark.parametrize(
    ("code", "move"),
    [
        ("rate_limit", Move.REFUSED_FOR_NOW),
        ("lock_timeout", Move.UNKNOWN),
        ("idempotency_key_in_use", Move.UNKNOWN),
        ("too_many_concurrent_requests", Move.UNKNOWN),
    ],
)
def test_a_code_that_speaks_of_now_is_not_final_whatever_its_status(
    sandbox: StripeSandbox, gateway: Gateway, code: str, move: Move
) -> None:
    sandbox.fail(refuse(400, code=code), path="/v1/billing/meter_events")
    assert gateway.send(event(sandbox), 0).move is move


@pytest.mark.parametrize("said", ["²", "9" * 5000, "-1", "soon", ""])
def test_a_retry_after_that_is_no_number_of_seconds_says_nothing(said: str) -> None:
    outcome = classify(stripe.RateLimitError("Slow down", http_status=429, headers={"Retry-After": said}))
    assert (outcome.move, outcome.retry_after) == (Move.REFUSED_FOR_NOW, None)


def test_retry_after_is_heard_and_the_sdk_itself_never_retries(sandbox: StripeSandbox, gateway: Gateway) -> None:
    sandbox.fail(rate_limited(retry_after=7), path="/v1/billing/meter_events")
    assert gateway.send(event(sandbox), 0).retry_after == 7
    assert sum(request.path == "/v1/billing/meter_events" for request in sandbox.requests) == 1


def test_a_refused_connection_is_a_definite_refusal(sandbox: StripeSandbox, gateway: Gateway) -> None:
    sandbox.stop()
    assert gateway.send(event(sandbox), 0).move is Move.REFUSED_FOR_NOW


def test_a_meters_own_payload_keys_are_used(sandbox: StripeSandbox, gateway: Gateway) -> None:
    sandbox.create_meter("custom", customer_key="who", value_key="amount")
    assert gateway.send(event(sandbox, event_name="custom"), 0).move is Move.ACCEPTED
    assert sandbox.events[-1].payload == {"who": "cus_1", "amount": "12.5"}


def test_a_key_that_may_only_write_events_still_sends(sandbox: StripeSandbox) -> None:
    sandbox.allow("rk_test_writer", {"meter_events:write"})
    gateway = Gateway("rk_test_writer", api_base=sandbox.url)
    assert gateway.meter("ai_tokens") is None
    assert gateway.can_read_meters() is False
    assert gateway.send(event(sandbox), 0).move is Move.ACCEPTED
    with pytest.raises(StripeError, match="look up a customer by email"):
        gateway.find_customers(Reference("email", "ann@example.com"))
    gateway.close()


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        (Reference("email", "ann@example.com"), ["cus_1"]),
        (Reference("email", "ANN@example.com"), []),
        (Reference("name", "Ann Smith"), ["cus_1"]),
        (Reference("name", "ann smith"), []),
        (Reference("name", "Ann"), []),
        (Reference("phone", "+49 151 12345678"), ["cus_1"]),
    ],
)
def test_a_customer_is_found_only_by_exact_equality(gateway: Gateway, reference: Reference, found: list[str]) -> None:
    assert gateway.find_customers(reference) == found


@pytest.mark.parametrize("given", ["pk_test_1", "sk_test_1\nX: y", "whsec_1", " sk_test_1"])
def test_a_key_that_cannot_work_is_refused_without_being_repeated(given: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_key(given)
    assert given not in str(refused.value)


def test_no_message_or_repr_shows_the_key(sandbox: StripeSandbox, tmp_path: Path) -> None:
    handler = StripeMeterCallbackHandler(
        Tokens("t"), customer="cus_1", stripe="sk_test_verysecretindeed", ledger=f"sqlite:///{tmp_path}/l.db"
    )
    with handler:
        assert "verysecret" not in repr(handler) + repr(handler.leads) + repr(handler.status())


def test_nothing_of_a_customer_reaches_any_log_while_strangers_requests_are_still_logged(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert gateway.find_customers(Reference("email", "ann@example.com")) == ["cus_1"]
    assert "ann" not in caplog.text
    gateway.client.v1.customers.list({"email": "somebody.else@example.com"})
    assert "somebody.else" in caplog.text
