"""The endpoints: which request means what, and which permission it needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from langchain_stripe_meter.sandbox import wire
from langchain_stripe_meter.sandbox.account import NAME, Account, Stamp
from langchain_stripe_meter.sandbox.keys import SESSION_SECONDS, Keyring
from langchain_stripe_meter.sandbox.prices import PRICES
from langchain_stripe_meter.sandbox.rules import summaries
from langchain_stripe_meter.sandbox.wire import EXPAND, INTEGER, LISTING, Field, Json, StripeRefusalError, rfc3339

EVENT_V2 = {
    "event_name": NAME,
    "payload": Field(wire.texts, required=True),
    "identifier": Field(limit=NAME.limit),
    "timestamp": Field(wire.moment),
}
EVENT = {**EVENT_V2, "timestamp": INTEGER, **EXPAND}
BATCH = {"events": Field(wire.objects, required=True, limit=100, fields=EVENT_V2)}
ADJUSTMENT_V2 = {
    "event_name": NAME,
    "type": Field(wire.choice, required=True, choices=("cancel",)),
    "cancel": Field(wire.fields, required=True, fields={"identifier": NAME}),
}
ADJUSTMENT = {**ADJUSTMENT_V2, **EXPAND}
METERS = {**LISTING, "status": Field(wire.choice, choices=("active", "inactive"))}
SUMMARIES = {
    **LISTING,
    "customer": Field(required=True),
    "start_time": Field(wire.integer, required=True),
    "end_time": Field(wire.integer, required=True),
    "value_grouping_window": Field(wire.choice, choices=("hour", "day")),
}
CUSTOMERS = {**LISTING, "email": Field(limit=512), "created": Field(wire.period), "test_clock": Field()}
CREDITS = {
    "customer": Field(required=True),
    "filter": Field(
        wire.fields,
        required=True,
        fields={
            "type": Field(wire.choice, required=True, choices=("applicability_scope",)),
            "applicability_scope": Field(
                wire.fields,
                required=True,
                fields={"price_type": Field(wire.choice, required=True, choices=("metered",))},
            ),
        },
    ),
    **EXPAND,
}
SEARCH = {"query": Field(required=True), "limit": INTEGER, "page": Field(), **EXPAND}


@dataclass(frozen=True)
class Visit:
    """One request, once it is known who asks and for which account; ``name`` is the id in its path."""

    account: Account
    keys: Keyring
    stamp: Stamp
    request: wire.RecordedRequest
    name: str
    params: Json

    @property
    def now(self) -> int:
        """When its work is done, in Unix seconds."""
        return self.stamp.now


@dataclass(frozen=True)
class Route:
    """An endpoint. ``permission`` is None where a session token takes the place of an API key.

    ``known`` are its parameters; None leaves them to the handler. A ``serial`` endpoint takes one request at
    a time per customer and meter.
    """

    method: str
    path: str
    permission: str | None
    handle: Callable[[Visit], Json]
    known: Mapping[str, Field] | None
    serial: bool = False

    def match(self, method: str, path: str) -> re.Match[str] | None:
        """Matches the requests that mean this endpoint; the group ``id`` is the id in the path."""
        pattern = self.path.replace("{id}", "(?P<id>[^/]+)")
        return re.fullmatch(pattern, path) if method == self.method else None

    def answer(self, visit: Visit) -> Json:
        """The body of the answer; the work is done then."""
        if self.known is not None:
            visit = replace(visit, params=wire.check(visit.params, self.known))
        return self.handle(visit)


def find(method: str, path: str) -> tuple[Route, str] | None:
    """The endpoint of a request, and the id in its path."""
    for route in ROUTES:
        if match := route.match(method, path):
            return route, match.groupdict().get("id", "")
    return None


def owner(params: Json, account: Account) -> tuple[str, str] | None:
    """The meter and customer whose events Stripe takes one at a time, if the request names them."""
    event_name, payload = params.get("event_name"), params.get("payload")
    if not isinstance(event_name, str) or not isinstance(payload, dict):
        return None
    meter = account.meters.find(event_name)
    customer = payload.get(meter.customer_key if meter else "stripe_customer_id")
    return (event_name, customer) if isinstance(customer, str) else None


def create_event(visit: Visit) -> Json:
    event = visit.account.receive(visit.params, visit.stamp, v2=visit.request.v2)
    told = rfc3339 if visit.request.v2 else int
    return {
        "object": "v2.billing.meter_event" if visit.request.v2 else "billing.meter_event",
        "created": told(event.created),
        "event_name": event.event_name,
        "identifier": event.identifier,
        "livemode": visit.account.livemode,
        "payload": dict(event.payload),
        "timestamp": told(event.timestamp),
    }


def create_adjustment(visit: Visit) -> Json:
    event_name, cancel = visit.params["event_name"], visit.params["cancel"]
    visit.account.cancel(event_name, cancel["identifier"], visit.now)
    answer = {
        "object": "billing.meter_event_adjustment",
        "cancel": cancel,
        "event_name": event_name,
        "livemode": visit.account.livemode,
        "status": "pending",
        "type": "cancel",
    }
    if visit.request.v2:
        answer["object"] = "v2.billing.meter_event_adjustment"
        answer |= {"id": visit.account.make_id("mea"), "created": rfc3339(visit.now)}
    return answer


def create_session(visit: Visit) -> Json:
    if not visit.account.livemode:
        raise StripeRefusalError("The meter event stream is available in live mode only.")
    return {
        "id": visit.account.make_id("mes"),
        "object": "v2.billing.meter_event_session",
        "authentication_token": visit.keys.open_session(visit.account, visit.now),
        "created": rfc3339(visit.now),
        "expires_at": rfc3339(visit.now + SESSION_SECONDS),
        "livemode": visit.account.livemode,
    }


def create_stream(visit: Visit) -> Json:
    visit.account.receive_batch(visit.params["events"], visit.stamp)
    return {}


def list_meters(visit: Visit) -> Json:
    meters = visit.account.meters.all(visit.params.get("status"))
    return wire.page([meter.to_stripe() for meter in meters], visit.params, visit.request.path)


def create_meter(visit: Visit) -> Json:
    return visit.account.meters.create(visit.params, visit.now).to_stripe()


def update_meter(visit: Visit) -> Json:
    return visit.account.meters.rename(visit.name, visit.params, visit.now).to_stripe()


def switch_meter(visit: Visit) -> Json:
    active = visit.request.path.endswith("/reactivate")
    return visit.account.meters.switch(visit.name, visit.now, active=active).to_stripe()


def list_summaries(visit: Visit) -> Json:
    wanted, account = visit.params, visit.account
    meter, customer = account.meters.get(visit.name), account.customers.get(wanted["customer"]).id
    known = visit.now - account.settings.summary_lag
    shown = [event.as_of(known) for event in account.owned(meter.id, customer)[customer] if event.created <= known]
    span = wanted["start_time"], wanted["end_time"]
    return wire.page(
        summaries(meter, customer, shown, span, wanted.get("value_grouping_window")), wanted, visit.request.path
    )


def list_customers(visit: Visit) -> Json:
    email, recent = visit.params.get("email"), visit.params.get("created", lambda _: True)
    customers = [
        customer.to_stripe()
        for customer in visit.account.customers.all()
        if email in (None, customer.email) and recent(customer.created)
    ]
    return wire.page(customers, visit.params, visit.request.path)


def search_customers(visit: Visit) -> Json:
    account = visit.account
    found = account.customers.search(visit.params["query"], visit.now - account.settings.search_lag)
    return wire.search_page([customer.to_stripe() for customer in found], visit.params, visit.request.path)


def create_customer(visit: Visit) -> Json:
    return visit.account.customers.create(visit.params, visit.now).to_stripe()


def get_customer(visit: Visit) -> Json:
    customer = visit.account.customers.get(visit.name)
    return customer.to_stripe() if customer.deleted_at is None else _deleted(visit.name)


def delete_customer(visit: Visit) -> Json:
    visit.account.customers.delete(visit.name, visit.now)
    return _deleted(visit.name)


def _deleted(customer_id: str) -> Json:
    return {"id": customer_id, "object": "customer", "deleted": True}


def get_credits(visit: Visit) -> Json:
    account = visit.account
    customer = account.customers.get(visit.params["customer"])
    balances = [
        {
            name: {"monetary": {"currency": currency, "value": value}, "type": "monetary"}
            for name in ("available_balance", "ledger_balance")
        }
        for currency, value in account.credits.get(customer.id, {}).items()
    ]
    return {
        "object": "billing.credit_balance_summary",
        "balances": balances,
        "customer": customer.id,
        "customer_account": None,
        "livemode": account.livemode,
    }


def get_account(visit: Visit) -> Json:
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
    for rejection in visit.account.rejections:
        if rejection.id == visit.name:
            return rejection.to_stripe()
    raise wire.no_such("event", visit.name)


ROUTES = [
    Route("POST", "/v1/billing/meter_events", "meter_events:write", create_event, EVENT, serial=True),
    Route(
        "POST", "/v1/billing/meter_event_adjustments", "meter_event_adjustments:write", create_adjustment, ADJUSTMENT
    ),
    Route("GET", "/v1/billing/meters", "meters:read", list_meters, METERS),
    Route("POST", "/v1/billing/meters", "meters:write", create_meter, None),
    Route("GET", "/v1/billing/meters/{id}", "meters:read", lambda v: v.account.meters.get(v.name).to_stripe(), EXPAND),
    Route("POST", "/v1/billing/meters/{id}", "meters:write", update_meter, None),
    Route("POST", "/v1/billing/meters/{id}/deactivate", "meters:write", switch_meter, EXPAND),
    Route("POST", "/v1/billing/meters/{id}/reactivate", "meters:write", switch_meter, EXPAND),
    Route("GET", "/v1/billing/meters/{id}/event_summaries", "meters:read", list_summaries, SUMMARIES),
    Route("GET", "/v1/customers", "customers:read", list_customers, CUSTOMERS),
    Route("POST", "/v1/customers", "customers:write", create_customer, None),
    Route("GET", "/v1/customers/search", "customers:read", search_customers, SEARCH),
    Route("GET", "/v1/customers/{id}", "customers:read", get_customer, EXPAND),
    Route("DELETE", "/v1/customers/{id}", "customers:write", delete_customer, {}),
    Route("GET", "/v1/billing/credit_balance_summary", "credits:read", get_credits, CREDITS),
    Route("GET", "/v1/products/{id}", "prices:read", lambda v: v.account.prices.get_product(v.name), EXPAND),
    Route("GET", "/v1/prices", "prices:read", lambda v: v.account.prices.list(v.params, v.request.path), PRICES),
    Route("POST", "/v1/prices", "prices:write", lambda v: v.account.prices.create(v.params, v.now), None),
    Route("POST", "/v1/prices/{id}", "prices:write", lambda v: v.account.prices.change(v.name, v.params), None),
    Route("GET", "/v1/account", "account:read", get_account, EXPAND),
    Route("POST", "/v2/billing/meter_events", "meter_events:write", create_event, EVENT_V2, serial=True),
    Route(
        "POST", "/v2/billing/meter_event_adjustments", "meter_event_adjustments:write", create_adjustment, ADJUSTMENT_V2
    ),
    Route("POST", "/v2/billing/meter_event_session", "meter_events:write", create_session, {}),
    Route("POST", "/v2/billing/meter_event_stream", None, create_stream, BATCH),
    Route("GET", "/v2/core/events/{id}", "events:read", get_thin_event, None),
]
