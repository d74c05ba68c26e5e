"""A stand-in for one Stripe account: its state and Stripe's rules about it.

Pure: it knows no clock (``now`` is Unix seconds), no HTTP and no thread; whoever shares it locks it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, Protocol

from langchain_stripe_meter.sandbox.customers import Customers
from langchain_stripe_meter.sandbox.idempotency import Replies
from langchain_stripe_meter.sandbox.ids import Ids
from langchain_stripe_meter.sandbox.intake import Flaw, judge, missing_customer, missing_meter, number
from langchain_stripe_meter.sandbox.meters import Meters
from langchain_stripe_meter.sandbox.records import DAY, AcceptedEvent, Meter, Rejection
from langchain_stripe_meter.sandbox.replies import Json, StripeRefusalError, no_such
from langchain_stripe_meter.sandbox.reports import ERROR_REPORT, NO_METER, SampleShape, report_data
from langchain_stripe_meter.sandbox.totals import aggregate, summaries

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Rules(Protocol):
    """What a test may set, at any time, about how the account behaves."""

    customer_check: Literal["sync", "async"]
    search_lag: int
    summary_lag: int
    error_samples: int
    sample_shape: SampleShape


@dataclass(frozen=True)
class Stamp:
    """When a request came (Unix seconds), and what names it."""

    now: int
    request: str = ""
    idempotency_key: str = ""


class Account:
    """The state of one account in one mode (test or live)."""

    def __init__(self, account_id: str, rules: Rules, *, livemode: bool = False, context: str | None = None) -> None:
        self.id = account_id
        self.livemode = livemode
        self.replies = Replies()
        self.events: list[AcceptedEvent] = []
        self.rejections: list[Rejection] = []
        self._rules = rules
        self._context = context
        self._ids = Ids(f"{account_id}/{livemode}")
        self.meters = Meters(self._ids, livemode=livemode)
        self.customers = Customers(self._ids, livemode=livemode)
        self._by_identifier: dict[str, int] = {}
        self._by_owner: dict[tuple[str, str], list[int]] = {}

    def receive(self, event: Json, stamp: Stamp, *, v2: bool = False) -> AcceptedEvent:
        """Take one meter event, or refuse it at once as v1 (or v2) does.

        A customer that does not exist is refused at once by v1 when ``customer_check`` is "sync", else
        later. What is wrong with an event comes before the question whether it is a duplicate.
        """
        meter, flaw = self._examine(event, stamp.now)
        if flaw is not None:
            raise flaw.refusal(v2=v2)
        assert meter is not None, "an event without a meter has a flaw"  # noqa: S101
        lost = self._lost_customer(event, meter)
        if lost is not None and self._rules.customer_check == "sync" and not v2:
            raise lost.refusal(v2=False)
        self._check_new(event, stamp.now, v2=v2)
        taken = self._take(event, meter, lost, stamp)
        self._report([taken] if lost else [], stamp.now)
        return taken

    def receive_batch(self, events: Iterable[Json], stamp: Stamp) -> None:
        """Take what the v2 stream sends: everything; flaws are reported later, duplicates dropped."""
        rejected = []
        for event in events:
            if self._known(event.get("identifier"), stamp.now):
                continue
            meter, flaw = self._examine(event, stamp.now)
            if meter is not None and flaw is None:
                flaw = self._lost_customer(event, meter)
            taken = self._take(event, meter, flaw, stamp)
            rejected += [taken] if flaw else []
        self._report(rejected, stamp.now)

    def _examine(self, event: Json, now: int) -> tuple[Meter | None, Flaw | None]:
        meter = self.meters.active(event["event_name"])
        if meter is not None:
            return meter, judge(event, meter, now)
        archived = self.meters.named(event["event_name"])
        return (archived[0] if archived else None), missing_meter(event["event_name"], archived=bool(archived))

    def _lost_customer(self, event: Json, meter: Meter) -> Flaw | None:
        customer = event["payload"][meter.customer_key]
        return None if self.customers.exists(customer) else missing_customer(customer, meter)

    def _known(self, identifier: str | None, now: int) -> bool:
        index = self._by_identifier.get(identifier or "")
        # Deduplication is only promised for a rolling 24 hours; later the same identifier is billed again.
        return index is not None and now - self.events[index].created < DAY

    def _check_new(self, event: Json, now: int, *, v2: bool) -> None:
        identifier = event.get("identifier")
        if self._known(identifier, now):
            raise StripeRefusalError(
                f"An event already exists with identifier {identifier}.",
                code="duplicate_meter_event" if v2 else None,
                headers={"Stripe-Should-Retry": "false"},
            )

    def _take(self, event: Json, meter: Meter | None, flaw: Flaw | None, stamp: Stamp) -> AcceptedEvent:
        customer_key = meter.customer_key if meter else "stripe_customer_id"
        value_key = meter.value_key if meter else "value"
        taken = AcceptedEvent(
            event_name=event["event_name"],
            identifier=event.get("identifier") or self._ids.make("evt_id", 32),
            customer=event["payload"].get(customer_key, ""),
            value=number(event["payload"].get(value_key)),
            timestamp=event.get("timestamp", stamp.now),
            payload=event["payload"],
            created=stamp.now,
            meter=meter.id if meter else "",
            request=stamp.request,
            idempotency_key=stamp.idempotency_key,
            rejected=flaw.code if flaw else None,
        )
        self._by_identifier[taken.identifier] = len(self.events)
        self._by_owner.setdefault((taken.meter, taken.customer), []).append(len(self.events))
        self.events.append(taken)
        return taken

    def cancel(self, event_name: str, identifier: str, now: int) -> None:
        """Take back an event that was received less than 24 hours ago."""
        if not self.meters.named(event_name):
            raise missing_meter(event_name, archived=False).refusal(v2=False)
        index = self._by_identifier.get(identifier)
        event = self.events[index] if index is not None else None
        if index is None or event is None or event.event_name != event_name:
            raise no_such("meter event", identifier, param="cancel[identifier]")
        if event.cancelled:
            raise StripeRefusalError(f"The meter event {identifier} has already been cancelled.")
        if now - event.created > DAY:
            raise StripeRefusalError(
                f"The meter event {identifier} was received more than 24 hours ago and can no longer be cancelled."
            )
        self.events[index] = replace(event, cancelled=True)

    def reject(self, identifiers: Sequence[str], code: str, now: int) -> list[Rejection]:
        """Reject events that were taken, as Stripe's later checks do; one report per meter."""
        rejected = []
        for identifier in identifiers:
            index = self._by_identifier.get(identifier)
            if index is None:
                raise no_such("meter event", identifier)
            self.events[index] = replace(self.events[index], rejected=code)
            rejected.append(self.events[index])
        return self._report(rejected, now)

    def _report(self, rejected: Sequence[AcceptedEvent], now: int) -> list[Rejection]:
        by_meter: dict[str, list[AcceptedEvent]] = {}
        for event in rejected:
            by_meter.setdefault(event.meter, []).append(event)
        reports = [self._rejection(meter, events, now) for meter, events in by_meter.items()]
        self.rejections += reports
        return reports

    def _rejection(self, meter: str, events: Sequence[AcceptedEvent], now: int) -> Rejection:
        return Rejection(
            id=self._ids.make("evt", 24),
            type=ERROR_REPORT if meter else NO_METER,
            created=now,
            meter=meter or None,
            data=report_data(events, now, self._rules.error_samples, self._rules.sample_shape),
            livemode=self.livemode,
            context=self._context,
        )

    def find_rejection(self, event_id: str) -> Rejection:
        """The report with this id, for ``GET /v2/core/events/{id}``."""
        for rejection in self.rejections:
            if rejection.id == event_id:
                return rejection
        raise no_such("event", event_id)

    def summaries(
        self, meter_id: str, customer: str, span: tuple[int, int], grouping: str | None, now: int
    ) -> list[Json]:
        """Meter event summaries as of ``summary_lag`` seconds ago, newest window first."""
        meter = self.meters.get(meter_id)
        self.customers.get(customer)
        seen = [event for event in self._owned(meter_id, customer) if event.created <= now - self._rules.summary_lag]
        return summaries(meter, customer, seen, span, grouping)

    def search(self, query: str, now: int) -> list[Json]:
        """Customers that match ``query``, as of ``search_lag`` seconds ago."""
        return [customer.to_stripe() for customer in self.customers.search(query, now, self._rules.search_lag)]

    def _owned(self, meter_id: str, customer: str) -> list[AcceptedEvent]:
        return [self.events[index] for index in self._by_owner.get((meter_id, customer), ())]

    def bill(self, event_name: str, customer: str) -> Decimal:
        """What a customer would be billed, as one period; a negative total bills as 0 [doc]."""
        totals = [aggregate(meter, self._owned(meter.id, customer)) for meter in self.meters.named(event_name)]
        return sum((max(total, Decimal(0)) for total in totals), Decimal(0))

    def bills(self, event_name: str) -> dict[str, Decimal]:
        """What each customer would be billed; who would be billed nothing is left out."""
        meters = {meter.id for meter in self.meters.named(event_name)}
        customers = dict.fromkeys(customer for meter, customer in self._by_owner if meter in meters)
        bills = {customer: self.bill(event_name, customer) for customer in customers}
        return {customer: bill for customer, bill in bills.items() if bill}
