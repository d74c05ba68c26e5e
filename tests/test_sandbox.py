"""The sandbox keeps Stripe's rules for meter events (v1), seen through the real client."""

from __future__ import annotations

import json
import threading
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import stripe
from freezegun import freeze_time
from sandbox_client import client_of, refusal, send, setting, words

from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.sandbox import StripeSandbox, hang

if TYPE_CHECKING:
    from collections.abc import Iterator

DAY = 86_400
SPEC = Path(__file__).parents[2] / "shared" / "spec" / "stripe-meters.subset.json"


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        yield sandbox


@pytest.fixture
def client(sandbox: StripeSandbox) -> stripe.StripeClient:
    return client_of(sandbox)


@pytest.fixture
def ann(sandbox: StripeSandbox) -> str:
    return sandbox.create_customer(email="ann@example.com")


class TestAnAcceptedEvent:
    def test_is_billed_to_its_customer(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        bob = sandbox.create_customer()
        send(client, ann, 500)
        send(client, ann, "0.25")
        send(client, bob, 7)
        assert sandbox.billed("ai_tokens", ann) == Decimal("500.25")
        assert sandbox.billed("ai_tokens") == {ann: Decimal("500.25"), bob: Decimal(7)}

    @freeze_time("2027-01-15T08:00:00Z")
    def test_is_answered_with_the_event_and_no_id(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        answer = send(client, ann, 5, identifier="run-1", timestamp=1_799_999_990).to_dict()
        assert answer == {
            "object": "billing.meter_event",
            "created": 1_800_000_000,
            "event_name": "ai_tokens",
            "identifier": "run-1",
            "livemode": False,
            "payload": {"stripe_customer_id": ann, "value": "5"},
            "timestamp": 1_799_999_990,
        }

    @freeze_time("2027-01-15T08:00:00Z")
    def test_gets_an_identifier_and_the_present_time_when_it_has_none(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        first, second = send(client, ann), send(client, ann)
        assert first.timestamp == 1_800_000_000
        assert first.identifier != second.identifier

    def test_is_listed_with_its_payload(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        payload = {"stripe_customer_id": ann, "value": "3", "model": "gpt-4o [new] & more"}
        client.v1.billing.meter_events.create({"event_name": "ai_tokens", "payload": payload})
        (event,) = sandbox.events
        assert (event.customer, event.value, event.payload) == (ann, Decimal(3), payload)

    def test_may_be_negative_but_a_negative_total_bills_as_nothing(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann, 5)
        send(client, ann, -2)
        assert sandbox.billed("ai_tokens", ann) == 3
        send(client, ann, -10)
        assert sandbox.billed("ai_tokens", ann) == 0

    def test_is_taken_under_the_keys_that_the_meter_was_created_with(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.create_meter("minutes", customer_key="who", value_key="amount")
        client.v1.billing.meter_events.create({"event_name": "minutes", "payload": {"who": ann, "amount": "4"}})
        assert sandbox.billed("minutes", ann) == 4


class TestADuplicateIdentifier:
    def test_is_an_error_that_must_not_be_retried(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann, 5, identifier="run-1")
        error = refusal(send, client, ann, 5, identifier="run-1")
        assert isinstance(error, stripe.InvalidRequestError)
        assert (error.http_status, error.code) == (400, None)
        assert words(error) == "An event already exists with identifier run-1."
        assert (error.headers or {})["stripe-should-retry"] == "false"
        assert sandbox.billed("ai_tokens", ann) == 5

    def test_is_billed_again_after_24_hours(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.set_time(1_800_000_000)
        send(client, ann, 5, identifier="run-1")
        sandbox.set_time(1_800_000_000 + DAY - 60)
        refusal(send, client, ann, 5, identifier="run-1")
        sandbox.set_time(1_800_000_000 + DAY + 60)
        send(client, ann, 5, identifier="run-1")
        assert sandbox.billed("ai_tokens", ann) == 10

    def test_is_one_for_all_customers_and_meters(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann, identifier="run-1")
        assert "already exists" in words(refusal(send, client, sandbox.create_customer(), identifier="run-1"))


class TestARefusedEvent:
    @pytest.mark.parametrize(
        ("params", "expected"),
        [
            ({"mode": "x"}, ("parameter_unknown", "Received unknown parameter: mode")),
            ({"event_name": None}, ("parameter_missing", "Missing required param: event_name.")),
            ({"payload": None}, ("parameter_missing", "Missing required param: payload.")),
            ({"event_name": ""}, ("parameter_invalid_empty", "You passed an empty string for 'event_name'")),
            ({"event_name": "x" * 101}, (None, "must be at most 100 characters")),
            ({"identifier": "x" * 101}, (None, "must be at most 100 characters")),
            ({"timestamp": "noon"}, ("parameter_invalid_integer", "Invalid integer: noon")),
            ({"payload": "flat"}, ("parameter_invalid_object", "Invalid object")),
            ({"payload": {"deep": {"er": "1"}}}, (None, "must be a string")),
        ],
    )
    def test_names_the_parameter_that_is_wrong(
        self,
        sandbox: StripeSandbox,
        client: stripe.StripeClient,
        ann: str,
        params: dict[str, Any],
        expected: tuple[str | None, str],
    ) -> None:
        code, message = expected
        error = refusal(send, client, ann, **params)
        assert (error.http_status, error.code) == (400, code)
        assert message in words(error)
        assert sandbox.events == []

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            ({"value": "1"}, "does not have the key 'stripe_customer_id'"),
            ({"stripe_customer_id": "ANN"}, "does not have the key 'value'"),
            ({"stripe_customer_id": "ANN", "value": "many"}, "plain decimal notation"),
            ({"stripe_customer_id": "ANN", "value": "1e3"}, "plain decimal notation"),
            ({"stripe_customer_id": "ANN", "value": "NaN"}, "plain decimal notation"),
            ({"stripe_customer_id": "ANN", "value": "1234567890123456"}, "at most 15 significant digits"),
            ({"stripe_customer_id": "ANN", "value": "0." + "0" * 250 + "1"}, "at most 15 significant digits"),
        ],
    )
    def test_names_what_its_payload_lacks(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str, payload: dict[str, str], message: str
    ) -> None:
        payload = {key: ann if value == "ANN" else value for key, value in payload.items()}
        error = refusal(client.v1.billing.meter_events.create, {"event_name": "ai_tokens", "payload": payload})
        assert error.http_status == 400
        assert message in words(error)
        assert sandbox.events == []

    def test_fifteen_digits_are_not_too_many(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann, "12345678901234.5")
        assert sandbox.billed("ai_tokens", ann) == Decimal("12345678901234.5")

    def test_a_timestamp_may_be_35_days_old_and_no_older(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        with freeze_time("2026-06-01T00:00:00Z"):
            limit = sandbox.now() - 35 * DAY
            send(client, ann, timestamp=limit)
            error = refusal(send, client, ann, timestamp=limit - 1)
        assert words(error) == (
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {limit}."
        )

    def test_a_timestamp_may_be_5_minutes_ahead_and_no_more(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        with freeze_time("2026-06-01T00:00:00Z"):
            send(client, ann, timestamp=sandbox.now() + 300)
            error = refusal(send, client, ann, timestamp=sandbox.now() + 301)
        assert "cannot be more than 5 minutes in the future" in words(error)

    def test_an_unknown_meter_is_refused(self, client: stripe.StripeClient, ann: str) -> None:
        error = refusal(send, client, ann, event_name="nope")
        assert words(error) == 'No active meter found for event name "nope".'

    def test_a_deactivated_meter_is_refused_until_it_is_reactivated(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.deactivate_meter("ai_tokens")
        assert "No active meter found" in words(refusal(send, client, ann))
        sandbox.reactivate_meter("ai_tokens")
        send(client, ann, 2)
        assert sandbox.billed("ai_tokens", ann) == 2

    def test_an_unknown_or_deleted_customer_is_refused_at_once(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        error = refusal(send, client, "cus_x")
        assert (words(error), error.code) == ("No such customer: 'cus_x'", "resource_missing")
        sandbox.delete_customer(ann)
        assert words(refusal(send, client, ann)) == f"No such customer: '{ann}'"

    def test_an_unknown_customer_is_reported_later_if_the_sandbox_is_told_so(
        self, sandbox: StripeSandbox, client: stripe.StripeClient
    ) -> None:
        sandbox.customer_check = "async"
        send(client, "cus_x", 5, identifier="run-1")
        (rejection,) = sandbox.rejections
        assert rejection.type == "v1.billing.meter.error_report_triggered"
        assert sandbox.events[0].rejected == "meter_event_customer_not_found"
        assert sandbox.billed("ai_tokens") == {}

    def test_bodies_look_like_stripes(self, client: stripe.StripeClient, ann: str) -> None:
        error = refusal(send, client, ann, mode="x")
        assert error.json_body == {
            "error": {
                "type": "invalid_request_error",
                "code": "parameter_unknown",
                "message": "Received unknown parameter: mode",
                "param": "mode",
            }
        }


def test_stripe_takes_one_call_at_a_time_per_customer_and_meter(
    sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
) -> None:
    bob = sandbox.create_customer()
    go, arrived = threading.Event(), threading.Event()
    sandbox.fail(hang(go), where=setting(arrived))
    first = threading.Thread(target=send, args=(client, ann, 1))
    first.start()
    assert arrived.wait(60)
    error = refusal(send, client, ann, 2)
    send(client, bob, 4)
    go.set()
    first.join()
    assert isinstance(error, stripe.RateLimitError)
    assert error.error is not None
    assert error.error.code == "lock_timeout"
    assert sandbox.billed("ai_tokens") == {ann: 1, bob: 4}


class TestACancellation:
    def test_takes_an_event_back(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, 5, identifier="run-1")
        answer = _cancel(client, "run-1")
        assert (answer.object, answer.type, answer.cancel.identifier) == (
            "billing.meter_event_adjustment",
            "cancel",
            "run-1",
        )
        assert sandbox.billed("ai_tokens", ann) == 0

    def test_comes_too_late_after_24_hours(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, 5, identifier="run-1")
        sandbox.advance(hours=24, seconds=1)
        assert "more than 24 hours ago" in words(refusal(_cancel, client, "run-1"))
        assert sandbox.billed("ai_tokens", ann) == 5

    def test_of_what_is_not_there_is_refused(self, client: stripe.StripeClient, ann: str) -> None:
        assert refusal(_cancel, client, "nope").http_status == 404
        send(client, ann, identifier="run-1")
        _cancel(client, "run-1")
        assert "already been cancelled" in words(refusal(_cancel, client, "run-1"))


def _cancel(client: stripe.StripeClient, identifier: str) -> Any:
    return client.v1.billing.meter_event_adjustments.create(
        {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": identifier}}
    )


@freeze_time("2027-01-15T08:00:00Z")
def test_every_answer_names_the_request_and_the_sandboxs_time(
    sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
) -> None:
    headers = send(client, ann).last_response.headers
    assert headers["Request-Id"].startswith("req_")
    assert headers["Date"] == "Fri, 15 Jan 2027 08:00:00 GMT"


def test_the_clock_follows_freezegun_and_can_be_moved(sandbox: StripeSandbox) -> None:
    with freeze_time("2026-01-01T00:00:00Z") as frozen:
        assert sandbox.now() == 1_767_225_600
        sandbox.advance(days=1, hours=1, seconds=1)
        assert sandbox.now() == 1_767_225_600 + DAY + 3601
        frozen.tick(10)
        assert sandbox.now() == 1_767_225_600 + DAY + 3611


def test_requests_are_recorded_as_they_came(sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
    send(client, ann, 5, key="k-1")
    refusal(send, client, "cus_x")
    first, second = sandbox.requests
    assert (first.method, first.path, first.status) == ("POST", "/v1/billing/meter_events", 200)
    assert first.params == {"event_name": "ai_tokens", "payload": {"stripe_customer_id": ann, "value": "5"}}
    assert first.headers["idempotency-key"] == "k-1"
    assert second.status == 400


def test_what_a_test_sets_up_wrongly_raises_at_once(sandbox: StripeSandbox) -> None:
    with pytest.raises(StripeError, match="already an active meter"):
        sandbox.create_meter("ai_tokens")
    with pytest.raises(ConfigurationError, match="no meter with the event name"):
        sandbox.deactivate_meter("nope")
    with pytest.raises(ConfigurationError, match="before it was started"):
        _ = StripeSandbox().url


@pytest.mark.skipif(not SPEC.exists(), reason="Stripe's schemas are not at hand")
def test_what_the_real_client_sends_is_what_stripes_schemas_describe() -> None:
    with StripeSandbox(api_key="sk_live_sandbox") as sandbox:  # the stream is there in live mode only
        sandbox.create_meter("ai_tokens")
        _make_one_call_of_each_kind(client_of(sandbox), sandbox.create_customer())
    paths = json.loads(SPEC.read_text())["paths"]
    bodies = [request for request in sandbox.requests if "requestBody" in paths[request.path]["post"]]
    for request in bodies:
        ((kind, media),) = paths[request.path]["post"]["requestBody"]["content"].items()
        body = request.params if "json" in kind else _typed(request.params, media["schema"])
        jsonschema.validate(body, media["schema"])
    assert len(bodies) == 6


def _make_one_call_of_each_kind(client: stripe.StripeClient, ann: str) -> None:
    billing = client.v1.billing
    payload = {"stripe_customer_id": ann, "value": "1"}
    client.v1.billing.meters.create(
        {
            "display_name": "Messages",
            "event_name": "messages",
            "default_aggregation": {"formula": "sum"},
            "customer_mapping": {"event_payload_key": "stripe_customer_id", "type": "by_id"},
        }
    )
    billing.meter_events.create(
        {"event_name": "ai_tokens", "payload": payload, "identifier": "run-1", "expand": ["payload"]}
    )
    _cancel(client, "run-1")
    event: Any = {"event_name": "ai_tokens", "payload": payload, "timestamp": "2026-11-20T00:00:00Z"}
    session = client.v2.billing.meter_event_session.create()
    client.v2.billing.meter_event_stream.create({"events": [event]}, {"api_key": session.authentication_token})
    client.v2.billing.meter_event_adjustments.create(
        {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": send(client, ann).identifier}}
    )


def _typed(params: Any, schema: dict[str, Any]) -> Any:
    """A form body with the types that its schema gives to text."""
    if schema.get("type") == "integer":
        return int(params)
    if schema.get("type") == "array":
        return list(params.values())
    known = schema.get("properties", {})
    return {k: _typed(v, known[k]) for k, v in params.items() if k in known} if known else params


def test_an_id_that_is_no_customers_is_refused(sandbox: StripeSandbox) -> None:
    with pytest.raises(ConfigurationError, match="is not a Stripe customer id"):
        sandbox.create_customer(id="x")
