"""What a test does with one account, without HTTP: set the scene, and look at what was billed."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from langchain_stripe_meter.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from decimal import Decimal
    from threading import RLock

    from langchain_stripe_meter.sandbox.account import Account
    from langchain_stripe_meter.sandbox.records import AcceptedEvent, Formula, Meter, Rejection, Window


class AccountHandle:
    """One account of the sandbox, in one mode. Every method may be called from any thread.

    What Stripe would refuse raises ``errors.StripeError`` with Stripe's words.
    """

    def __init__(self, account: Account, lock: RLock, clock: Callable[[], int]) -> None:
        self._account = account
        self._lock = lock
        self._clock = clock

    @property
    def account_id(self) -> str:
        """``acct_…``"""
        return self._account.id

    @property
    def events(self) -> list[AcceptedEvent]:
        """Every meter event that was answered with 2xx, oldest first, whatever became of it."""
        with self._lock:
            return list(self._account.events)

    @property
    def rejections(self) -> list[Rejection]:
        """The asynchronous error reports so far, oldest first."""
        with self._lock:
            return list(self._account.rejections)

    def create_meter(
        self,
        event_name: str,
        *,
        display_name: str | None = None,
        formula: Formula = "sum",
        event_time_window: Window | None = None,
        customer_key: str = "stripe_customer_id",
        value_key: str = "value",
    ) -> Meter:
        """Create an active meter; its event name must not be in use by another one."""
        params = {
            "event_name": event_name,
            "display_name": display_name or event_name,
            "default_aggregation": {"formula": formula},
            "event_time_window": event_time_window,
            "customer_mapping": {"event_payload_key": customer_key, "type": "by_id"},
            "value_settings": {"event_payload_key": value_key},
        }
        with self._lock:
            return self._account.meters.create(params, self._clock())

    def deactivate_meter(self, event_name: str) -> Meter:
        """Stop the active meter of this name; its events are refused from now on."""
        with self._lock:
            return self._account.meters.deactivate(self._newest(event_name).id, self._clock())

    def reactivate_meter(self, event_name: str) -> Meter:
        """Let the newest meter of this name take events again."""
        with self._lock:
            return self._account.meters.reactivate(self._newest(event_name).id, self._clock())

    def _newest(self, event_name: str) -> Meter:
        active = self._account.meters.active(event_name)
        meters = [active] if active else self._account.meters.named(event_name)
        if not meters:
            raise ConfigurationError(f"The sandbox has no meter with the event name {event_name!r}.")
        return meters[0]

    def create_customer(
        self,
        *,
        email: str | None = None,
        name: str | None = None,
        phone: str | None = None,
        metadata: Mapping[str, str] | None = None,
        id: str | None = None,
    ) -> str:
        """Create a customer and return its ``cus_…`` id. E-mail addresses need not be unique, as on Stripe."""
        params = {"email": email, "name": name, "phone": phone, "metadata": dict(metadata or {})}
        with self._lock:
            return self._account.customers.create(params, self._clock(), id).id

    def delete_customer(self, customer_id: str) -> None:
        """Delete a customer; events for it are refused from now on."""
        with self._lock:
            self._account.customers.delete(customer_id, self._clock())

    @overload
    def billed(self, event_name: str, customer: str) -> Decimal: ...

    @overload
    def billed(self, event_name: str, customer: None = None) -> dict[str, Decimal]: ...

    def billed(self, event_name: str, customer: str | None = None) -> Decimal | dict[str, Decimal]:
        """What the customer would be billed on the meter, in the meter's unit, as one billing period.

        What was cancelled or rejected afterwards does not count. Without a customer: what each customer
        would be billed, leaving out those that owe nothing.
        """
        with self._lock:
            return self._account.bills(event_name) if customer is None else self._account.bill(event_name, customer)

    def reject(self, *identifiers: str, code: str = "meter_event_customer_not_found") -> list[Rejection]:
        """Reject events after the fact, as Stripe's later checks do: one report per meter."""
        with self._lock:
            return self._account.reject(identifiers, code, self._clock())
