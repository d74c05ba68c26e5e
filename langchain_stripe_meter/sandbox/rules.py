"""What an account holds, and Stripe's rules for meter events: what is taken, what it adds up to, what is reported.

Pure: nothing here changes anything, and ``now`` is given in Unix seconds.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, localcontext
from typing import Literal

from langchain_stripe_meter.core.events import FUTURE_LIMIT, MAX_DIGITS, PAST_LIMIT, significant_digits
from langchain_stripe_meter.sandbox.wire import Json, StripeRefusalError, bad_parameter, rfc3339

DAY = 86_400
WINDOWS = {"minute": 60, "hour": 3600, "day": DAY}
ERROR_REPORT = "v1.billing.meter.error_report_triggered"
NO_METER = "v1.billing.meter.no_meter_found"
NO_CUSTOMER = "meter_event_customer_not_found"

Formula = Literal["sum", "count", "last"]
Window = Literal["day", "hour"]
SampleShape = Literal["identifier", "idempotency_key", "request"]
"""How a sample names its request: ``{"identifier": the event's}``, ``{"identifier": the idempotency key}``
or ``{"id", "idempotency_key"}``. Stripe documents more than one shape."""


@dataclass(frozen=True)
class Meter:
    """A meter as it stands now; times are Unix seconds."""

    id: str
    event_name: str
    display_name: str
    created: int
    updated: int
    formula: Formula = "sum"
    event_time_window: Window | None = None
    customer_key: str = "stripe_customer_id"
    value_key: str = "value"
    deactivated_at: int | None = None
    livemode: bool = False

    @property
    def active(self) -> bool:
        """Whether it takes events."""
        return self.deactivated_at is None

    def to_stripe(self) -> Json:
        """The meter object of Stripe's API."""
        return {
            "id": self.id,
            "object": "billing.meter",
            "created": self.created,
            "customer_mapping": {"event_payload_key": self.customer_key, "type": "by_id"},
            "default_aggregation": {"formula": self.formula},
            "display_name": self.display_name,
            "event_name": self.event_name,
            "event_time_window": self.event_time_window,
            "livemode": self.livemode,
            "status": "active" if self.active else "inactive",
            "status_transitions": {"deactivated_at": self.deactivated_at},
            "updated": self.updated,
            "value_settings": {"event_payload_key": self.value_key},
        }


@dataclass(frozen=True)
class Customer:
    """A customer; ``deleted_at`` in Unix seconds, or None while it exists."""

    id: str
    created: int
    email: str | None = None
    name: str | None = None
    phone: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    livemode: bool = False
    deleted_at: int | None = None

    def to_stripe(self) -> Json:
        """The customer object of Stripe's API, as it was before any deletion."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "deleted_at"}
        return {**shown, "object": "customer", "metadata": dict(self.metadata)}


@dataclass(frozen=True)
class AcceptedEvent:
    """A meter event that Stripe answered with 2xx.

    ``timestamp`` is when the usage happened, ``created`` when Stripe received the event (both Unix seconds).
    ``value`` is ``Decimal("NaN")`` for text that is no number, which only the stream lets in.
    It is billed unless it was ``cancelled``, or ``rejected`` afterwards (then this is the error code).
    """

    event_name: str
    identifier: str
    customer: str
    value: Decimal
    timestamp: int
    payload: Mapping[str, str]
    created: int
    meter: str = ""
    request: str = ""
    idempotency_key: str = ""
    cancelled: bool = False
    rejected: str | None = None
    cancelled_at: int | None = None

    @property
    def billed(self) -> bool:
        """Whether it counts."""
        return not self.cancelled and self.rejected is None

    def as_of(self, moment: int) -> AcceptedEvent:
        """It without a cancellation that is later than this (Unix seconds)."""
        return self if (self.cancelled_at or 0) <= moment else replace(self, cancelled=False, cancelled_at=None)


@dataclass(frozen=True)
class Rejection:
    """An asynchronous error report: what the thin event's ``fetch_event()`` will say."""

    id: str
    type: str
    created: int
    meter: str | None
    data: Json
    livemode: bool = False
    context: str | None = None

    def notification(self) -> Json:
        """The thin event as a webhook receives it: no data, only where to fetch it."""
        body: Json = {
            "id": self.id,
            "object": "v2.core.event",
            "type": self.type,
            "livemode": self.livemode,
            "created": rfc3339(self.created),
            "context": self.context,
            "reason": None,
        }
        if self.meter is not None:
            url = f"/v1/billing/meters/{self.meter}"
            body["related_object"] = {"id": self.meter, "type": "billing.meter", "url": url}
        return body

    def to_stripe(self) -> Json:
        """The whole event, as ``GET /v2/core/events/{id}`` answers."""
        return {**self.notification(), "data": self.data}


@dataclass(frozen=True)
class Flaw:
    """Why an event is no good: the asynchronous code, the v2 code, and v1's words.

    ``v1_code`` and ``param`` are what v1's error body says beside its message, which is often nothing.
    v1 and v2 refuse such an event at once; the v2 stream takes it and reports it later.
    """

    code: str
    v2_code: str
    message: str
    v1_code: str | None = None
    param: str | None = None

    def refusal(self, *, v2: bool) -> StripeRefusalError:
        """The refusal with which v1 or v2 answers at once."""
        return StripeRefusalError(self.message, code=self.v2_code if v2 else self.v1_code, param=self.param)


def missing_meter(event_name: str, *, archived: bool = False) -> Flaw:
    """No active meter has this event name."""
    code = "archived_meter" if archived else "no_meter"
    message = f'No active meter found for event name "{event_name}".'
    return Flaw(code, code, message, "resource_missing", "event_name")


def missing_customer(customer: str, meter: Meter) -> Flaw:
    """The customer does not exist; v2 never says so at once."""
    message = f"No such customer: '{customer}'"
    return Flaw(NO_CUSTOMER, "", message, "resource_missing", f"payload[{meter.customer_key}]")


def judge(event: Json, meter: Meter, now: int) -> Flaw | None:
    """What is wrong with an event on ``meter``, other than its customer; None when nothing is."""
    return _judge_time(event.get("timestamp", now), now) or _judge_payload(event["payload"], meter)


def _judge_time(timestamp: int, now: int) -> Flaw | None:
    earliest, latest = now - PAST_LIMIT, now + FUTURE_LIMIT
    if earliest <= timestamp <= latest:
        return None
    if timestamp < earliest:
        code, limit = "timestamp_too_far_in_past", "35 days in past"
        expected = f"greater than or equal to {earliest}"
    else:
        code, limit = "timestamp_in_future", "5 minutes in the future"
        expected = f"less than or equal to {latest}"
    message = f"The event timestamp cannot be more than {limit}. Expected a timestamp {expected}."
    return Flaw(code, code, message, param="timestamp")


def _judge_payload(payload: Mapping[str, str], meter: Meter) -> Flaw | None:
    if not payload.get(meter.customer_key):
        return _lacks("meter_event_no_customer_defined", "payload_no_customer_defined", meter.customer_key)
    text = payload.get(meter.value_key)
    if meter.formula == "count" and text is None:
        return None
    if not text:
        return _lacks("meter_event_value_not_found", "payload_no_value_defined", meter.value_key)
    return _judge_number(text, f"payload[{meter.value_key}]")


def _lacks(code: str, v2_code: str, key: str) -> Flaw:
    message = f"The event payload does not have the key '{key}', which the meter needs."
    return Flaw(code, v2_code, message, "parameter_missing", f"payload[{key}]")


_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_LONGEST_NUMBER = 200


def _judge_number(text: str, param: str) -> Flaw | None:
    if not _NUMBER.fullmatch(text):
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
    return Decimal(text) if len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text) else Decimal("NaN")


def aggregate(meter: Meter, events: Iterable[AcceptedEvent]) -> Decimal:
    """What ``events`` add up to; cancelled and rejected ones count for nothing."""
    counted = sorted((event for event in events if event.billed), key=lambda event: (event.timestamp, event.created))
    if meter.event_time_window is not None:
        # Only the newest event of each window counts, which is why deltas under-bill on such a meter.
        counted = list({event.timestamp // WINDOWS[meter.event_time_window]: event for event in counted}.values())
    if meter.formula == "count":
        return Decimal(len(counted))
    if meter.formula == "last":
        return counted[-1].value if counted else Decimal(0)
    with localcontext() as context:
        context.prec = 60
        return sum((event.value for event in counted), Decimal(0))


def summaries(
    meter: Meter, customer: str, events: Iterable[AcceptedEvent], span: tuple[int, int], grouping: str | None
) -> list[Json]:
    """Meter event summaries, newest first; a window in which nothing happened has none."""
    _check_span(*span, grouping or "minute")
    start, end = span
    width = WINDOWS[grouping] if grouping else end - start
    windows: defaultdict[int, list[AcceptedEvent]] = defaultdict(list)
    for event in events:
        if start <= event.timestamp < end and event.billed:
            windows[event.timestamp - (event.timestamp - start) % width].append(event)
    return [_summary(meter, customer, opens, opens + width, windows[opens]) for opens in sorted(windows, reverse=True)]


def _check_span(start: int, end: int, unit: str) -> None:
    for name, moment in (("start_time", start), ("end_time", end)):
        if moment % WINDOWS[unit]:
            raise bad_parameter(f"{name} must be aligned with {unit} boundaries (UTC); {moment} is not.", name)
    if end <= start:
        raise bad_parameter("end_time must be after start_time.", "end_time")


def _summary(meter: Meter, customer: str, start: int, end: int, events: Iterable[AcceptedEvent]) -> Json:
    return {
        "id": make_id("mtrusg", f"{meter.id} {customer} {start} {end}", 20),
        "object": "billing.meter_event_summary",
        "aggregated_value": float(aggregate(meter, events)),
        "start_time": start,
        "end_time": end,
        "livemode": meter.livemode,
        "meter": meter.id,
    }


def make_id(prefix: str, facts: str, length: int = 14) -> str:
    """An id that looks like Stripe's, such as ``cus_4f0c…``, and is the same for the same facts."""
    return f"{prefix}_{hashlib.sha256(facts.encode()).hexdigest()[:length]}"


def report_data(events: Sequence[AcceptedEvent], now: int, samples: int, shape: SampleShape) -> Json:
    """The ``data`` of an error report: counts per code, and at most ``samples`` of each."""
    by_code: defaultdict[str, list[AcceptedEvent]] = defaultdict(list)
    for event in events:
        by_code[event.rejected or ""].append(event)
    error_types = [
        {
            "code": code,
            "error_count": len(found),
            "sample_errors": [_sample(event, shape) for event in found[:samples]],
        }
        for code, found in by_code.items()
    ]
    total = len(events)
    return {
        "developer_message_summary": "There is 1 invalid event" if total == 1 else f"There are {total} invalid events",
        "reason": {"error_count": total, "error_types": error_types},
        "validation_start": rfc3339(min(event.created for event in events)),
        "validation_end": rfc3339(now + 1),
    }


def _sample(event: AcceptedEvent, shape: SampleShape) -> Json:
    request = {"id": event.request, "idempotency_key": event.idempotency_key}
    if shape != "request":
        request = {"identifier": event.identifier if shape == "identifier" else event.idempotency_key}
    return {"error_message": f"The event was refused: {event.rejected}.", "request": request}
