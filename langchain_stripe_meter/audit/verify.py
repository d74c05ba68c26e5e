"""Does Stripe agree? The ledger's totals against Stripe's own meter event summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from langchain_stripe_meter.core.totals import Comparison, compare
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger

MINUTE = 60


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared. ``agrees`` is False where Stripe's sum cannot be explained by what the ledger knows.

    Summaries lag behind (there is no published bound): a customer who has *too little* at Stripe minutes after a
    delivery may only need time; one who has *too much* was sent usage that this ledger does not know.
    """

    comparisons: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether there is no difference at all."""
        return not self.differences

    @property
    def differences(self) -> tuple[Comparison, ...]:
        """The comparisons that do not agree."""
        return tuple(one for one in self.comparisons if one.difference)

    def _repr_html_(self) -> str:
        head = (*(one.name for one in fields(Comparison)), "difference")
        return views.html_table(head, [tuple(getattr(one, name) for name in head) for one in self.comparisons])


def verify(
    ledger: Ledger, gateway: Gateway, since: int = 0, *, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compare per customer and meter, for usage since ``since`` (Unix seconds, taken down to its minute).

    ``progress`` is told how many of how many customers and meters are done. Raises ``StripeError`` where the key may
    not read meters.
    """
    start = since - since % MINUTE
    end = ledger.now() // MINUTE * MINUTE + 10 * MINUTE  # events may lie five minutes ahead
    asked = [
        (account, event_name, customer, states)
        for account in views.accounts(ledger)
        for (event_name, customer), states in sorted(views.totals(ledger, start, account).items())
        if customer != "?"
    ]
    comparisons = []
    for done, (account, event_name, customer, states) in enumerate(asked, 1):
        meter = gateway.meter(event_name, account)
        if meter is None and not gateway.can_read_meters(account):
            raise StripeError(
                "The key may not read meters, so there is nothing to compare with. Give it that permission."
            )
        at_stripe = gateway.billed(meter.id, customer, start, end, account) if meter else None
        comparisons.append(compare(event_name, customer, states, at_stripe, account))
        if progress is not None:
            progress(done, len(asked))
    return Verification(tuple(comparisons))
