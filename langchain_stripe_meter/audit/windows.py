"""What Stripe's error reports do not name: found by holding the ledger against Stripe's sums, minute by minute.

As for doubts, sums are looked at once they had time to settle, and only two looks that found the same decide anything.
Where Stripe has nothing of what customers used in a minute, all of it is rejected. Where it has a part, or lacks more
than it reported, nobody can say which it refused: that is told to a person, by name, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

from langchain_stripe_meter.core.totals import Minute, Sample, Verdict, disagreeing
from langchain_stripe_meter.core.values import exact_sum
from langchain_stripe_meter.errors import OnError, StripeError, logger
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import billed_on, meters_named
from langchain_stripe_meter.ledger import reports
from langchain_stripe_meter.ledger.acts import UNEXPLAINED
from langchain_stripe_meter.ledger.reports import Difference, Window
from langchain_stripe_meter.ledger.store import Ledger, write_act
from langchain_stripe_meter.telling import tell

CUSTOMERS_AT_ONCE = 20
"""How many customers one look at a window asks Stripe about; delivery waits meanwhile, and goes first."""
ABSENT_CODE = "absent at Stripe after it reported unnamed errors; not to be sent again if cancelled at Stripe by hand"


class Windows:
    """Settles what reports leave open. ``chore`` is a courier's."""

    def __init__(self, ledger: Ledger, gateway: Gateway, on_error: OnError | None = None) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self._on_error = on_error

    def chore(self, _now: int) -> None:
        """Look at everything that is open, as often as a courier has time. What Stripe does not answer is asked again
        later."""
        with self._ledger.read() as connection:
            names = reports.windows(connection)
        for name in names:
            self._take_waiting(name)
            with self._ledger.read() as connection:
                known = reports.window(connection, name)
                if known is None or known.remaining <= 0:
                    continue
                if not reports.is_readable(connection, known, self._ledger.now()):
                    continue
            try:
                self._look(known)
            except StripeError as error:
                logger.info("stripe-meter: an error report cannot be followed up yet: %s", error)

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

    def _look(self, known: Window) -> None:
        """Go on with a look, once its sums have settled; where it is over, decide, if the one before found the same."""
        with self._ledger.read() as connection:
            customers = reports.customers(connection, known, CUSTOMERS_AT_ONCE)
        if self._is_changing(known, customers):
            return
        meters = meters_named(self._gateway, known.account) if customers else {}
        found = [
            one
            for event_name, customer in customers
            for one in self._of_customer(known, event_name, customer, meters.get(event_name, []))
        ]
        if self._is_changing(known, customers):  # something was sent while Stripe was asked
            return
        after = replace(known, found=(*known.found, *found))
        if len(customers) == CUSTOMERS_AT_ONCE:
            self._store(known, replace(after, after=customers[-1]))
        elif known.seen_at is not None and set(after.found) == set(known.seen):
            self._decide(known)
        else:
            now = self._ledger.now()
            self._store(known, replace(after, after=("", ""), found=(), seen=after.found, seen_at=now))

    def _is_changing(self, known: Window, customers: Sequence[tuple[str, str]]) -> bool:
        with self._ledger.read() as connection:
            return reports.is_changing(connection, known, customers, self._ledger.now())

    def _of_customer(self, known: Window, event_name: str, customer: str, meters: list[str]) -> Iterator[Difference]:
        """Compare one customer's minutes on one meter."""
        with self._ledger.read() as connection:
            minutes = reports.minutes(connection, known, event_name, customer, self._ledger.now())

        def ask(start: int, end: int) -> Decimal | None:
            billed = billed_on(self._gateway, meters, customer, (start, end), known.account)
            return Decimal(0) if billed is None and known.customer_missing else billed

        for minute, verdict, at_stripe in disagreeing(minutes, ask):
            if minute.delivered:
                said = f"{customer} on {event_name}, {_said(minute, at_stripe)}"
                yield Difference(event_name, customer, said, tuple(minute.delivered), verdict is Verdict.ABSENT)

    def _decide(self, known: Window) -> None:
        """What two looks saw is absent is rejected; unless it is more than Stripe says it refused, in this report and
        others: then its sums lag all the same, or somebody cancelled by hand."""
        absent = [name for one in known.seen if one.is_absent for name in one.identifiers]
        with self._ledger.read() as connection:
            rejects = len(absent) <= reports.remaining(connection, known)
        unexplained = [one for one in known.seen if not (rejects and one.is_absent)]
        rejected = self._store(known, replace(known, remaining=0), absent if rejects else [], unexplained)
        tell_rejected(self._on_error, rejected or [], [ABSENT_CODE])
        if unexplained and rejected is not None:
            tell(self._on_error, StripeError(
                "Stripe reported errors that it did not name, and has other sums: "
                f"{some([one.said for one in unexplained], '; ')}. Nothing was changed there. Look at them at Stripe, "
                "and bill what it lacks with correct()."
            ))  # fmt: skip

    def _store(
        self,
        known: Window,
        after: Window,
        absent: Sequence[str] = (),
        unexplained: Sequence[Difference] = (),
    ) -> list[str] | None:
        """What was rejected; None, and nothing is changed, where another process was faster."""
        with self._ledger.deliver_lane().transaction() as connection:
            stored = reports.window(connection, known.name)
            if stored is None or replace(stored, waiting=known.waiting) != known:
                return None
            now = self._ledger.now()
            rejected = reports.reject_absent(connection, absent, known.account, ABSENT_CODE, now)
            for one in unexplained:
                write_act(connection, UNEXPLAINED, one.identifiers[0], one.said, now)
            reports.keep(connection, replace(after, waiting=stored.waiting), now)
        return rejected


def _said(minute: Minute, at_stripe: Decimal | None) -> str:
    when = datetime.fromtimestamp(minute.start, UTC).strftime("%Y-%m-%d %H:%M UTC")
    stripe = "cannot say" if at_stripe is None else f"has {at_stripe:,}"
    return f"{when}: delivered {exact_sum(minute.delivered.values()):,}, Stripe {stripe}"


def tell_rejected(on_error: OnError | None, identifiers: Iterable[str], codes: Iterable[str]) -> None:
    """Say which events Stripe refused after it had taken them, and what to do."""
    named: Sequence[str] = list(identifiers)
    if named:
        tell(on_error, StripeError(
            f"Stripe rejected {len(named)} meter events after it took them ({', '.join(sorted(set(codes)))}): "
            f"{some(named)}. Repair the cause, then retry() them or write them off."
        ))  # fmt: skip


def tell_late(on_error: OnError | None, identifiers: Sequence[str]) -> None:
    """Say which events were sent again after what a report is about."""
    if identifiers:
        tell(on_error, StripeError(
            f"Stripe reported errors of {len(identifiers)} meter events that were sent again later: "
            f"{some(identifiers)}. Nothing was changed. Where verify() shows that Stripe lacks one, bill it with "
            "correct()."
        ))  # fmt: skip


def some(said: Sequence[str], between: str = ", ") -> str:
    """The first ten, and how many more there are."""
    more = len(said) - 10
    return between.join(said[:10]) + (f" and {more} more" if more > 0 else "")
