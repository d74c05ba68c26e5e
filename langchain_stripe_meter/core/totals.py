"""The ledger's totals against Stripe's: what agrees, what is still on its way, what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from langchain_stripe_meter.core.exact import EXACT, exact_sum
from langchain_stripe_meter.core.states import EventState

_ON_THE_WAY = (EventState.SENDING, EventState.DOUBTFUL)
"""States in which Stripe may have an amount or not: nobody knows yet."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One customer's usage on one meter: what the ledger says, and what Stripe says.

    ``recorded`` is everything, in whatever state; ``delivered`` what Stripe took; ``uncertain`` what it may or may not
    have; ``at_stripe`` its own sum, None where it cannot be asked (customer or meter unknown). ``account`` is the
    connected account, ``""`` the key's own.
    """

    event_name: str
    customer: str
    recorded: Decimal
    delivered: Decimal
    uncertain: Decimal
    at_stripe: Decimal | None
    account: str = ""

    @property
    def difference(self) -> Decimal:
        """How far Stripe's sum lies outside what is possible: positive, it has too much; negative, too little."""
        at_stripe = Decimal(0) if self.at_stripe is None else self.at_stripe
        bounds = sorted((self.delivered, EXACT.add(self.delivered, self.uncertain)))
        return EXACT.subtract(at_stripe, min(max(at_stripe, bounds[0]), bounds[1]))


def compare(
    event_name: str,
    customer: str,
    amounts: Mapping[str, Decimal],
    at_stripe: Decimal | None,
    account: str = "",
    *,
    later: Mapping[str, Decimal] | None = None,
) -> Comparison:
    """Hold the ledger's ``amounts`` by state, as they were before Stripe was asked, against Stripe's sum.

    ``later`` are those after Stripe was asked: what was delivered in between may be in its sum or not.
    """
    delivered, uncertain = amounts.get(EventState.DELIVERED, Decimal(0)), _on_the_way(amounts)
    if later is not None:
        most = EXACT.add(later.get(EventState.DELIVERED, Decimal(0)), _on_the_way(later))
        uncertain = max(uncertain, EXACT.subtract(most, delivered))
    return Comparison(
        event_name=event_name,
        customer=customer,
        recorded=exact_sum(amounts.values()),
        delivered=delivered,
        uncertain=uncertain,
        at_stripe=at_stripe,
        account=account,
    )


def _on_the_way(amounts: Mapping[str, Decimal]) -> Decimal:
    return exact_sum(amounts.get(state, Decimal(0)) for state in _ON_THE_WAY)
