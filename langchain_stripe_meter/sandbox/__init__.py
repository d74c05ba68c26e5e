"""A local Stripe for tests and demos: the real ``stripe`` client talks to it, and no account is needed.

    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        customer = sandbox.create_customer(email="ann@example.com")
        ...
        assert sandbox.billed("ai_tokens", customer) == 500

It enforces Stripe's published rules for billing meters, and fails on request: ``sandbox.fail(drop_answer())``.
"""

from langchain_stripe_meter.sandbox.faults import (
    Fault,
    broken_body,
    delay,
    drop_answer,
    drop_request,
    hang,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)
from langchain_stripe_meter.sandbox.rules import AcceptedEvent, Meter, Rejection
from langchain_stripe_meter.sandbox.stripe_sandbox import AccountHandle, StripeSandbox
from langchain_stripe_meter.sandbox.wire import RecordedRequest

__all__ = [
    "AcceptedEvent",
    "AccountHandle",
    "Fault",
    "Meter",
    "RecordedRequest",
    "Rejection",
    "StripeSandbox",
    "broken_body",
    "delay",
    "drop_answer",
    "drop_request",
    "hang",
    "rate_limited",
    "refuse",
    "server_error",
    "server_error_after_accept",
]
