"""The callback handler: LangChain on one side, the ledger on the other."""

from __future__ import annotations

import asyncio
import atexit
import os
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from langchain_stripe_meter.callbacks import MeteringCallbacks
from langchain_stripe_meter.core.customers import CustomerSource, as_source, first_of, from_auth_user, from_metadata
from langchain_stripe_meter.core.meters import Call, Cost, Meter
from langchain_stripe_meter.delivery.courier import Courier, OnError
from langchain_stripe_meter.errors import ConfigurationError, MeteringError
from langchain_stripe_meter.gateway.client import Gateway, check_key
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.keeping import PruneChore
from langchain_stripe_meter.ledger.store import Leads, Ledger
from langchain_stripe_meter.operations import Operations
from langchain_stripe_meter.recording import OnMissingUsage, Recorder, logger

if TYPE_CHECKING:
    from stripe import StripeClient

DEFAULT_LEDGER = "sqlite:///stripe_meter.db"
EXIT_SECONDS = 2.0
"""How long the interpreter's exit waits for deliveries under way; what remains is sent after the next start."""


class StripeMeterCallbackHandler(MeteringCallbacks, Operations):
    """Records what every LLM run consumed, durably before the run returns, and delivers it to Stripe meters once.

    Args:
        *meters: What is counted: ``Tokens``, ``Messages``, ``Credits``, ``Cost``; at least one.
        customer: Who pays: a ``cus_…`` id or a source such as ``from_metadata(...)``. By default the authenticated
            user of an agent server, else the run's metadata, each under ``stripe_customer_id``.
        ledger: Where usage is kept until Stripe has it: ``sqlite:///file`` (default ``stripe_meter.db``, or
            ``$STRIPE_METER_LEDGER``) or ``postgresql+psycopg://…``.
        stripe: An API key or a ``stripe.StripeClient``; default ``$STRIPE_API_KEY``.
        deliver: False records only; ``stripe-meter deliver`` sends.
        on_missing_usage: What to do when a provider reports no usage: ``"estimate"`` it (marked as such), ``"hold"``
            it for a person, or ``"ignore"`` it.
        bill_cache_hits: Whether answers from LangChain's own cache are billed as calls.
        on_error: Called with a ``MeteringError`` when something could not be recorded or delivered; never raises
            into a chain.
        synchronous: ``"NORMAL"`` trades the last moments before a power loss for speed, on SQLite.
        concurrency: Requests to Stripe in flight at once; one customer and meter never has more than one.
        prune_after_days: Delete what is final and older than so many days (36 at least) while delivering, as
            ``prune`` does; by default everything is kept.

    Raises:
        ConfigurationError: An argument cannot be used; the message names it and says what to do.
        ForeignLedgerError: The key is for test mode and the ledger for live mode, or the reverse. (Where the ledger
            cannot be looked at yet, this is told when it is first used, and nothing is recorded.)

    Attach one instance anywhere and as often as you like: on a call, a model, a chain, or with ``stripe_meter``.
    """

    def __init__(
        self,
        *meters: Meter,
        customer: CustomerSource | str | None = None,
        ledger: str | None = None,
        stripe: str | StripeClient | None = None,
        deliver: bool = True,
        on_missing_usage: OnMissingUsage = "estimate",
        bill_cache_hits: bool = False,
        on_error: OnError | None = None,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        concurrency: int = 16,
        prune_after_days: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.meters = _check_meters(meters)
        self.customer = _default_customer() if customer is None else as_source(customer)
        if on_missing_usage not in ("estimate", "hold", "ignore"):
            raise ConfigurationError(f"on_missing_usage={on_missing_usage!r}: use 'estimate', 'hold' or 'ignore'.")
        if concurrency < 1:
            raise ConfigurationError(f"concurrency={concurrency}: at least 1.")
        url = ledger or os.environ.get("STRIPE_METER_LEDGER") or DEFAULT_LEDGER
        self._ledger = Ledger(url, clock=clock, synchronous=synchronous)
        self._courier: Courier | None = None
        if deliver or stripe is not None:
            gateway = Gateway(check_key(stripe, otherwise=", or pass deliver=False to record only"))
            self._ledger.pin(is_test=gateway.is_test)
        if deliver:
            chores = [] if prune_after_days is None else [PruneChore(self._ledger, prune_after_days)]
            self._courier = Courier(self._ledger, gateway, concurrency=concurrency, on_error=on_error, chores=chores)
        self.leads = Leads(self._ledger)
        recorder = Recorder(
            self.meters, self.customer, self._ledger, self.leads, self._courier,
            on_missing_usage, bill_cache_hits, on_error,
        )  # fmt: skip
        super().__init__(recorder)
        atexit.register(_close_at_exit, weakref.ref(self))

    def __repr__(self) -> str:
        names = ", ".join(meter.event_name for meter in self.meters)
        return f"{type(self).__name__}({names}; {self._ledger!r})"

    # -- what has no run

    def record_usage(
        self,
        usage: Mapping[str, Any],
        *,
        id: str,
        model: str | None = None,
        provider: str | None = None,
        customer: CustomerSource | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        at: int | None = None,
    ) -> None:
        """Record what LangChain has no callback for: embeddings, images, provider batch jobs.

        ``usage`` is shaped like LangChain's ``usage_metadata``; a sum that is left out is 0. The meters that count
        calls apply. ``id`` names the job: the same id is never billed twice. ``customer`` defaults to the handler's
        source, read against ``metadata``. ``at`` is when it happened, in Unix seconds (default now).

        Unlike a run, this raises: ``MeteringError`` if the input is bad or the ledger cannot store it.
        """
        call = Call(None, model, provider)
        entries = self._recorder.usage_entries(usage, id=id, call=call, customer=customer, metadata=metadata, at=at)
        if entries:
            self._ledger.record(entries)
        self._recorder.recorded(entries)

    async def arecord_usage(self, usage: Mapping[str, Any], *, id: str, **options: Any) -> None:
        """As ``record_usage``, without blocking the event loop."""
        await asyncio.to_thread(self.record_usage, usage, id=id, **options)

    # -- seeing it

    def flush(self, timeout: float = 10.0) -> views.FlushReport:
        """Wait until nothing is pending, at most ``timeout`` seconds, and report. Never raises for Stripe's sake.

        With ``deliver=False`` nothing is sent here, so it reports at once.
        """
        deadline = time.monotonic() + timeout
        self._recorder.settle(self._sweep)
        self._ledger.wait_for_writes()
        while self._courier is not None and self._pending():
            self._courier.wake()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(0.02, left))
        return self._report()

    async def aflush(self, timeout: float = 10.0) -> views.FlushReport:
        """As ``flush``, without blocking the event loop."""
        return await asyncio.to_thread(self.flush, timeout)

    def _pending(self) -> int:
        with self._ledger.deliver_lane().lock, self._ledger.read() as connection:
            return views.pending(connection)

    def _report(self) -> views.FlushReport:
        with self._ledger.read() as connection:
            pending = views.pending(connection)
            held, doubtful = views.attention(connection)
        courier = self._courier
        return views.FlushReport(
            delivered=courier.delivered if courier else 0,
            pending=pending,
            held=held,
            skipped=self._recorder.skipped,
            rejected=courier.rejected if courier else 0,
            doubtful=doubtful,
        )

    def status(self) -> views.Status:
        """Counts and ages: the ledger as it stands, and this handler's open, abandoned and unrecorded runs."""
        self._recorder.settle(self._sweep)
        with self._lock:
            open_runs, abandoned = len(self._runs), self._runs.abandoned
        return replace(
            views.status(self._ledger),
            open_runs=open_runs,
            abandoned=abandoned,
            unrecorded=self._recorder.unrecorded,
        )

    def close(self, timeout: float = 10.0) -> views.FlushReport:
        """Deliver what is pending, at most ``timeout`` seconds, then let go of threads and connections.

        What was not delivered stays in the ledger, and is sent after the next start.
        """
        deadline = time.monotonic() + timeout
        with ExitStack() as stack:
            stack.callback(self._ledger.close)
            if self._courier is not None:
                stack.callback(self._courier.gateway.close)
            try:
                self.flush(timeout)
            finally:
                if self._courier is not None:
                    self._courier.close(deadline - time.monotonic())
            return self._report()

    def __enter__(self) -> StripeMeterCallbackHandler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.close()
        except MeteringError as error:  # what the block did matters more, and what it recorded is still in the ledger
            logger.error("stripe-meter: closing failed: %s", error)


def _check_meters(meters: tuple[Meter, ...]) -> tuple[Meter, ...]:
    if not meters:
        raise ConfigurationError("StripeMeterCallbackHandler needs at least one meter, such as Tokens('ai_tokens').")
    for meter in meters:
        if not isinstance(meter, Meter):
            raise ConfigurationError(f"{meter!r} is not a meter. Use Tokens, Messages, Credits or Cost.")
    names = [meter.event_name for meter in meters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigurationError(f"Two meters have the event name {twice!r}; each needs its own, or one would be lost.")
    return tuple(_priced(meter) for meter in meters)


def _priced(meter: Meter) -> Meter:
    if not isinstance(meter, Cost) or meter.pricer is not None:
        return meter
    from langchain_stripe_meter.prices import genai_price, is_installed

    if not is_installed():
        if meter.prices:
            return meter
        raise ConfigurationError("Cost needs prices: pip install 'langchain-stripe-meter[prices]', or pass prices=.")
    return replace(meter, pricer=genai_price)


def _default_customer() -> CustomerSource:
    return first_of(from_auth_user("stripe_customer_id"), from_metadata("stripe_customer_id"))


def _close_at_exit(reference: weakref.ref[StripeMeterCallbackHandler]) -> None:
    handler = reference()
    courier = handler._courier if handler is not None else None
    if handler is not None and courier is not None and courier.is_running:
        handler.close(EXIT_SECONDS)
