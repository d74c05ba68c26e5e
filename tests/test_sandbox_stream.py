"""API v2 in the sandbox: single events, the stream and its sessions, asynchronous error reports."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import stripe
from freezegun import freeze_time
from sandbox_client import client_of, refusal, send, words

from langchain_stripe_meter.sandbox import Rejection, StripeSandbox, rate_limited, server_error

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAM = "/v2/billing/meter_event_stream"
V2_EVENTS = "/v2/billing/meter_events"


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox(api_key="sk_live_sandbox") as sandbox:
        sandbox.create_meter("ai_tokens")
        yield sandbox


@pytest.fixture
def client(sandbox: StripeSandbox) -> stripe.StripeClient:
    return client_of(sandbox)


@pytest.fixture
def ann(sandbox: StripeSandbox) -> str:
    return sandbox.create_customer(email="ann@example.com")


def event(customer: str, value: object = "1", **fields: Any) -> Any:
    return {"event_name": "ai_tokens", "payload": {"stripe_customer_id": customer, "value": value}, **fields}


def stream(client: stripe.StripeClient, *events: Any, token: str | None = None) -> None:
    token = token or client.v2.billing.meter_event_session.create().authentication_token
    client.v2.billing.meter_event_stream.create({"events": list(events)}, {"api_key": token})


def codes(rejection: Rejection) -> dict[str, int]:
    return {kind["code"]: kind["error_count"] for kind in rejection.data["reason"]["error_types"]}


class TestASingleV2Event:
    @freeze_time("2027-01-15T08:00:00Z")
    def test_is_billed_and_answered_with_rfc3339_times(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        answer = client.v2.billing.meter_events.create(event(ann, "5", timestamp="2027-01-15T07:59:00+00:00"))
        assert (answer.created, answer.timestamp) == ("2027-01-15T08:00:00.000Z", "2027-01-15T07:59:00.000Z")
        assert sandbox.billed("ai_tokens", ann) == 5

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"event_name": "nope"}, "no_meter"),
            ({"payload": {"value": "1"}}, "payload_no_customer_defined"),
            ({"payload": {"stripe_customer_id": "cus_x"}}, "payload_no_value_defined"),
            ({"payload": {"stripe_customer_id": "cus_x", "value": "1e9"}}, "payload_invalid_value"),
            ({"identifier": "seen"}, "duplicate_meter_event"),
            ({"timestamp": "2001-01-01T00:00:00Z"}, "timestamp_too_far_in_past"),
        ],
    )
    def test_is_refused_with_v2s_codes(
        self, client: stripe.StripeClient, ann: str, change: dict[str, Any], code: str
    ) -> None:
        client.v2.billing.meter_events.create(event(ann, identifier="seen"))
        error = refusal(client.v2.billing.meter_events.create, {**event(ann), **change})
        assert (error.http_status, error.code) == (400, code)
        assert error.json_body == {"error": {"code": code, "message": words(error)}}

    def test_of_an_archived_meter_is_refused(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.deactivate_meter("ai_tokens")
        assert refusal(client.v2.billing.meter_events.create, event(ann)).code == "archived_meter"

    def test_for_an_unknown_customer_is_reported_later(
        self, sandbox: StripeSandbox, client: stripe.StripeClient
    ) -> None:
        client.v2.billing.meter_events.create(event("cus_x"))
        assert codes(sandbox.rejections[0]) == {"meter_event_customer_not_found": 1}

    def test_shares_identifiers_with_v1(self, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, identifier="run-1")
        error = refusal(client.v2.billing.meter_events.create, event(ann, identifier="run-1"))
        assert error.code == "duplicate_meter_event"

    def test_is_replayed_for_its_key_only_if_it_succeeded(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(server_error(), path=V2_EVENTS)
        refusal(client.v2.billing.meter_events.create, event(ann), {"idempotency_key": "k"})
        for _ in range(2):
            client.v2.billing.meter_events.create(event(ann), {"idempotency_key": "k"})
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_can_be_cancelled(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        client.v2.billing.meter_events.create(event(ann, identifier="run-1"))
        answer = client.v2.billing.meter_event_adjustments.create(
            {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": "run-1"}}
        )
        assert (answer.object, answer.cancel.identifier) == ("v2.billing.meter_event_adjustment", "run-1")
        assert sandbox.billed("ai_tokens", ann) == 0

    def test_meets_faults_in_v2s_shape(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.fail(rate_limited(), path=V2_EVENTS)
        error = refusal(client.v2.billing.meter_events.create, event(ann))
        assert isinstance(error, stripe.RateLimitError)


class TestTheStream:
    def test_bills_what_it_is_sent(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        now = datetime.fromtimestamp(sandbox.now(), UTC).isoformat()
        stream(client, event(ann, "5", identifier="a", timestamp=now), event(ann, "0.5", identifier="b"))
        assert str(sandbox.billed("ai_tokens", ann)) == "5.5"

    def test_drops_duplicates_in_silence(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, 5, identifier="a")
        stream(
            client, event(ann, "5", identifier="a"), event(ann, "2", identifier="b"), event(ann, "2", identifier="b")
        )
        assert sandbox.billed("ai_tokens", ann) == 7
        assert sandbox.rejections == []

    @pytest.mark.parametrize(
        "change",
        [
            {"timestamp": datetime(2026, 11, 20, tzinfo=UTC)},
            {"timestamp": 1_800_000_000},
            {"timestamp": "2026-11-20"},
            {"payload": {"stripe_customer_id": "cus_x", "value": 5}},
            {"event_name": None},
            {"expand": ["payload"]},
        ],
    )
    def test_refuses_the_whole_batch_for_a_wrong_shape(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str, change: dict[str, Any]
    ) -> None:
        error = refusal(stream, client, event(ann), {**event(ann), **change})
        assert isinstance(error, stripe.InvalidRequestError)
        assert sandbox.events == []

    def test_takes_100_events_and_no_more(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        stream(client, *[event(ann)] * 100)
        assert refusal(stream, client, *[event(ann)] * 101).http_status == 400
        assert sandbox.billed("ai_tokens", ann) == 100

    def test_reports_everything_else_later(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.create_meter("old")
        sandbox.deactivate_meter("old")
        stream(
            client,
            event(ann, "1"),
            event(ann, "1e5"),
            event(ann, "1234567890123456"),
            event("cus_x", "1"),
            event("", "1"),
            event(ann, ""),
            event(ann, timestamp="2001-01-01T00:00:00Z"),
            event(ann, timestamp="2101-01-01T00:00:00Z"),
            {**event(ann), "event_name": "old"},
            {**event(ann), "event_name": "nope"},
        )
        bad, archived, unknown = sandbox.rejections
        assert codes(bad) == dict.fromkeys(
            [
                "meter_event_invalid_value",
                "meter_event_value_too_many_digits",
                "meter_event_customer_not_found",
                "meter_event_no_customer_defined",
                "meter_event_value_not_found",
                "timestamp_too_far_in_past",
                "timestamp_in_future",
            ],
            1,
        )
        assert (codes(archived), codes(unknown)) == ({"archived_meter": 1}, {"no_meter": 1})
        assert (unknown.type, unknown.meter) == ("v1.billing.meter.no_meter_found", None)
        assert sandbox.billed("ai_tokens") == {ann: 1}

    def test_is_there_in_live_mode_only(self) -> None:
        with StripeSandbox() as sandbox:
            error = refusal(client_of(sandbox).v2.billing.meter_event_session.create)
        assert error.http_status == 400
        assert "live mode" in words(error)

    @freeze_time("2027-01-15T08:00:00Z")
    def test_needs_a_token_that_is_less_than_15_minutes_old(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        session = client.v2.billing.meter_event_session.create()
        assert session.expires_at == "2027-01-15T08:15:00.000Z"
        stream(client, event(ann), token=session.authentication_token)
        sandbox.advance(seconds=900)
        error = refusal(stream, client, event(ann), token=session.authentication_token)
        assert isinstance(error, stripe.TemporarySessionExpiredError)
        assert error.http_status == 401
        assert isinstance(refusal(stream, client, event(ann), token=sandbox.api_key), stripe.AuthenticationError)
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_of_a_connected_account_bills_there(self, sandbox: StripeSandbox) -> None:
        connected = sandbox.connect("acct_x", livemode=True)
        connected.create_meter("ai_tokens")
        bob = connected.create_customer()
        stream(client_of(sandbox, stripe_account="acct_x"), event(bob))
        assert connected.billed("ai_tokens") == {bob: 1}


class TestAnErrorReport:
    def test_reaches_a_webhook_as_a_signed_thin_event(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        stream(client, event(ann, "x", identifier="run-1"))
        fetched = _through_the_webhook(sandbox, client)
        (kind,) = fetched.data.reason.error_types
        assert (kind.code, kind.error_count) == ("meter_event_invalid_value", 1)
        assert kind.sample_errors[0].request.identifier == "run-1"
        assert fetched.fetch_related_object().event_name == "ai_tokens"

    def test_of_no_meter_has_no_related_object(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        stream(client, {**event(ann, identifier="run-1"), "event_name": "nope"})
        fetched = _through_the_webhook(sandbox, client)
        assert fetched.type == "v1.billing.meter.no_meter_found"
        assert fetched.data.reason.error_types[0].sample_errors[0].request.identifier == "run-1"

    def test_of_a_connected_account_is_fetched_in_its_context(
        self, sandbox: StripeSandbox, client: stripe.StripeClient
    ) -> None:
        connected = sandbox.connect("acct_x", livemode=True)
        connected.create_meter("ai_tokens")
        stream(client_of(sandbox, stripe_account="acct_x"), event("cus_x"))
        raw, signature = sandbox.thin_event(connected.rejections[0])
        notification = client.parse_event_notification(raw, signature, sandbox.webhook_secret)
        assert str(notification.context) == "acct_x"
        assert notification.fetch_event().id == connected.rejections[0].id

    def test_with_a_wrong_signature_is_refused(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        stream(client, event(ann, "x"))
        raw, signature = sandbox.thin_event(sandbox.rejections[0])
        with pytest.raises(stripe.SignatureVerificationError):
            client.parse_event_notification(raw + b" ", signature, sandbox.webhook_secret)
        with pytest.raises(stripe.SignatureVerificationError):
            client.parse_event_notification(raw, signature, "whsec_other")

    def test_names_samples_only(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.error_samples = 1
        stream(client, *[event(ann, "x", identifier=f"run-{n}") for n in range(50)])
        (kind,) = sandbox.rejections[0].data["reason"]["error_types"]
        assert (kind["error_count"], len(kind["sample_errors"])) == (50, 1)

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ("identifier", {"identifier": "run-1"}),
            ("idempotency_key", {"identifier": "k-1"}),
            ("request", {"id": "req_sandbox00000001", "idempotency_key": "k-1"}),
        ],
    )
    def test_names_the_request_in_any_of_the_documented_shapes(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, shape: Any, expected: dict[str, str]
    ) -> None:
        sandbox.customer_check, sandbox.sample_shape = "async", shape
        send(client, "cus_x", key="k-1", identifier="run-1")
        (kind,) = sandbox.rejections[0].data["reason"]["error_types"]
        assert kind["sample_errors"][0]["request"] == expected

    def test_can_be_made_for_events_that_were_billed_already(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann, 5, identifier="a")
        send(client, ann, 2, identifier="b")
        (report,) = sandbox.reject("a", code="meter_event_invalid_value")
        assert codes(report) == {"meter_event_invalid_value": 1}
        assert sandbox.billed("ai_tokens", ann) == 2

    def test_that_is_not_there_is_404(self, client: stripe.StripeClient) -> None:
        assert refusal(client.v2.core.events.retrieve, "evt_x").http_status == 404


def _through_the_webhook(sandbox: StripeSandbox, client: stripe.StripeClient) -> Any:
    raw, signature = sandbox.thin_event(sandbox.rejections[-1])
    return client.parse_event_notification(raw, signature, sandbox.webhook_secret).fetch_event()
