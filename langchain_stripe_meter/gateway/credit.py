"""What Stripe says of a customer's billing credits."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from langchain_stripe_meter.gateway.client import Gateway, as_stripe_error, on_account


def credit_of(gateway: Gateway, customer: str, currency: str, account: str = "") -> Decimal:
    """What the customer's credits for metered prices still pay for, in the currency's minor unit; 0 without credits.
    Below 0 where more was taken than there was. ``currency`` is in lower case, as Stripe writes them.

    Stripe takes usage off them when it finalises the invoice of a period, not before. Raises ``StripeError``.
    """
    wanted: Any = {
        "customer": customer,
        "filter": {"type": "applicability_scope", "applicability_scope": {"price_type": "metered"}},
    }
    with as_stripe_error("read the customer's credit balance"):
        summary = gateway.client.v1.billing.credit_balance_summary.retrieve(wanted, on_account(account))
    amounts = [balance.available_balance.monetary for balance in summary.balances]
    return sum((Decimal(one.value) for one in amounts if one is not None and one.currency == currency), Decimal(0))
