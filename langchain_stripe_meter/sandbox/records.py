"""What a stand-in account holds: meters, customers, accepted meter events, asynchronous rejections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from langchain_stripe_meter.sandbox.replies import Json, rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal

DAY = 86_400
Formula = Literal["sum", "count", "last"]
Window = Literal["day", "hour"]


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

    @property
    def billed(self) -> bool:
        """Whether it counts."""
        return not self.cancelled and self.rejected is None


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
class RecordedRequest:
    """A request as it came, and the status it was answered with.

    ``params`` are the decoded query or body, ``headers`` have lower-case names, ``at`` is in Unix seconds
    on the sandbox's clock, ``status`` is None when the connection was closed without an answer.
    """

    method: str
    path: str
    params: Json
    headers: Mapping[str, str]
    at: int
    status: int | None = None
