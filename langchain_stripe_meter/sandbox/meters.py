"""The meters of a stand-in account."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from langchain_stripe_meter.core.events import MAX_NAME_LENGTH
from langchain_stripe_meter.sandbox.params import EXPAND, Field, check
from langchain_stripe_meter.sandbox.records import Formula, Meter, Window
from langchain_stripe_meter.sandbox.replies import Json, StripeRefusalError, no_such

if TYPE_CHECKING:
    from langchain_stripe_meter.sandbox.ids import Ids

_PAYLOAD_KEY = Field(limit=MAX_NAME_LENGTH, required=True)
_DISPLAY_NAME = Field(limit=250, required=True)
CREATE = {
    "display_name": _DISPLAY_NAME,
    "event_name": Field(limit=MAX_NAME_LENGTH, required=True),
    "default_aggregation": Field(
        "object", required=True, fields={"formula": Field("choice", required=True, choices=get_args(Formula))}
    ),
    "customer_mapping": Field(
        "object",
        fields={"event_payload_key": _PAYLOAD_KEY, "type": Field("choice", required=True, choices=("by_id",))},
    ),
    "value_settings": Field("object", fields={"event_payload_key": _PAYLOAD_KEY}),
    "event_time_window": Field("choice", choices=get_args(Window)),
    "expand": EXPAND,
}
UPDATE = {"display_name": replace(_DISPLAY_NAME, required=False), "expand": EXPAND}


class Meters:
    """Meters by id. At most one active meter has an event name, as on Stripe."""

    def __init__(self, ids: Ids, *, livemode: bool) -> None:
        self._ids = ids
        self._livemode = livemode
        self._meters: dict[str, Meter] = {}
        self._active: dict[str, str] = {}

    def create(self, params: Json, now: int) -> Meter:
        """Create a meter from the parameters of ``POST /v1/billing/meters``."""
        wanted = check(params, CREATE)
        self._check_free(wanted["event_name"])
        return self._keep(
            Meter(
                id=self._ids.make("mtr"),
                event_name=wanted["event_name"],
                display_name=wanted["display_name"],
                created=now,
                updated=now,
                formula=wanted["default_aggregation"]["formula"],
                event_time_window=wanted.get("event_time_window"),
                customer_key=wanted.get("customer_mapping", {}).get("event_payload_key", "stripe_customer_id"),
                value_key=wanted.get("value_settings", {}).get("event_payload_key", "value"),
                livemode=self._livemode,
            )
        )

    def _check_free(self, event_name: str) -> None:
        if event_name in self._active:
            raise StripeRefusalError(
                f"There is already an active meter with the event name '{event_name}'.",
                code="resource_already_exists",
                param="event_name",
            )

    def _keep(self, meter: Meter) -> Meter:
        self._meters[meter.id] = meter
        if meter.active:
            self._active[meter.event_name] = meter.id
        elif self._active.get(meter.event_name) == meter.id:
            del self._active[meter.event_name]
        return meter

    def get(self, meter_id: str) -> Meter:
        """The meter with this id."""
        if meter_id not in self._meters:
            raise no_such("billing meter", meter_id)
        return self._meters[meter_id]

    def all(self, status: str | None = None) -> list[Meter]:
        """Newest first; ``status`` is active or inactive."""
        newest_first = reversed(self._meters.values())
        return [meter for meter in newest_first if status is None or meter.active == (status == "active")]

    def active(self, event_name: str) -> Meter | None:
        """The meter that takes events of this name."""
        meter_id = self._active.get(event_name)
        return self._meters[meter_id] if meter_id else None

    def named(self, event_name: str) -> list[Meter]:
        """Every meter that ever had this event name, newest first."""
        return [meter for meter in self.all() if meter.event_name == event_name]

    def rename(self, meter_id: str, params: Json, now: int) -> Meter:
        """Change the display name, which is all that can change."""
        meter = self.get(meter_id)
        name = check(params, UPDATE).get("display_name", meter.display_name)
        return self._keep(replace(meter, display_name=name, updated=now))

    def deactivate(self, meter_id: str, now: int) -> Meter:
        """Stop taking events."""
        meter = self.get(meter_id)
        if not meter.active:
            raise StripeRefusalError(f"The billing meter {meter_id} is already inactive.")
        return self._keep(replace(meter, deactivated_at=now, updated=now))

    def reactivate(self, meter_id: str, now: int) -> Meter:
        """Take events again."""
        meter = self.get(meter_id)
        if meter.active:
            raise StripeRefusalError(f"The billing meter {meter_id} is already active.")
        self._check_free(meter.event_name)
        return self._keep(replace(meter, deactivated_at=None, updated=now))
