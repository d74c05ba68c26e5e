"""The endpoints: which request means what, and which permission it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_stripe_meter.core.events import MAX_NAME_LENGTH
from langchain_stripe_meter.sandbox.pages import LISTING, created_filter, page, search_page
from langchain_stripe_meter.sandbox.params import EXPAND, Field, check
from langchain_stripe_meter.sandbox.replies import Json, rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from langchain_stripe_meter.sandbox.account import Account, Stamp
    from langchain_stripe_meter.sandbox.keys import Keyring
    from langchain_stripe_meter.sandbox.meters import Meters
    from langchain_stripe_meter.sandbox.records import AcceptedEvent, Customer

NAME = Field(required=True, limit=MAX_NAME_LENGTH)
EVENT = {
    "event_name": NAME,
    "payload": Field("map", required=True),
    "identifier": Field(limit=MAX_NAME_LENGTH),
    "timestamp": Field("integer"),
    "expand": EXPAND,
}
EVENT_V2 = {**{name: field for name, field in EVENT.items() if name != "expand"}, "timestamp": Field("time")}
BATCH = {"events": Field("list", required=True, limit=100, fields=EVENT_V2)}
ADJUSTMENT = {
    "event_name": NAME,
    "type": Field("choice", required=True, choices=("cancel",)),
    "cancel": Field("object", required=True, fields={"identifier": NAME}),
    "expand": EXPAND,
}
ADJUSTMENT_V2 = {name: field for name, field in ADJUSTMENT.items() if name != "expand"}
METERS = {**LISTING, "status": Field("choice", choices=("active", "inactive"))}
SUMMARIES = {
    **LISTING,
    "customer": Field(required=True),
    "start_time": Field("integer", required=True),
    "end_time": Field("integer", required=True),
    "value_grouping_window": Field("choice", choices=("hour", "day")),
}
CUSTOMERS = {**LISTING, "email": Field(limit=512), "created": Field("any"), "test_clock": Field()}
SEARCH = {"query": Field(required=True), "limit": Field("integer"), "page": Field(), "expand": EXPAND}
ONLY_EXPAND = {"expand": EXPAND}


@dataclass(frozen=True)
class Visit:
    """One request, once it is known who asks and for which account; ``name`` is the id in its path."""

    account: Account
    params: Json
    path: str
    stamp: Stamp
    keys: Keyring
    name: str = ""

    @property
    def now(self) -> int:
        """When it came, in Unix seconds."""
        return self.stamp.now

    def checked(self, fields: Mapping[str, Field]) -> Json:
        """Its parameters, as ``params.check`` lets them pass."""
        return check(self.params, fields)


@dataclass(frozen=True)
class Route:
    """An endpoint. ``permission`` is None where a session token takes the place of an API key."""

    method: str
    path: str
    permission: str | None
    handle: Callable[[Visit], Json]
    serial: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches its path; the first group is the id."""
        return re.compile(self.path.replace("{id}", r"([^/]+)") + r"\Z")


def find(method: str, path: str) -> tuple[Route, str] | None:
    """The endpoint of a request, and the id in its path."""
    for pattern, routes in _TABLE:
        match = pattern.match(path)
        if match and method in routes:
            return routes[method], match[1] if match.groups() else ""
    return None


def owner(params: Json, meters: Meters) -> tuple[str, str] | None:
    """The meter and customer whose events Stripe takes one at a time, if the request names them."""
    event_name, payload = params.get("event_name"), params.get("payload")
    if not isinstance(event_name, str) or not isinstance(payload, dict):
        return None
    meter = meters.active(event_name)
    customer = payload.get(meter.customer_key if meter else "stripe_customer_id")
    return (event_name, customer) if isinstance(customer, str) else None


def create_event(visit: Visit) -> Json:
    event = visit.account.receive(visit.checked(EVENT), visit.stamp)
    return _event(event, visit, "billing.meter_event", lambda epoch: epoch)


def create_event_v2(visit: Visit) -> Json:
    event = visit.account.receive(visit.checked(EVENT_V2), visit.stamp, v2=True)
    return _event(event, visit, "v2.billing.meter_event", rfc3339)


def _event(event: AcceptedEvent, visit: Visit, kind: str, moment: Callable[[int], int | str]) -> Json:
    return {
        "object": kind,
        "created": moment(event.created),
        "event_name": event.event_name,
        "identifier": event.identifier,
        "livemode": visit.account.livemode,
        "payload": dict(event.payload),
        "timestamp": moment(event.timestamp),
    }


def create_adjustment(visit: Visit) -> Json:
    return {"object": "billing.meter_event_adjustment", **_adjust(visit, ADJUSTMENT)}


def create_adjustment_v2(visit: Visit) -> Json:
    return {
        "id": f"mea_{visit.stamp.request.removeprefix('req_')}",
        "object": "v2.billing.meter_event_adjustment",
        "created": rfc3339(visit.now),
        **_adjust(visit, ADJUSTMENT_V2),
    }


def _adjust(visit: Visit, fields: Mapping[str, Field]) -> Json:
    wanted = visit.checked(fields)
    identifier = wanted["cancel"]["identifier"]
    visit.account.cancel(wanted["event_name"], identifier, visit.now)
    return {
        "cancel": {"identifier": identifier},
        "event_name": wanted["event_name"],
        "livemode": visit.account.livemode,
        "status": "pending",
        "type": "cancel",
    }


def create_session(visit: Visit) -> Json:
    visit.checked({})
    session = visit.keys.open_session(visit.account.id, visit.now, livemode=visit.account.livemode)
    return {
        "id": session.id,
        "object": "v2.billing.meter_event_session",
        "authentication_token": session.token,
        "created": rfc3339(session.created),
        "expires_at": rfc3339(session.expires),
        "livemode": session.livemode,
    }


def create_stream(visit: Visit) -> Json:
    visit.account.receive_batch(visit.checked(BATCH)["events"], visit.stamp)
    return {}


def list_meters(visit: Visit) -> Json:
    wanted = visit.checked(METERS)
    meters = [meter.to_stripe() for meter in visit.account.meters.all(wanted.get("status"))]
    return page(meters, wanted, visit.path)


def create_meter(visit: Visit) -> Json:
    return visit.account.meters.create(visit.params, visit.now).to_stripe()


def get_meter(visit: Visit) -> Json:
    visit.checked(ONLY_EXPAND)
    return visit.account.meters.get(visit.name).to_stripe()


def update_meter(visit: Visit) -> Json:
    return visit.account.meters.rename(visit.name, visit.params, visit.now).to_stripe()


def deactivate_meter(visit: Visit) -> Json:
    visit.checked(ONLY_EXPAND)
    return visit.account.meters.deactivate(visit.name, visit.now).to_stripe()


def reactivate_meter(visit: Visit) -> Json:
    visit.checked(ONLY_EXPAND)
    return visit.account.meters.reactivate(visit.name, visit.now).to_stripe()


def list_summaries(visit: Visit) -> Json:
    wanted = visit.checked(SUMMARIES)
    span = wanted["start_time"], wanted["end_time"]
    found = visit.account.summaries(
        visit.name, wanted["customer"], span, wanted.get("value_grouping_window"), visit.now
    )
    return page(found, wanted, visit.path)


def list_customers(visit: Visit) -> Json:
    wanted = visit.checked(CUSTOMERS)
    recent = created_filter(wanted.get("created", {}))
    customers = visit.account.customers.all(wanted.get("email"))
    return page([customer.to_stripe() for customer in customers if recent(customer.created)], wanted, visit.path)


def search_customers(visit: Visit) -> Json:
    wanted = visit.checked(SEARCH)
    return search_page(visit.account.search(wanted["query"], visit.now), wanted, visit.path)


def create_customer(visit: Visit) -> Json:
    return visit.account.customers.create(visit.params, visit.now).to_stripe()


def get_customer(visit: Visit) -> Json:
    visit.checked(ONLY_EXPAND)
    customer = visit.account.customers.get(visit.name)
    return customer.to_stripe() if customer.deleted_at is None else _deleted(customer)


def delete_customer(visit: Visit) -> Json:
    visit.checked({})
    visit.account.customers.delete(visit.name, visit.now)
    return _deleted(visit.account.customers.get(visit.name))


def _deleted(customer: Customer) -> Json:
    return {"id": customer.id, "object": "customer", "deleted": True}


def get_account(visit: Visit) -> Json:
    visit.checked(ONLY_EXPAND)
    return {
        "id": visit.account.id,
        "object": "account",
        "charges_enabled": True,
        "country": "US",
        "default_currency": "usd",
        "email": None,
        "settings": {"dashboard": {"display_name": "Stripe sandbox"}},
        "type": "standard",
    }


def get_thin_event(visit: Visit) -> Json:
    return visit.account.find_rejection(visit.name).to_stripe()


_ROUTES = [
    Route("POST", "/v1/billing/meter_events", "meter_events:write", create_event, serial=True),
    Route("POST", "/v1/billing/meter_event_adjustments", "meter_events:write", create_adjustment),
    Route("GET", "/v1/billing/meters", "meters:read", list_meters),
    Route("POST", "/v1/billing/meters", "meters:write", create_meter),
    Route("GET", "/v1/billing/meters/{id}", "meters:read", get_meter),
    Route("POST", "/v1/billing/meters/{id}", "meters:write", update_meter),
    Route("POST", "/v1/billing/meters/{id}/deactivate", "meters:write", deactivate_meter),
    Route("POST", "/v1/billing/meters/{id}/reactivate", "meters:write", reactivate_meter),
    Route("GET", "/v1/billing/meters/{id}/event_summaries", "meters:read", list_summaries),
    Route("GET", "/v1/customers", "customers:read", list_customers),
    Route("POST", "/v1/customers", "customers:write", create_customer),
    Route("GET", "/v1/customers/search", "customers:read", search_customers),
    Route("GET", "/v1/customers/{id}", "customers:read", get_customer),
    Route("DELETE", "/v1/customers/{id}", "customers:write", delete_customer),
    Route("GET", "/v1/account", "account:read", get_account),
    Route("POST", "/v2/billing/meter_events", "meter_events:write", create_event_v2, serial=True),
    Route("POST", "/v2/billing/meter_event_adjustments", "meter_events:write", create_adjustment_v2),
    Route("POST", "/v2/billing/meter_event_session", "meter_events:write", create_session),
    Route("POST", "/v2/billing/meter_event_stream", None, create_stream),
    Route("GET", "/v2/core/events/{id}", "events:read", get_thin_event),
]


def _table(routes: list[Route]) -> list[tuple[re.Pattern[str], dict[str, Route]]]:
    by_path: dict[str, dict[str, Route]] = {}
    for route in routes:
        by_path.setdefault(route.path, {})[route.method] = route
    return [(next(iter(found.values())).pattern, found) for found in by_path.values()]


_TABLE = _table(_ROUTES)
