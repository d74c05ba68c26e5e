"""Stripe's rules for one meter event, in the order in which they are checked.

v1 and v2 refuse at once what ``judge`` finds; the v2 stream takes the event and reports it later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from langchain_stripe_meter.core.events import FUTURE_LIMIT, MAX_DIGITS, PAST_LIMIT, significant_digits
from langchain_stripe_meter.sandbox.replies import Json, StripeRefusalError

if TYPE_CHECKING:
    from langchain_stripe_meter.sandbox.records import Meter

_NUMBER = re.compile(r"-?\d+(\.\d+)?\Z", re.ASCII)
_LONGEST_NUMBER = 200


@dataclass(frozen=True)
class Flaw:
    """Why an event is no good: the asynchronous code, the v2 code, and v1's words.

    ``v1_code`` and ``param`` are what v1's error body says beside its message, which is often nothing.
    """

    code: str
    v2_code: str
    message: str
    v1_code: str | None = None
    param: str | None = None

    def refusal(self, *, v2: bool) -> StripeRefusalError:
        """The refusal with which v1 or v2 answers at once."""
        return StripeRefusalError(self.message, code=self.v2_code if v2 else self.v1_code, param=self.param)


def missing_meter(event_name: str, *, archived: bool) -> Flaw:
    """No active meter has this event name."""
    code = "archived_meter" if archived else "no_meter"
    message = f'No active meter found for event name "{event_name}".'
    return Flaw(code, code, message, "resource_missing", "event_name")


def missing_customer(customer: str, meter: Meter) -> Flaw:
    """The customer does not exist; v2 never says so at once."""
    message = f"No such customer: '{customer}'"
    param = f"payload[{meter.customer_key}]"
    return Flaw("meter_event_customer_not_found", "", message, "resource_missing", param)


def judge(event: Json, meter: Meter, now: int) -> Flaw | None:
    """What is wrong with an event on ``meter``, other than its customer; None when nothing is."""
    return _judge_time(event.get("timestamp", now), now) or _judge_payload(event["payload"], meter)


def _judge_time(timestamp: int, now: int) -> Flaw | None:
    if timestamp < now - PAST_LIMIT:
        code = "timestamp_too_far_in_past"
        message = (
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {now - PAST_LIMIT}."
        )
    elif timestamp > now + FUTURE_LIMIT:
        code = "timestamp_in_future"
        message = (
            "The event timestamp cannot be more than 5 minutes in the future. "
            f"Expected a timestamp less than or equal to {now + FUTURE_LIMIT}."
        )
    else:
        return None
    return Flaw(code, code, message, param="timestamp")


def _judge_payload(payload: dict[str, str], meter: Meter) -> Flaw | None:
    if not payload.get(meter.customer_key):
        code, v2_code = "meter_event_no_customer_defined", "payload_no_customer_defined"
        return _lacks(code, v2_code, meter.customer_key)
    text = payload.get(meter.value_key)
    if meter.formula == "count" and text is None:
        return None
    if not text:
        return _lacks("meter_event_value_not_found", "payload_no_value_defined", meter.value_key)
    return _judge_number(text, f"payload[{meter.value_key}]")


def _lacks(code: str, v2_code: str, key: str) -> Flaw:
    message = f"The event payload does not have the key '{key}', which the meter needs."
    return Flaw(code, v2_code, message, "parameter_missing", f"payload[{key}]")


def _judge_number(text: str, param: str) -> Flaw | None:
    if not _NUMBER.match(text):
        message = f"The meter event value '{text[:40]}' must be a number in plain decimal notation."
        return Flaw("meter_event_invalid_value", "payload_invalid_value", message, param=param)
    if len(text) > _LONGEST_NUMBER or significant_digits(Decimal(text)) > MAX_DIGITS:
        message = f"The meter event value must have at most {MAX_DIGITS} significant digits."
        return Flaw("meter_event_value_too_many_digits", "payload_invalid_value", message, param=param)
    return None


def number(text: str | None) -> Decimal:
    """The value of an event: 1 when a ``count`` meter's payload has none, NaN when it is no number."""
    if text is None:
        return Decimal(1)
    return Decimal(text) if _NUMBER.match(text) and len(text) <= _LONGEST_NUMBER else Decimal("NaN")
