"""Stripe's notifications (thin events): whether one is Stripe's, and what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import stripe

from langchain_stripe_meter.core.totals import Report, read_report
from langchain_stripe_meter.errors import InvalidValueError
from langchain_stripe_meter.gateway.client import Gateway, as_stripe_error

TOLERANCE = 300
"""Seconds by which a notification's date may differ from now."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A notification whose signature is right. It says what happened, not to what: ``fetch`` asks Stripe.

    ``account`` is the connected account that it concerns, or ``""``; ``meter`` the meter's id, where there is one.
    """

    id: str
    type: str
    account: str
    livemode: bool
    meter: str | None
    fetch: Callable[[int], Report] = field(repr=False)


def read_notice(gateway: Gateway, raw: bytes, signature: str, secret: str) -> Notice:
    """Check a notification's signature and read it. ``InvalidValueError`` says why it is none of Stripe's.

    Stripe's own check: it refuses dates of more than ``TOLERANCE`` seconds ago, but none in the future.
    """
    try:
        told: Any = gateway.client.parse_event_notification(raw, signature, secret, TOLERANCE)
        return _notice(told)
    except stripe.SignatureVerificationError as error:
        raise InvalidValueError("The signature is not this endpoint's: forged, changed, or another secret.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidValueError(
            "The body is no thin event. Set the event destination's payload style to thin in Stripe."
        ) from error


def _notice(told: Any) -> Notice:
    related = getattr(told, "related_object", None)
    context = str(told.context or "").rpartition("/")[2]
    if not isinstance(told.id, str) or not 0 < len(told.id) <= 255 or not isinstance(told.type, str):
        raise ValueError("no id or type")
    return Notice(
        id=told.id,
        type=told.type,
        account=context if context.startswith("acct_") else "",
        livemode=told.livemode,
        meter=getattr(related, "id", None),
        fetch=lambda now: _fetch(told, now),
    )


def _fetch(told: Any, now: int) -> Report:
    with as_stripe_error("fetch the event of a notification"):
        event = told.fetch_event()
    data = event.to_dict().get("data")
    return read_report(data if isinstance(data, Mapping) else {}, now)
