"""Asynchronous error reports: what Stripe says later about events that it took."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import TYPE_CHECKING, Literal

from langchain_stripe_meter.sandbox.replies import Json, rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_stripe_meter.sandbox.records import AcceptedEvent, Rejection

ERROR_REPORT = "v1.billing.meter.error_report_triggered"
NO_METER = "v1.billing.meter.no_meter_found"

SampleShape = Literal["identifier", "idempotency_key", "request"]
"""How a sample names its request: ``{"identifier": the event's}``, ``{"identifier": the idempotency key}``
or ``{"id", "idempotency_key"}``. Stripe documents more than one shape."""


def report_data(events: Sequence[AcceptedEvent], now: int, samples: int, shape: SampleShape) -> Json:
    """The ``data`` of a report: counts per code, and at most ``samples`` of each."""
    by_code: dict[str, list[AcceptedEvent]] = {}
    for event in events:
        by_code.setdefault(event.rejected or "", []).append(event)
    total = len(events)
    return {
        "developer_message_summary": f"There {'is' if total == 1 else 'are'} {total} invalid event{'s'[: total != 1]}",
        "reason": {
            "error_count": total,
            "error_types": [_error_type(code, found, samples, shape) for code, found in by_code.items()],
        },
        "validation_start": rfc3339(min(event.created for event in events)),
        "validation_end": rfc3339(now + 1),
    }


def _error_type(code: str, events: Sequence[AcceptedEvent], samples: int, shape: SampleShape) -> Json:
    return {
        "code": code,
        "error_count": len(events),
        "sample_errors": [
            {"error_message": f"The event was refused: {code}.", "request": _request(event, shape)}
            for event in events[:samples]
        ],
    }


def _request(event: AcceptedEvent, shape: SampleShape) -> Mapping[str, str]:
    if shape == "request":
        return {"id": event.request, "idempotency_key": event.idempotency_key}
    return {"identifier": event.identifier if shape == "identifier" else event.idempotency_key}


def signed(rejection: Rejection, secret: str, now: int) -> tuple[bytes, str]:
    """The webhook request of a thin event: its raw body and its ``Stripe-Signature`` header."""
    body = json.dumps(rejection.notification()).encode()
    signature = hmac.new(secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return body, f"t={now},v1={signature}"
