"""What Stripe's error reports do not name: found by holding the ledger against Stripe's sums, minute by minute.

Where Stripe has nothing of what a customer used in a minute, all of it is rejected. Where it has a part, nobody can
say which: that is told to a person, by name, and nothing is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal

from langchain_stripe_meter.core.totals import Minute, Sample, Verdict, disagreeing
from langchain_stripe_meter.errors import OnError, StripeError, tell
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import billed_on, meters_named
from langchain_stripe_meter.ledger import reports
from langchain_stripe_meter.ledger.acts import UNEXPLAINED
from langchain_stripe_meter.ledger.reports import Window
from langchain_stripe_meter.ledger.store import Ledger, write_act

CUSTOMERS_AT_ONCE = 20
"""How many customers one look at a window asks Stripe about; delivery waits meanwhile, and goes first."""
ABSENT_CODE = "absent at Stripe after it reported unnamed errors"

logger = logging.getLogger("langchain_stripe_meter")


@dataclass(frozen=True, slots=True)
class Unexplained:
    """What a customer used of a meter in one minute (Unix seconds), of which Stripe has another sum.

    ``at_stripe`` is None where Stripe cannot be asked. ``identifiers`` are the events that it took.
    """

    event_name: str
    customer: str
    minute: int
    delivered: Decimal
    at_stripe: Decimal | None
    identifiers: tuple[str, ...]
    account: str = ""

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.minute, UTC).strftime("%Y-%m-%d %H:%M UTC")
        stripe = "cannot say" if self.at_stripe is None else f"has {self.at_stripe:,}"
        return f"{self.customer} on {self.event_name}, {when}: delivered {self.delivered:,}, Stripe {stripe}"


@dataclass(frozen=True, slots=True)
class Found:
    """What looking at windows came to: identifiers (before they were replaced) that were rejected, and what nobody
    can tell but a person."""

    rejected: tuple[str, ...] = ()
    unexplained: tuple[Unexplained, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.rejected + other.rejected, self.unexplained + other.unexplained)


class Windows:
    """Settles what reports leave open. ``look`` is a courier's chore."""

    def __init__(self, ledger: Ledger, gateway: Gateway, on_error: OnError | None = None) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self._on_error = on_error

    def chore(self, _now: int) -> None:
        """Look at everything that is open, as often as a courier has time."""
        with self._ledger.read() as connection:
            names = reports.windows(connection)
        for name in names:
            self.look(name)

    def look(self, name: str) -> Found:
        """Settle what can be settled of one window by now. What Stripe does not answer is asked again later."""
        self._take_waiting(name)
        with self._ledger.read() as connection:
            known = reports.window(connection, name)
            if known is None or known.remaining <= 0:
                return Found()
            readable = reports.readable_from(connection, known)
        if readable is not None and readable > self._ledger.now():
            return Found()
        try:
            return self._compare(known)
        except StripeError as error:
            logger.info("stripe-meter: an error report cannot be followed up yet: %s", error)
            return Found()

    def _take_waiting(self, name: str) -> None:
        """Named events whose own answer has come in meanwhile."""
        with self._ledger.deliver_lane().transaction() as connection:
            known = reports.window(connection, name)
            if known is None or not known.waiting:
                return
            now = self._ledger.now()
            samples = [Sample(identifier, code) for identifier, code in known.waiting.items()]
            taken = reports.take(connection, samples, known.account, known.end, now)
            if taken.waiting != known.waiting:
                reports.keep(connection, replace(known, waiting=taken.waiting), now)
        tell_rejected(self._on_error, taken.rejected, known.waiting.values())
        tell_late(self._on_error, taken.late)

    def _compare(self, known: Window) -> Found:
        with self._ledger.read() as connection:
            customers = reports.customers(connection, known, CUSTOMERS_AT_ONCE)
        meters = meters_named(self._gateway, known.account) if customers else {}
        found, remaining = Found(), known.remaining
        for event_name, customer in customers:
            if remaining <= 0:
                break
            new = self._of_customer(known, event_name, customer, meters.get(event_name, []), remaining)
            remaining -= len(new.rejected)
            found += new
        done = remaining <= 0 or len(customers) < CUSTOMERS_AT_ONCE
        after = customers[-1] if customers else known.after
        return self._store(known, replace(known, remaining=0 if done else remaining, after=after), found)

    def _of_customer(self, known: Window, event_name: str, customer: str, meters: list[str], most: int) -> Found:
        """Compare one customer's minutes on one meter, and decide; at most ``most`` events are absent by the report."""
        now = self._ledger.now()
        with self._ledger.read() as connection:
            minutes = reports.minutes(connection, known, event_name, customer, now)

        def ask(start: int, end: int) -> Decimal | None:
            billed = billed_on(self._gateway, meters, customer, (start, end), known.account)
            return Decimal(0) if billed is None and known.customer_missing else billed

        found = list(disagreeing(minutes, ask))
        absent = [minute for minute, verdict, _ in found if verdict is Verdict.ABSENT]
        identifiers = tuple(identifier for minute in absent for identifier in minute.delivered)
        if len(identifiers) > most:  # more than Stripe says it refused: its sums lag, or somebody cancelled by hand
            identifiers = ()
            absent = []
        unexplained = tuple(
            _unexplained(minute, at_stripe, event_name, customer, known.account)
            for minute, _, at_stripe in found
            if minute not in absent and minute.delivered
        )
        return Found(identifiers, unexplained)

    def _store(self, known: Window, after: Window, found: Found) -> Found:
        """All in one transaction, unless another process was faster."""
        with self._ledger.deliver_lane().transaction() as connection:
            stored = reports.window(connection, known.name)
            if stored is None or (stored.after, stored.remaining) != (known.after, known.remaining):
                return Found()
            now = self._ledger.now()
            rejected = reports.reject_absent(connection, found.rejected, known.account, ABSENT_CODE, now)
            for one in found.unexplained:
                write_act(connection, UNEXPLAINED, one.identifiers[0], str(one), now)
            reports.keep(connection, replace(after, waiting=stored.waiting), now)
        found = replace(found, rejected=tuple(rejected))
        tell_rejected(self._on_error, found.rejected, [ABSENT_CODE])
        for one in found.unexplained:
            tell(self._on_error, StripeError(f"Stripe reported errors that it did not name, and differs for {one}."))
        return found


def _unexplained(
    minute: Minute, at_stripe: Decimal | None, event_name: str, customer: str, account: str
) -> Unexplained:
    delivered = sum(minute.delivered.values(), Decimal(0))
    return Unexplained(event_name, customer, minute.start, delivered, at_stripe, tuple(minute.delivered), account)


def tell_rejected(on_error: OnError | None, identifiers: Iterable[str], codes: Iterable[str]) -> None:
    """Say which events Stripe refused after it had taken them, and what to do."""
    named: Sequence[str] = list(identifiers)
    if named:
        tell(on_error, StripeError(
            f"Stripe rejected {len(named)} meter events after it took them ({', '.join(sorted(set(codes)))}): "
            f"{_some(named)}. Repair the cause, then retry() them or write them off."
        ))  # fmt: skip


def tell_late(on_error: OnError | None, identifiers: Sequence[str]) -> None:
    """Say which events were sent again after what a report is about."""
    if identifiers:
        tell(on_error, StripeError(
            f"Stripe reported errors of {len(identifiers)} meter events that were sent again later: "
            f"{_some(identifiers)}. Nothing was changed. Where verify() shows that Stripe lacks one, bill it with "
            "correct()."
        ))  # fmt: skip


def _some(identifiers: Sequence[str]) -> str:
    more = len(identifiers) - 10
    return ", ".join(identifiers[:10]) + (f" and {more} more" if more > 0 else "")
