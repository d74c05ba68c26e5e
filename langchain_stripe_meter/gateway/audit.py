"""What is asked of Stripe about events that it has taken: notifications, sums over all meters of a name, cancelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.core.totals import Report, read_report
from langchain_stripe_meter.errors import InvalidValueError
from langchain_stripe_meter.gateway.client import Gateway, as_stripe_error, on_account

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
    import stripe

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


def meters_named(gateway: Gateway, account: str) -> dict[str, list[str]]:
    """The ids of all meters of an account by event name: one that was archived keeps what it was sent."""
    named: dict[str, list[str]] = {}
    for meter in gateway.meters(account):
        named.setdefault(meter.event_name, []).append(meter.id)
    return named


def billed_on(
    gateway: Gateway, meters: list[str], customer: str, span: tuple[int, int], account: str
) -> Decimal | None:
    """What Stripe has summed up on all of these meters from the first to the second time of ``span``.

    None where it cannot be asked of one of them.
    Raises ``StripeError`` where it does not answer.
    """
    sums = [gateway.billed(meter, customer, *span, account) for meter in meters]
    known = [one for one in sums if one is not None]
    return sum(known, Decimal(0)) if len(known) == len(sums) else None


def cancel(gateway: Gateway, event_name: str, identifier: str, account: str) -> Outcome:
    """Cancel an event that Stripe received within the last 24 hours; never raises.

    ``ACCEPTED`` also where it is cancelled already, ``REFUSED`` for a definite no.
    """
    wish: Any = {"event_name": event_name, "type": "cancel", "cancel": {"identifier": identifier}}
    try:
        with as_stripe_error("cancel the meter event"):
            gateway.client.v1.billing.meter_event_adjustments.create(wish, on_account(account))
    except Exception as error:  # noqa: BLE001 - every failure has a meaning, and it is told
        outcome = gateway.outcome_of(error)
        if outcome.move in (Move.REFUSED, Move.UNSEAL) and _is_cancelled(outcome.message):
            return Outcome(Move.ACCEPTED, outcome.message)
        return Outcome(Move.REFUSED, outcome.message) if outcome.move is Move.UNSEAL else outcome
    return Outcome(Move.ACCEPTED)


def _is_cancelled(said: str) -> bool:
    """Stripe has no code for it, only words, in either spelling."""
    said = said.lower()
    return "already" in said and ("cancelled" in said or "canceled" in said)
