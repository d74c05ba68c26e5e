"""A stand-in for one Stripe account: its meters, customers, meter events and stored answers.

Pure: it knows no clock (``now`` is Unix seconds), no HTTP and no thread; whoever shares it locks it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, Protocol, get_args

from langchain_stripe_meter.core.events import MAX_NAME_LENGTH
from langchain_stripe_meter.sandbox import rules, wire
from langchain_stripe_meter.sandbox.prices import Prices
from langchain_stripe_meter.sandbox.rules import DAY, AcceptedEvent, Customer, Flaw, Meter, Rejection
from langchain_stripe_meter.sandbox.wire import EXPAND, Field, Json, Reply, StripeRefusalError, check, no_such

NAME = Field(required=True, limit=MAX_NAME_LENGTH)
_DISPLAY_NAME = Field(limit=250)
_FORMULA = Field(wire.choice, required=True, choices=get_args(rules.Formula))
_BY_ID = Field(wire.choice, required=True, choices=("by_id",))
NEW_METER = {
    "display_name": replace(_DISPLAY_NAME, required=True),
    "event_name": NAME,
    "default_aggregation": Field(wire.fields, required=True, fields={"formula": _FORMULA}),
    "customer_mapping": Field(wire.fields, fields={"event_payload_key": NAME, "type": _BY_ID}),
    "value_settings": Field(wire.fields, fields={"event_payload_key": NAME}),
    "event_time_window": Field(wire.choice, choices=get_args(rules.Window)),
    **EXPAND,
}
METER_CHANGES = {"display_name": _DISPLAY_NAME, **EXPAND}
NEW_CUSTOMER = {
    "email": Field(limit=512),
    "name": Field(limit=256),
    "phone": Field(limit=20),
    "metadata": Field(wire.texts, limit=500),
    **EXPAND,
}

MakeId = Callable[[str], str]


class Meters:
    """Meters by id. At most one active meter has an event name, as on Stripe."""

    def __init__(self, make_id: MakeId, *, livemode: bool) -> None:
        self._make_id = make_id
        self._livemode = livemode
        self._meters: dict[str, Meter] = {}

    def create(self, params: Json, now: int) -> Meter:
        """Create a meter from the parameters of ``POST /v1/billing/meters``."""
        wanted = check(params, NEW_METER)
        self._check_free(wanted["event_name"])
        return self._keep(
            Meter(
                id=self._make_id("mtr"),
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
        if any(meter.active for meter in self.named(event_name)):
            message = f"There is already an active meter with the event name '{event_name}'."
            raise StripeRefusalError(message, code="resource_already_exists", param="event_name")

    def _keep(self, meter: Meter) -> Meter:
        self._meters[meter.id] = meter
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

    def named(self, event_name: str) -> list[Meter]:
        """Every meter that ever had this event name, newest first."""
        return [meter for meter in self.all() if meter.event_name == event_name]

    def find(self, event_name: str) -> Meter | None:
        """The meter that takes events of this name, else the newest that did."""
        return max(self.named(event_name), key=lambda meter: meter.active, default=None)

    def rename(self, meter_id: str, params: Json, now: int) -> Meter:
        """Change the display name, which is all that can change."""
        meter = self.get(meter_id)
        name = check(params, METER_CHANGES).get("display_name", meter.display_name)
        return self._keep(replace(meter, display_name=name, updated=now))

    def switch(self, meter_id: str, now: int, *, active: bool) -> Meter:
        """Stop taking events, or take them again."""
        meter = self.get(meter_id)
        if meter.active == active:
            raise StripeRefusalError(f"The billing meter {meter_id} is already {'' if active else 'in'}active.")
        if active:
            self._check_free(meter.event_name)
        return self._keep(replace(meter, deactivated_at=None if active else now, updated=now))


class Customers:
    """Customers by id. Nothing about them is unique, least of all the e-mail address."""

    def __init__(self, make_id: MakeId, *, livemode: bool) -> None:
        self._make_id = make_id
        self._livemode = livemode
        self._customers: dict[str, Customer] = {}

    def create(self, params: Json, now: int, customer_id: str | None = None) -> Customer:
        """Create a customer from the parameters of ``POST /v1/customers``."""
        wanted = check(params, NEW_CUSTOMER)
        wanted.pop("expand", None)
        email = wanted.get("email")
        if email is not None and ("@" not in email.strip("@") or any(map(str.isspace, email))):
            raise wire.bad_parameter(f"Invalid email address: {email}", "email", "email_invalid")
        customer_id = customer_id or self._make_id("cus")
        if customer_id in self._customers:
            raise StripeRefusalError("Customer already exists.", code="resource_already_exists", param="id")
        customer = Customer(customer_id, now, livemode=self._livemode, **wanted)
        self._customers[customer_id] = customer
        return customer

    def get(self, customer_id: str) -> Customer:
        """The customer with this id, which may have been deleted."""
        if customer_id not in self._customers:
            raise no_such("customer", customer_id)
        return self._customers[customer_id]

    def exists(self, customer_id: str) -> bool:
        """Whether it is there and was not deleted."""
        customer = self._customers.get(customer_id)
        return customer is not None and customer.deleted_at is None

    def delete(self, customer_id: str, now: int) -> None:
        """Delete it for good; its id keeps answering that it was deleted."""
        if not self.exists(customer_id):
            raise no_such("customer", customer_id)
        self._customers[customer_id] = replace(self._customers[customer_id], deleted_at=now)

    def all(self, as_of: int | None = None) -> list[Customer]:
        """Newest first: those that exist, or existed at ``as_of``."""
        return [
            customer
            for customer in reversed(self._customers.values())
            if (as_of is None or customer.created <= as_of)
            and (customer.deleted_at is None or (as_of is not None and customer.deleted_at > as_of))
        ]

    def search(self, query: str, as_of: int) -> list[Customer]:
        """Those that match ``query``, as the account was then: Stripe's search index lags behind."""
        return list(filter(wire.parse_search(query), self.all(as_of)))


class Settings(Protocol):
    """What a test may set, at any time, about how the account behaves."""

    customer_check: Literal["sync", "async"]
    search_lag: int
    summary_lag: int
    error_samples: int
    sample_shape: rules.SampleShape


@dataclass(frozen=True)
class Stamp:
    """When a request came (Unix seconds), and what names it."""

    now: int
    request: str
    idempotency_key: str


class Account:
    """The state of one account in one mode (test or live); ``connected`` if ``Stripe-Account`` reaches it."""

    def __init__(self, account_id: str, settings: Settings, *, livemode: bool) -> None:
        self.id = account_id
        self.livemode = livemode
        self.connected = False
        self.settings = settings
        self.events: list[AcceptedEvent] = []
        self.rejections: list[Rejection] = []
        self.credits: dict[str, dict[str, int]] = {}
        self.meters = Meters(self.make_id, livemode=livemode)
        self.customers = Customers(self.make_id, livemode=livemode)
        self.prices = Prices(self.make_id, self.meters.get, livemode=livemode)
        self._count = itertools.count(1)
        self._positions: dict[str, int] = {}
        self._replies: dict[str, tuple[object, Reply, int]] = {}

    def make_id(self, prefix: str, length: int = 14) -> str:
        """The next id with this prefix; the same in every run, and never that of another account."""
        return rules.make_id(prefix, f"{self.id}/{self.livemode}/{next(self._count)}", length)

    def once(self, asked: object, stamp: Stamp, work: Callable[[], Reply]) -> Reply:
        """The answer of ``work``; for a repeated idempotency key, that of the last 24 hours.

        ``asked`` is what must be the same each time a key is used.
        """
        key = stamp.idempotency_key
        if key in self._replies and stamp.now - self._replies[key][2] < DAY:
            first, reply, _ = self._replies[key]
            if first != asked:
                raise _key_reused(key)
            return reply
        reply = work()
        if key and reply.stored:
            headers = {**reply.headers, "Idempotent-Replayed": "true", "Original-Request": stamp.request}
            self._replies[key] = asked, replace(reply, headers=headers), stamp.now
        return reply

    def receive(self, event: Json, stamp: Stamp, *, v2: bool) -> AcceptedEvent:
        """Take one meter event, or refuse it at once as v1 (or v2) does.

        A customer that does not exist is refused at once by v1 when ``customer_check`` is "sync", else
        later. What is wrong with an event comes before the question whether it is a duplicate.
        """
        meter, flaw = self._examine(event, stamp.now)
        at_once = not v2 and self.settings.customer_check == "sync"
        if flaw is not None and (at_once or flaw.code != rules.NO_CUSTOMER):
            raise flaw.refusal(v2=v2)
        if self._known(event, stamp.now):
            raise StripeRefusalError(
                f"An event already exists with identifier {event['identifier']}.",
                code="duplicate_meter_event" if v2 else None,
                headers={"Stripe-Should-Retry": "false"},
            )
        taken = self._take(event, meter, flaw, stamp)
        self._report([taken] if flaw else [], stamp.now)
        return taken

    def receive_batch(self, events: Iterable[Json], stamp: Stamp) -> None:
        """Take what the v2 stream sends: everything; flaws are reported later, duplicates dropped."""
        taken = [
            self._take(event, *self._examine(event, stamp.now), stamp)
            for event in events
            if not self._known(event, stamp.now)
        ]
        self._report([event for event in taken if event.rejected], stamp.now)

    def _examine(self, event: Json, now: int) -> tuple[Meter | None, Flaw | None]:
        meter = self.meters.find(event["event_name"])
        if meter is None or not meter.active:
            return meter, rules.missing_meter(event["event_name"], archived=meter is not None)
        flaw = rules.judge(event, meter, now)
        if flaw is None and not self.customers.exists(customer := event["payload"][meter.customer_key]):
            flaw = rules.missing_customer(customer, meter)
        return meter, flaw

    def _known(self, event: Json, now: int) -> bool:
        position = self._positions.get(event.get("identifier", ""))
        # Deduplication is only promised for a rolling 24 hours; later the same identifier is billed again.
        return position is not None and now - self.events[position].created < DAY

    def _take(self, event: Json, meter: Meter | None, flaw: Flaw | None, stamp: Stamp) -> AcceptedEvent:
        taken = AcceptedEvent(
            event_name=event["event_name"],
            identifier=event.get("identifier") or self.make_id("evt_id", 32),
            customer=event["payload"].get(meter.customer_key if meter else "stripe_customer_id", ""),
            value=rules.number(event["payload"].get(meter.value_key if meter else "value")),
            timestamp=event.get("timestamp", stamp.now),
            payload=event["payload"],
            created=stamp.now,
            meter=meter.id if meter else "",
            request=stamp.request,
            idempotency_key=stamp.idempotency_key,
            rejected=flaw.code if flaw else None,
        )
        self._positions[taken.identifier] = len(self.events)
        self.events.append(taken)
        return taken

    def cancel(self, event_name: str, identifier: str, now: int) -> None:
        """Take back an event that was received less than 24 hours ago."""
        if not self.meters.named(event_name):
            raise rules.missing_meter(event_name).refusal(v2=False)
        position = self._positions.get(identifier)
        if position is None or self.events[position].event_name != event_name:
            raise no_such("meter event", identifier, "cancel[identifier]")
        event = self.events[position]
        if event.cancelled:
            raise StripeRefusalError(f"The meter event {identifier} has already been cancelled.")
        if now - event.created > DAY:
            raise StripeRefusalError(
                f"The meter event {identifier} was received more than 24 hours ago and can no longer be cancelled."
            )
        self.events[position] = replace(event, cancelled=True, cancelled_at=now)

    def reject(self, identifiers: Sequence[str], code: str, now: int) -> list[Rejection]:
        """Reject events that were taken, as Stripe's later checks do; one report per meter."""
        rejected = []
        for identifier in identifiers:
            position = self._positions.get(identifier)
            if position is None:
                raise no_such("meter event", identifier)
            self.events[position] = replace(self.events[position], rejected=code)
            rejected.append(self.events[position])
        return self._report(rejected, now)

    def _report(self, rejected: Iterable[AcceptedEvent], now: int) -> list[Rejection]:
        by_meter: defaultdict[str, list[AcceptedEvent]] = defaultdict(list)
        for event in rejected:
            by_meter[event.meter].append(event)
        reports = [
            Rejection(
                id=self.make_id("evt", 24),
                type=rules.ERROR_REPORT if meter else rules.NO_METER,
                created=now,
                meter=meter or None,
                data=rules.report_data(events, now, self.settings.error_samples, self.settings.sample_shape),
                livemode=self.livemode,
                context=self.id if self.connected else None,
            )
            for meter, events in by_meter.items()
        ]
        self.rejections += reports
        return reports

    def owned(self, meter_id: str, customer: str | None = None) -> Mapping[str, list[AcceptedEvent]]:
        """The events of a meter by customer, or of one customer only."""
        by_customer: defaultdict[str, list[AcceptedEvent]] = defaultdict(list)
        for event in self.events:
            if event.meter == meter_id and customer in (None, event.customer):
                by_customer[event.customer].append(event)
        return by_customer

    def bills(self, event_name: str, customer: str | None = None) -> dict[str, Decimal]:
        """What each customer (or one) would be billed, as one period; a negative total bills as 0 [doc]."""
        bills: defaultdict[str, Decimal] = defaultdict(Decimal)
        for meter in self.meters.named(event_name):
            for owner, events in self.owned(meter.id, customer).items():
                bills[owner] += max(rules.aggregate(meter, events), Decimal(0))
        return {owner: bill for owner, bill in bills.items() if bill}


def _key_reused(key: str) -> StripeRefusalError:
    return StripeRefusalError(
        "Keys for idempotent requests can only be used with the same parameters they were first used with. "
        f"Try using a key other than '{key}' if you meant to execute a different request.",
        kind="idempotency_error",
    )
