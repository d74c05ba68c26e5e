"""Making the customer that Stripe does not have yet, once, however many ask for it; and what credits one has."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.values import exact_sum
from langchain_stripe_meter.gateway.client import Gateway, as_stripe_error, is_exactly, on_account

MARK = {"created_by": "langchain_stripe_meter"}
"""Metadata of the customers that were made here."""
SEARCH_LAG = 3600
"""Seconds in which Stripe's search may not have seen a customer yet; usually it is less than a minute."""


def find_recent(gateway: Gateway, reference: Reference, account: str, now: int) -> list[str]:
    """Ids of the customers made lately that are exactly ``reference``; lists, unlike searches, never lag."""
    with as_stripe_error("list the newest customers"):
        listed = gateway.client.v1.customers.list(
            {"created": {"gte": now - SEARCH_LAG}, "limit": 100}, on_account(account)
        )
        return [customer.id for customer in listed.auto_paging_iter() if is_exactly(customer, reference)]


def create_customer(gateway: Gateway, reference: Reference, account: str, idempotency_key: str) -> str | None:
    """The id of a customer with this e-mail, name or phone, made now or before under the same ``idempotency_key``.

    None where that customer has been deleted since: whoever deleted it decides, not we. Stripe keeps a key for 24
    hours.
    """
    params: Any = {reference.by: reference.value, "metadata": MARK}
    options: Any = {"idempotency_key": idempotency_key, "max_network_retries": 0, **on_account(account)}
    customers = gateway.client.v1.customers
    with as_stripe_error("create a customer"):
        made = customers.create(params, options)
        response = made.last_response
        if response is None or "Idempotent-Replayed" not in response.headers:
            return str(made.id)
        now = customers.retrieve(made.id, None, on_account(account))
    return None if getattr(now, "deleted", False) else str(made.id)


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
    return exact_sum(Decimal(one.value) for one in amounts if one is not None and one.currency == currency)
