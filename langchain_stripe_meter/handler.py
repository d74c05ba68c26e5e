"""The callback handler: LangChain on one side, the ledger on the other."""

from __future__ import annotations

import asyncio
import atexit
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from langchain_stripe_meter.audit.chores import Ages, chores
from langchain_stripe_meter.callbacks import MeteringCallbacks
from langchain_stripe_meter.core.customers import CustomerSource, as_source, first_of, from_auth_user, from_metadata
from langchain_stripe_meter.core.events import check_account, check_on_error, check_tenant, check_webhook_secret
from langchain_stripe_meter.core.meters import Call, Meter
from langchain_stripe_meter.core.tenants import Tenant, TenantSource, lead_region, needs_lookup
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import ConfigurationError, MeteringError, OnError, logger
from langchain_stripe_meter.gateway.client import Gateway, check_key
from langchain_stripe_meter.ledger import DEFAULT_LEDGER, views
from langchain_stripe_meter.ledger.keeping import check_days
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.operations import Operations
from langchain_stripe_meter.prices import checked_meters
from langchain_stripe_meter.recording import OnMissingUsage, Recorder
from langchain_stripe_meter.reentry import inside
from langchain_stripe_meter.telling import telling
from langchain_stripe_meter.workers import in_thread, in_worker

if TYPE_CHECKING:
    from stripe import StripeClient

MAX_ROLL_UP = 3600
"""Seconds; invoices are finalised an hour after their period, so usage must not wait longer."""
START_SECONDS = 10
"""How long the start of a server waits for Stripe to say whether its meters are right."""
_USUAL_CUSTOMER = first_of(from_auth_user("stripe_customer_id"), from_metadata("stripe_customer_id"))
LONGEST = 10**7
"""Seconds: more than locks can wait for is not asked of them."""
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
        create_missing: Whether somebody whom Stripe does not know by e-mail, name or phone is made a customer, marked
            with the metadata ``created_by: langchain_stripe_meter``, instead of being held.
        on_unidentified: What becomes of a run that names nobody who pays: ``"skip"`` (it is recorded as skipped, and
            ``skips()`` shows it), ``"raise"`` (it is refused with ``UnidentifiedError`` before the model is called;
            with ``from_lead``, so is every run before its lead is captured), or the customer who pays for it, a
            ``cus_…`` id or a source. (A ``Tenant`` with a ``customer`` of its own names its default there.)
        concurrency: Requests to Stripe in flight at once; one customer and meter never has more than one.
        stripe_account: The connected account (``acct_…``) that everything is billed on; by default the key's own.
        tenant: From the trusted facts of a run to its ``Tenant``: the connected account, and the meters and customer
            source where they differ. None skips the run; where it fails, the run is held until you ``assign`` it. On an
            agent server only the authenticated user is trusted.
        roll_up: Make one event of what a customer uses of a meter within so many seconds, such as 60. For customers
            with more than a few runs a second: Stripe takes their events one after the other.
        webhook_secret: The signing secret of ``meter.webhooks`` (``whsec_…``); default ``$STRIPE_WEBHOOK_SECRET``.
        billing_day: The day of the month on which your billing periods begin, by UTC. ``on_error`` is told of usage
            that is undelivered when one closes.
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
        create_missing: bool = False,
        on_unidentified: Literal["skip", "raise"] | CustomerSource | str = "skip",
        roll_up: int | None = None,
        stripe_account: str | None = None,
        tenant: TenantSource | None = None,
        webhook_secret: str | None = None,
        billing_day: int = 1,
        prune_after_days: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.meters = checked_meters(meters)
        self._refuses = on_unidentified == "raise"
        self.customer = _with_default(_USUAL_CUSTOMER if customer is None else as_source(customer), on_unidentified)
        if on_missing_usage not in ("estimate", "hold", "ignore"):
            raise ConfigurationError(f"on_missing_usage={on_missing_usage!r}: use 'estimate', 'hold' or 'ignore'.")
        for name, flag in (
            ("deliver", deliver),
            ("bill_cache_hits", bill_cache_hits),
            ("create_missing", create_missing),
        ):
            if not isinstance(flag, bool):
                raise ConfigurationError(f"{name}={flag!r}: True or False.")
        if type(concurrency) is not int or concurrency < 1:
            raise ConfigurationError(f"concurrency={concurrency!r}: a whole number, at least 1.")
        if roll_up is not None and not (type(roll_up) is int and 1 <= roll_up <= MAX_ROLL_UP):
            raise ConfigurationError(f"roll_up={roll_up!r}: 1 to {MAX_ROLL_UP} seconds, or None for an event each.")
        if prune_after_days is not None:
            check_days(prune_after_days)
        if stripe_account is not None and tenant is not None:
            raise ConfigurationError("Pass stripe_account= or tenant=, not both: a tenant has an account of its own.")
        check_tenant(tenant)
        check_on_error(on_error)
        url = ledger or os.environ.get("STRIPE_METER_LEDGER") or DEFAULT_LEDGER
        self._ledger = Ledger(url, clock=clock, synchronous=synchronous)
        self._ledger.check_place()
        self._webhook_secret, self._on_error = check_webhook_secret(webhook_secret), on_error
        self._stripe_account = check_account(stripe_account or "")
        self._has_tenants = tenant is not None
        self._ages = Ages(self._ledger, on_error, billing_day)
        self._courier: Courier | None = None
        if deliver or stripe is not None:
            gateway = Gateway(check_key(stripe, otherwise=", or pass deliver=False to record only"))
            self._ledger.pin(is_test=gateway.is_test)
        if deliver:
            todo = chores(self._ledger, gateway, on_error=on_error, prune_after_days=prune_after_days)
            self._courier = Courier(
                self._ledger, gateway, concurrency=concurrency, on_error=on_error, roll_up=roll_up,
                create_missing=create_missing, chores=todo, watches=[self._ages.chore],
            )  # fmt: skip
        self.leads = Leads(
            self._ledger, account=self._stripe_account, has_tenants=tenant is not None,
            reads_leads=tenant is not None or needs_lookup(self.customer), region=lead_region(self.customer),
            claimed=self._claimed,
        )  # fmt: skip
        recorder = Recorder(
            self.meters, self.customer, self._ledger, self.leads, self._courier,
            on_missing_usage, bill_cache_hits, on_error, tenant or Tenant(self._stripe_account),
        )  # fmt: skip
        super().__init__(recorder)
        atexit.register(_close_at_exit, weakref.ref(self))

    def __repr__(self) -> str:
        names = ", ".join(meter.event_name for meter in self.meters)
        return f"{type(self).__name__}({names}; {self._ledger!r})"

    def __copy__(self) -> Self:
        return self  # a chain's copy is metered as the chain is

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"A {type(self).__name__} holds a ledger, threads and connections, and cannot be pickled. Make one in each "
            "process that needs it."
        )

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
        calls apply (``Tokens``, ``Cost``, ``Credits`` per call). ``id`` names the job: on a meter, it is never billed
        twice, and is refused for another customer, amount or kind. ``customer`` defaults to the handler's source, read
        against ``metadata`` and the run around this, as a run's would be: on an agent server, metadata is the client's
        word. ``at`` is when it happened, in Unix seconds (default now).

        Unlike a run, this raises: ``MeteringError`` if the input is bad, no meter counts calls, or the ledger cannot
        store it.
        """
        call = Call(None, model, provider)
        facts = self.facts_at_start(metadata)
        job, entries = self._recorder.job_of(usage, id=id, call=call, customer=customer, facts=facts, at=at)
        self._recorder.recorded(self.leads.record_job(entries, job))

    async def arecord_usage(self, usage: Mapping[str, Any], *, id: str, **options: Any) -> None:
        """As ``record_usage``, without blocking the event loop."""
        await in_worker(self.record_usage, usage, id=id, **options)

    def _claimed(self) -> None:
        """What had been skipped shall be billed after all."""
        if self._courier is not None:
            self._courier.wake()

    # -- seeing it

    def flush(self, timeout: float = 10.0) -> views.FlushReport:
        """Wait until nothing is pending, at most ``timeout`` seconds, and report. Never raises for Stripe's sake.

        With ``deliver=False`` nothing is sent here, so it reports at once. After a ``close``, it delivers again. Raises
        ``LedgerError`` where the ledger cannot be read; the message also says what went unrecorded.
        """
        timeout = _patience(timeout)
        deadline = time.monotonic() + timeout
        self._recorder.settle(self._sweep)
        self._recorder.elsewhere.wait(timeout)
        telling.wait(deadline - time.monotonic())
        with self._recorder.telling():
            self._ledger.wait_for_writes()
            if self._courier is not None:
                self._deliver(self._courier, deadline)
            return self._report()

    async def aflush(self, timeout: float = 10.0) -> views.FlushReport:
        """As ``flush``, without blocking the event loop."""
        return await in_thread(self.flush, timeout)

    def _deliver(self, courier: Courier, deadline: float) -> None:
        wake = courier.reopen
        while self._is_pending(deadline - time.monotonic()):
            wake()
            wake = courier.wake
            left = deadline - time.monotonic()
            if left <= 0 or courier.is_closed:  # another thread has closed it meanwhile
                return
            time.sleep(min(0.02, left))

    def _is_pending(self, patience: float) -> bool:
        """Whether anything is; also where the courier has been busy with the ledger for ``patience`` seconds."""
        busy, patience = self._ledger.deliver_lane().lock, max(patience, 0)
        with inside():
            try:  # before it is taken: Ctrl-C may come right after
                if not busy.acquire(timeout=patience):
                    return True
                with self._ledger.read() as connection:
                    return views.pending(connection) > 0
            finally:
                try:  # noqa: SIM105 - nothing that Ctrl-C could interrupt may come before this call
                    busy.release()
                except RuntimeError:  # it was not taken
                    pass

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
        """Counts and ages: the ledger as it stands, and this handler's open, abandoned and unrecorded runs.

        Raises ``LedgerError`` where the ledger cannot be read: its counts are unknown then, not zero. The message also
        says how many readings went unrecorded, and what they come to on each meter.
        """
        self._recorder.settle(self._sweep)
        with inside(), self._lock:
            open_runs, abandoned = len(self._runs), self._runs.abandoned
        with self._recorder.telling():
            return replace(
                views.status(self._ledger),
                open_runs=open_runs,
                abandoned=abandoned,
                unrecorded=self._recorder.unrecorded,
                unrecorded_amounts=dict(self._recorder.lost),
                alarms=self._ages.standing(),
            )

    def close(self, timeout: float = 10.0) -> views.FlushReport | None:
        """Deliver what is pending, at most ``timeout`` seconds, then let go of threads and connections. Calls that are
        still open are recorded as far as they have come.

        What was not delivered stays in the ledger, and is sent after the next start. So is what is recorded later,
        unless a ``flush``, another ``close`` or entering the handler again (``with``, ``lifespan``) delivers it before.
        Where the ledger cannot be read, this is logged and nothing is raised: what a script did matters more. There is
        no report then (None).
        """
        timeout = _patience(timeout)
        try:
            return self._close(timeout)
        except MeteringError as error:
            logger.error("stripe-meter: closing failed: %s", error)
            return None

    def _close(self, timeout: float) -> views.FlushReport:
        deadline = time.monotonic() + timeout
        with ExitStack() as stack:
            stack.callback(self._ledger.close)
            if self._courier is not None:
                stack.callback(self._courier.gateway.close)
            try:
                self._recorder.settle(self._cut_all)
                self.flush(timeout)
            finally:
                if self._courier is not None:
                    self._courier.close(deadline - time.monotonic())
            return self._report()

    @asynccontextmanager
    async def lifespan(self, app: object = None, *, timeout: float = 10.0, check: bool = True) -> AsyncIterator[None]:
        """The ``lifespan=`` of a Starlette or FastAPI application, and of an agent server's ``"http": {"app": …}``.

        SIGTERM ends a server without the interpreter's exit hooks: this delivers what is pending when it shuts down,
        at most ``timeout`` seconds, without blocking the loop; and what an earlier process left, when it starts. An
        application with a lifespan of its own writes ``async with meter.lifespan(app):`` around its ``yield``.

        It refuses to start on a ledger that cannot be opened (``LedgerError``), and on meters that cannot bill what
        they are sent (``ConfigurationError``), as ``check`` says; with ``deliver=False`` or ``tenant=``, meters are not
        looked at. Where Stripe does not answer within seconds, that is logged, and the application starts. With
        ``check=False`` it starts in any case: ``lifespan=functools.partial(meter.lifespan, check=False)``.
        """
        if check:
            await in_thread(self._check_ledger)
        if check and self._courier is not None and not self._has_tenants:
            await self._check_at_start()
        if self._courier is not None:
            self._courier.reopen()
        try:
            yield
        finally:
            await in_thread(self.close, timeout)

    async def _check_at_start(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS):
                await in_thread(self.check)
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001 - Stripe must not keep an application from starting
            why = error if isinstance(error, MeteringError) else type(error).__name__
            logger.warning("stripe-meter: the meters could not be checked at the start: %s", why)

    def __enter__(self) -> StripeMeterCallbackHandler:
        if self._courier is not None and self._courier.is_closed:  # entered again: a module's handler on AWS Lambda
            self._courier.reopen()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _patience(timeout: object) -> float:
    """Seconds to wait, at most ``LONGEST``, which is for ever."""
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or timeout != timeout:  # noqa: PLR0124 - NaN
        raise ConfigurationError(f"timeout={timeout!r}: a number of seconds.")
    return min(timeout, LONGEST)


def _with_default(customer: CustomerSource, otherwise: CustomerSource | str) -> CustomerSource:
    """``customer``, and where it names nobody, the default customer if there is one."""
    if isinstance(otherwise, str) and otherwise in ("skip", "raise"):
        return customer
    if isinstance(otherwise, str) and not otherwise.startswith("cus_"):
        raise ConfigurationError("on_unidentified= takes 'skip', 'raise', a 'cus_…' id or a source such as static(…).")
    return first_of(customer, otherwise)


def _close_at_exit(reference: weakref.ref[StripeMeterCallbackHandler]) -> None:
    handler = reference()
    courier = handler._courier if handler is not None else None
    if handler is not None and courier is not None and courier.is_running:
        handler.close(EXIT_SECONDS)
