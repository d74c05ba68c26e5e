"""The customers of a stand-in account: listed consistently, searched with a lag."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.params import EXPAND, Field, check
from langchain_stripe_meter.sandbox.records import Customer
from langchain_stripe_meter.sandbox.replies import Json, StripeRefusalError, bad_parameter, no_such
from langchain_stripe_meter.sandbox.search import parse

if TYPE_CHECKING:
    from langchain_stripe_meter.sandbox.ids import Ids

CREATE = {
    "email": Field(limit=512),
    "name": Field(limit=256),
    "phone": Field(limit=20),
    "metadata": Field("map", limit=500),
    "expand": EXPAND,
}


class Customers:
    """Customers by id. Nothing about them is unique, least of all the e-mail address."""

    def __init__(self, ids: Ids, *, livemode: bool) -> None:
        self._ids = ids
        self._livemode = livemode
        self._customers: dict[str, Customer] = {}

    def create(self, params: Json, now: int, customer_id: str | None = None) -> Customer:
        """Create a customer from the parameters of ``POST /v1/customers``."""
        wanted = check(params, CREATE)
        _check_email(wanted.get("email"))
        customer_id = customer_id or self._ids.make("cus")
        if customer_id in self._customers:
            raise StripeRefusalError("Customer already exists.", code="resource_already_exists", param="id")
        wanted.pop("expand", None)
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

    def all(self, email: str | None = None) -> list[Customer]:
        """Newest first, at once; ``email`` matches exactly, case included."""
        return [
            customer
            for customer in reversed(self._customers.values())
            if customer.deleted_at is None and (email is None or customer.email == email)
        ]

    def search(self, query: str, now: int, lag: int) -> list[Customer]:
        """What the search index knows: the account as it was ``lag`` seconds ago, deletions too."""
        matches = parse(query)
        return [c for c in reversed(self._customers.values()) if _indexed(c, now - lag) and matches(c)]


def _indexed(customer: Customer, as_of: int) -> bool:
    return customer.created <= as_of and (customer.deleted_at is None or customer.deleted_at > as_of)


def _check_email(email: str | None) -> None:
    if email is not None and ("@" not in email.strip("@") or any(map(str.isspace, email))):
        raise bad_parameter(f"Invalid email address: {email}", "email", "email_invalid")
