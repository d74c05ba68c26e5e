"""The face of the sandbox: what a test does with it, and with one account of it, beside speaking HTTP."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, Self, overload

from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox.keys import LIVE
from langchain_stripe_meter.sandbox.server import Desk, SandboxServer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from threading import RLock

    from langchain_stripe_meter.sandbox.account import Account
    from langchain_stripe_meter.sandbox.faults import Condition, Fault
    from langchain_stripe_meter.sandbox.rules import AcceptedEvent, Formula, Meter, Rejection, SampleShape, Window
    from langchain_stripe_meter.sandbox.wire import RecordedRequest

METER_EVENTS = "/v1/billing/meter_events"
_ROUNDING = 1e-4
"""Seconds, so that ``set_time(t)`` is ``t`` and never, by a rounding error, ``t - 1``."""


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
        return self._switch(event_name, active=False)

    def reactivate_meter(self, event_name: str) -> Meter:
        """Let the newest meter of this name take events again."""
        return self._switch(event_name, active=True)

    def _switch(self, event_name: str, *, active: bool) -> Meter:
        with self._lock:
            meter = self._account.meters.find(event_name)
            if meter is None:
                raise ConfigurationError(f"The sandbox has no meter with the event name {event_name!r}.")
            return self._account.meters.switch(meter.id, self._clock(), active=active)

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
        if id is not None:
            check_customer_id(id)
        params = {"email": email, "name": name, "phone": phone, "metadata": dict(metadata or {})}
        with self._lock:
            return self._account.customers.create(params, self._clock(), id).id

    def delete_customer(self, customer_id: str) -> None:
        """Delete a customer; events for it are refused from now on."""
        with self._lock:
            self._account.customers.delete(customer_id, self._clock())

    def set_credit(self, customer_id: str, amount: int, currency: str = "usd") -> None:
        """What the customer's billing credits still pay for, in the currency's minor unit (cents)."""
        with self._lock:
            customer = self._account.customers.get(customer_id)
            self._account.credits.setdefault(customer.id, {})[currency] = amount

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
            bills = self._account.bills(event_name, customer)
        return bills if customer is None else bills.get(customer, Decimal(0))

    def reject(self, *identifiers: str, code: str = "meter_event_customer_not_found") -> list[Rejection]:
        """Reject events after the fact, as Stripe's later checks do: one report per meter."""
        with self._lock:
            return self._account.reject(identifiers, code, self._clock())


class StripeSandbox(AccountHandle):
    """A stand-in for Stripe on 127.0.0.1, with Stripe's rules for billing meters.

    Use it as a context manager, or ``start()`` and ``stop()`` it. While it is stopped, connections are
    refused and its state is kept; started again, it has the same address.

    These may be set at any time:

    - ``customer_check``: "sync" refuses an event for an unknown customer at once, "async" takes it and
      reports it later (sources disagree about which Stripe does);
    - ``search_lag`` and ``summary_lag``: seconds on the sandbox's clock until customers can be searched
      for, and until summaries show events, and that they were cancelled;
    - ``error_samples``: how many failed requests an asynchronous error report names per error code;
    - ``sample_shape``: how it names them ("identifier", "idempotency_key" or "request");
    - ``webhook_secret``: what ``thin_event`` signs with.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        account_id: str = "acct_1Sandbox",
        api_key: str = "sk_test_sandbox",
        customer_check: Literal["sync", "async"] = "sync",
        search_lag: int = 0,
        summary_lag: int = 0,
    ) -> None:
        """``port`` 0 takes any free one; lags in seconds. With an ``api_key`` that begins with ``sk_live_``, what the
        sandbox itself makes is live data: the stream of API v2 is there in live mode only."""
        self.api_key = api_key
        self.customer_check = customer_check
        self.search_lag = search_lag
        self.summary_lag = summary_lag
        self.error_samples = 10
        self.sample_shape: SampleShape = "identifier"
        self.webhook_secret = "whsec_sandbox"  # noqa: S105 - guards nothing
        self._offset = 0.0
        self._port = port
        self._server: SandboxServer | None = None
        self._desk = Desk(self, self.now)
        super().__init__(self._desk.account(account_id, livemode=api_key.startswith(LIVE)), self._desk.lock, self.now)
        self.allow(api_key)

    def __repr__(self) -> str:
        return f"<StripeSandbox {self.url if self._port else '(never started)'}>"

    def start(self) -> Self:
        """Start listening; does nothing if it does already."""
        if self._server is None:
            self._desk.stopping.clear()
            self._server = SandboxServer(self._port, self._desk)
            self._port = self._server.port
        return self

    def stop(self) -> None:
        """Close every connection and end every thread; requests that hang are dropped undone."""
        if self._server is not None:
            self._desk.stopping.set()
            self._server.close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """``http://127.0.0.1:<port>``, for both of the client's base addresses."""
        if not self._port:
            raise ConfigurationError("The sandbox has no address before it was started. Use `with StripeSandbox()`.")
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """The environment variables that point this package at the sandbox."""
        return {"STRIPE_API_KEY": self.api_key, "STRIPE_METER_API_BASE": self.url}

    @property
    def requests(self) -> list[RecordedRequest]:
        """Every request that was answered (or dropped) so far, in the order of the answers."""
        with self._lock:
            return list(self._desk.requests)

    def now(self) -> int:
        """The sandbox's time in Unix seconds: the real time, moved by ``advance`` and ``set_time``."""
        return int(time.time() + self._offset + _ROUNDING)

    def advance(self, *, seconds: int = 0, hours: int = 0, days: int = 0) -> None:
        """Move the clock on (or back, with negative numbers)."""
        with self._lock:
            self._offset += seconds + 3600 * hours + 86_400 * days

    def set_time(self, epoch: int) -> None:
        """Set the clock to ``epoch`` (Unix seconds); it goes on from there."""
        with self._lock:
            self._offset = epoch - time.time()

    def fail(
        self, *faults: Fault, path: str | None = METER_EVENTS, times: int | None = 1, where: Condition | None = None
    ) -> None:
        """Let coming requests go wrong.

        The faults are met one after the other, each by ``times`` requests (None: by all until
        ``clear_faults``). Only requests for ``path`` count (``*`` matches anything, None is every path)
        for which ``where(request)`` is true, and that have a valid key and it is their turn.
        """
        with self._lock:
            for fault in faults:
                self._desk.plan.add(fault, path, times, where)

    def clear_faults(self) -> None:
        """Forget all faults that have not happened yet."""
        with self._lock:
            self._desk.plan.clear()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Inside the block, everything is refused with 503; nothing is done or stored."""
        with self._lock:
            self._desk.outages += 1
        try:
            yield
        finally:
            with self._lock:
                self._desk.outages -= 1

    def allow(self, key: str, permissions: Collection[str] | None = None, *, account: str | None = None) -> None:
        """Let an API key in, for ``account`` (default: the sandbox's own).

        ``permissions`` is None for everything, or such as ``{"meter_events:write", "meters:read"}``. Keys
        that begin with ``sk_live_`` or ``rk_live_`` work on live data, which is separate.
        """
        with self._lock:
            self._desk.keys.allow(key, account or self.account_id, permissions)

    def revoke(self, key: str) -> None:
        """Answer 401 to this key from now on, until it is allowed again."""
        with self._lock:
            self._desk.keys.revoke(key)

    def connect(self, account_id: str, *, livemode: bool = False) -> AccountHandle:
        """A connected account, made on first demand, that ``Stripe-Account`` reaches.

        With the sandbox's own id and ``livemode=True``: its live data.
        """
        account = self._desk.account(account_id, livemode=livemode)
        account.connected = account_id != self.account_id
        return AccountHandle(account, self._lock, self.now)

    def thin_event(self, rejection: Rejection) -> tuple[bytes, str]:
        """The webhook request for a rejection: its raw body and its ``Stripe-Signature`` header.

        The signature is dated by the sandbox's clock; the client refuses dates more than 300 seconds old.
        """
        body, now = json.dumps(rejection.notification()).encode(), self.now()
        signature = hmac.new(self.webhook_secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
        return body, f"t={now},v1={signature}"
