"""The "Stripe Meter Event" workflow component: one Runnable that sends one meter event and says what came of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel, Field, WithJsonSchema

from langchain_stripe_meter.core.events import (
    MeterEvent,
    check_account,
    check_customer_id,
    check_event_name,
    check_identifier,
    check_timestamp,
    check_value,
)
from langchain_stripe_meter.core.states import Move
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError
from langchain_stripe_meter.gateway.client import Gateway, check_key

if TYPE_CHECKING:
    from stripe import StripeClient

_FIELDS: dict[str, Callable[[Any], Any]] = {
    "event_name": check_event_name,
    "customer_id": check_customer_id,
    "value": check_value,
}


_ERROR_TYPES = {
    Move.REFUSED: "rejected",
    Move.UNSEAL: "rejected",
    Move.UNAUTHORISED: "unauthorised",
    Move.NO_ACCESS: "unauthorised",
    Move.REFUSED_FOR_NOW: "unavailable",
    Move.UNKNOWN: "unknown_outcome",
}


_NEXT_STEPS = {
    "rejected": "Look at the meter and the customer in Stripe, or correct this input.",
    "unauthorised": "Use a key that is in use and has 'Billing meter events: Write'.",
    "unavailable": "Try again later, with the same identifier.",
    "unknown_outcome": "Try again with the same identifier, within a day: nothing is billed twice.",
}

_DIGITS = 12
"""No time has more, in seconds."""

_Text = Annotated[Any, WithJsonSchema({"type": "string"})]
_Number = Annotated[Any, WithJsonSchema({"type": "number"})]
_TextIfAny = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})]
_WholeIfAny = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "null"}]})]


class MeterEventInput(BaseModel):
    """The component's inputs, as a tool's schema shows them; what is wrong with one is said in the response."""

    event_name: _Text = Field(description="Event name of the Stripe meter, at most 100 characters.")
    customer_id: _Text = Field(description="Stripe customer id, such as 'cus_NffrFeUfNV2Hib'.")
    value: _Number = Field(description="How much to add, at most 15 significant digits; negative to correct.")
    identifier: _TextIfAny = Field(
        default=None, description="At most 100 characters; the same identifier is not billed twice. Default: random."
    )
    timestamp: _WholeIfAny = Field(default=None, description="Unix seconds, within the past 35 days; default now.")


class StripeMeterEvent(Runnable[Any, dict[str, Any]]):
    """Sends one meter event to Stripe, at once and without a ledger.

    Input: a mapping, or a graph's state of any kind, with ``event_name``, ``customer_id``, ``value`` and optionally
    ``identifier`` and ``timestamp``; other keys are left alone. Output:
    ``{"success": True, "response": <the event object>}``, or
    ``{"success": False, "response": {"error": {...}}}`` with ``type``, ``message``, ``field`` (for bad input),
    ``retryable`` and ``identifier``. It never raises for its input or for Stripe, so that the next step can branch.

    Give an ``identifier`` to make a step repeatable: Stripe remembers it for a day, and a repetition then succeeds
    without billing again. Its response has ``"duplicate": True`` and no payload: what counts is what Stripe got first,
    also where this input says something else. Without an identifier, every call bills.

    ``stripe`` is an API key or a ``stripe.StripeClient``; by default ``$STRIPE_API_KEY``, read when it runs.
    ``stripe_account`` (``acct_…``) bills on a connected account.
    """

    def __init__(
        self,
        *,
        stripe: str | StripeClient | None = None,
        stripe_account: str = "",
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.name = "stripe_meter_event"
        if stripe is not None and not isinstance(stripe, str):
            check_key(stripe)
        self._stripe = stripe
        self._account = check_account(stripe_account)
        self._clock = clock
        self._gateway: Gateway | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """The inputs, for ``as_tool()``."""
        return MeterEventInput

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Send the event that ``input`` describes."""
        return self._call_with_config(self._run, input, config, run_type="tool")

    def _run(self, given: Any) -> dict[str, Any]:
        identifier = None
        try:
            event = self._event(given)
            identifier = event.identifier
            gateway = self._open()
        except _BadFieldError as bad:
            return _failure("invalid_input", str(bad), field=bad.field, retryable=False)
        except ConfigurationError as error:
            return _failure("configuration", str(error), identifier=identifier, retryable=False)
        return _send(gateway, event)

    def _open(self) -> Gateway:
        if self._gateway is None:
            self._gateway = Gateway(self._stripe)
        return self._gateway

    def _event(self, given: Any) -> MeterEvent:
        values = given.model_dump() if isinstance(given, BaseModel) else given
        if is_dataclass(given) and not isinstance(given, type):
            values = {name: getattr(given, name, None) for name in MeterEventInput.model_fields}
        if not isinstance(values, Mapping):
            raise _BadFieldError("input", "the input must be a mapping with event_name, customer_id and value")
        checked = {name: _checked(name, check, values.get(name)) for name, check in _FIELDS.items()}
        now = int((self._clock or time.time)())
        timestamp = values.get("timestamp")
        identifier = values.get("identifier")
        return MeterEvent(
            event_name=checked["event_name"],
            customer=checked["customer_id"],
            value=checked["value"],
            identifier=uuid.uuid4().hex if identifier is None else _checked("identifier", check_identifier, identifier),
            timestamp=now if timestamp is None else _checked("timestamp", partial(_timestamp, now), timestamp),
            account=self._account,
        )


def _timestamp(now: int, given: Any) -> int:
    """The steps of a workflow may hand on text, and models write whole numbers with a point."""
    if isinstance(given, str) and given.isdecimal() and len(given) <= _DIGITS:
        given = int(given)
    return check_timestamp(int(given) if isinstance(given, float) and given.is_integer() else given, now)


class _BadFieldError(Exception):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _checked(name: str, check: Callable[[Any], Any], value: Any) -> Any:
    if value is None:
        raise _BadFieldError(name, f"{name} is missing")
    try:
        return check(value)
    except InvalidValueError as error:
        raise _BadFieldError(name, str(error)) from error


def _send(gateway: Gateway, event: MeterEvent) -> dict[str, Any]:
    outcome, answer = gateway.send_once(event)
    if outcome.move is Move.ACCEPTED:
        return {"success": True, "response": answer}
    if outcome.move is Move.DUPLICATE:
        return {"success": True, "response": _known_already(event)}
    kind = _ERROR_TYPES[outcome.move]
    return _failure(
        kind,
        f"{outcome.message.rstrip('.')}. {_NEXT_STEPS[kind]}",
        identifier=event.identifier,
        retryable=outcome.move in (Move.UNKNOWN, Move.REFUSED_FOR_NOW),
        request_id=outcome.request_id,
    )


def _known_already(event: MeterEvent) -> dict[str, Any]:
    """What is certain of an event whose identifier Stripe has: it does not return the one that it got first."""
    return {
        "object": "billing.meter_event",
        "event_name": event.event_name,
        "identifier": event.identifier,
        "duplicate": True,
        "message": "Stripe has an event with this identifier already, and keeps what it got first.",
    }


def _failure(type: str, message: str, **details: Any) -> dict[str, Any]:
    known = {name: value for name, value in details.items() if value is not None}
    return {"success": False, "response": {"error": {"type": type, "message": message, **known}}}
