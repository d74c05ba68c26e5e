"""The real Stripe client, pointed at a sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import stripe

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from langchain_stripe_meter.sandbox import RecordedRequest, StripeSandbox

stripe.enable_telemetry = False


def client_of(sandbox: StripeSandbox, key: str | None = None, **options: Any) -> stripe.StripeClient:
    """A client for ``key``, by default the sandbox's own."""
    addresses: Any = {"api": sandbox.url, "meter_events": sandbox.url}
    return stripe.StripeClient(key or sandbox.api_key, max_network_retries=0, base_addresses=addresses, **options)


def send(client: stripe.StripeClient, customer: str, value: object = 1, key: str = "", **fields: Any) -> Any:
    """Send one meter event for ``ai_tokens``; ``key`` is its idempotency key."""
    payload = {"stripe_customer_id": customer, "value": str(value)}
    params: Any = {"event_name": "ai_tokens", "payload": payload, **fields}
    return client.v1.billing.meter_events.create(params, {"idempotency_key": key} if key else {})


def refusal(call: Any, *arguments: Any, **keywords: Any) -> stripe.StripeError:
    """The error with which Stripe answers a call."""
    with pytest.raises(stripe.StripeError) as caught:
        call(*arguments, **keywords)
    return caught.value


def words(error: stripe.StripeError) -> str:
    """What Stripe says, without the request id."""
    return str(error.user_message)


def setting(flag: threading.Event) -> Callable[[RecordedRequest], bool]:
    """A fault's condition that is always true, and says that a request has arrived."""

    def hits(_: RecordedRequest) -> bool:
        flag.set()
        return True

    return hits
