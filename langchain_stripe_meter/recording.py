"""From what ended to the ledger: readings for each meter, who pays, one durable insert.

Faults are counted, logged and told, never raised into a chain.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal
from uuid import uuid4

from langchain_stripe_meter.core.customers import CustomerSource, Facts, Skip, as_source
from langchain_stripe_meter.core.events import check_timestamp
from langchain_stripe_meter.core.meters import Call, Meter
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.runs import Run
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.tenants import (
    NO_TENANT,
    Tenant,
    TenantSource,
    Untold,
    lead_fields,
    lead_session,
    needs_lookup,
)
from langchain_stripe_meter.core.values import EXACT, counted
from langchain_stripe_meter.counting import (
    Decide,
    Ending,
    Use,
    amounts_of,
    counting_calls,
    estimated,
    estimates_of,
    following,
    held_news,
    is_known,
    key_of,
    lost_of,
    make_entries,
    of_nobody,
    readings_of,
    said_of,
    same_ids,
    usage_of_job,
)  # fmt: skip
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import (
    ConfigurationError,
    LedgerError,
    MeteringError,
    OnError,
    UnrecordedError,
    logger,
    place_of,
)
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.ledger.jobs import Job, job_number
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.observed import Observed
from langchain_stripe_meter.prices import checked_meters
from langchain_stripe_meter.reentry import inside, soon, within
from langchain_stripe_meter.telling import hand_on, tell
from langchain_stripe_meter.workers import MOST, Workers

_NEXT_STEP = "Keep this error and call meter.record_again(error) once the ledger is mended."
_WITHOUT_ON_ERROR = "With on_error=, meter.record_again(error) could store it later."
_CANCELLED = "the message was cancelled before it was answered"
_UNSEEN = "whoever has its estimate could not be looked up"
_NEXT_STEP_OF_TENANT = "say whose it is with assign(held, 'cus_…', account='acct_…')."
_NEXT_STEP_OF_PAYER = "say who pays with assign(held, 'cus_…')."
_NO_PAYER = "who pays could not be looked up: "

OnMissingUsage = Literal["estimate", "hold", "ignore"]


@dataclass(eq=False)
class Recorder:
    """Records endings. ``skipped`` counts readings with nobody to bill, ``unrecorded`` what could not be stored, and
    ``lost`` how much of that somebody was to pay, by meter."""

    meters: tuple[Meter, ...]
    customer: CustomerSource
    ledger: Ledger
    leads: Leads
    courier: Courier | None
    on_missing_usage: OnMissingUsage
    bill_cache_hits: bool
    on_error: OnError | None
    tenant: Tenant | TenantSource
    skipped: int = 0
    unrecorded: int = 0
    lost: dict[str, Decimal] = field(default_factory=dict)
    _name: str = field(init=False, default_factory=lambda: uuid4().hex)
    _failures: int = field(init=False, default=0)
    _mended: set[str] = field(init=False, default_factory=set)
    _untold_of: dict[str, str] = field(init=False, default_factory=dict)
    elsewhere: Workers = field(init=False, default_factory=lambda: Workers(MOST, "stripe-meter-settling"))
    _held_told: set[object] = field(init=False, default_factory=set)
    _lock: threading.Lock = field(init=False)
    needs_lookup: bool = field(init=False)
    counts_messages: bool = field(init=False)
    """Whether anything but calls may be counted: each tenant may have meters of its own."""

    def __post_init__(self) -> None:
        only = self.tenant if isinstance(self.tenant, Tenant) else None
        meters = None if only is None else self.meters if only.meters is None else only.meters
        self.counts_messages = meters is None or any(meter.per == "message" for meter in meters)
        self.needs_lookup = needs_lookup(self.customer) or only is None
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A lock that another thread held at the fork would stay locked in the child."""
        self._lock = threading.Lock()

    def settle(self, decide: Callable[[], Sequence[Ending]]) -> None:
        """Record what ``decide`` says has ended; returns when it is durable, and never raises.

        Where garbage collection interrupted our own code on this thread, that is done first, and this right after.
        """
        soon(self.settle_inside, decide)

    def settle_inside(self, decide: Decide, /, *args: Any, **kwargs: Any) -> None:
        """As ``settle``, for who is inside."""
        entries: Sequence[Entry] = []
        try:
            entries = self._entries(decide(*args, **kwargs))
            if entries:
                if self.needs_lookup:
                    entries = self.leads.record(entries)
                else:
                    self.ledger.record(entries)
        except Exception as error:  # noqa: BLE001 - a chain must never break over its metering
            self._failed(error, entries)
        else:
            self.recorded(entries)

    async def asettle(self, decide: Decide, /, *args: Any, **kwargs: Any) -> None:
        """As ``settle``, without blocking the event loop."""
        entries: list[Entry] = []
        try:
            endings, entries = within(self._if_fast, decide, *args, **kwargs)
            if endings:
                await self._settle_elsewhere(endings)
                return
            if entries:
                await self.ledger.arecord(entries, partial(self._failed, entries=entries))
        except asyncio.CancelledError:  # the ledger stores it all the same, or tells that it could not
            within(self.recorded, entries)
            raise
        except Exception as error:  # noqa: BLE001 - a chain must never break over its metering
            within(self._failed, error, entries)
        else:
            within(self.recorded, entries)

    def _if_fast(self, decide: Decide, /, *args: Any, **kwargs: Any) -> tuple[Sequence[Ending], list[Entry]]:
        """The entries of what has ended; or what has, where an event loop cannot wait for them."""
        endings = decide(*args, **kwargs)
        return (endings, []) if endings and self._is_slow(endings) else ((), self._entries(endings))

    async def _settle_elsewhere(self, endings: Sequence[Ending]) -> None:
        try:
            settling = within(self.elsewhere.submit, self.settle, lambda: endings)
        except RuntimeError:  # the interpreter is shutting down and starts no threads: better to block than to lose
            self.settle(lambda: endings)
            return
        await asyncio.shield(asyncio.wrap_future(settling))  # a cancelled task must not take what it owes with it

    def _is_slow(self, endings: Sequence[Ending]) -> bool:
        """Whether deciding needs the database or a tokenizer, which must not run on an event loop."""
        estimates = self.on_missing_usage == "estimate"
        for one in endings:
            if one.is_rest or (estimates and one.observed is not None and not is_known(one.observed)):
                return True
        return self.needs_lookup

    def recorded(self, entries: Sequence[Entry]) -> None:
        """``entries`` are durable: count the skipped, and tell the courier of the others."""
        states = [entry.state for entry in entries]
        if skipped := states.count(ReadingState.SKIPPED):
            with self._lock:
                self.skipped += skipped
        if ReadingState.HELD in states:
            for news in held_news(entries, self._held_told):
                tell(self.on_error, news)
        if self.ledger.others:
            for told in same_ids(self.ledger.others):
                tell(self.on_error, told)
        if self.courier is None:
            self.ledger.database.tell_moved(self._tell)  # a courier tells what it finds there
        elif skipped < len(entries):
            self.courier.wake()

    def _failed(self, error: Exception, entries: Sequence[Entry]) -> None:
        lost = lost_of(entries)
        with self._lock:
            self.unrecorded += max(len(entries), 1)
            self._failures += 1
            name = f"{self._name}:{self._failures}"
            for event_name, amount in amounts_of(lost).items():
                self.lost[event_name] = EXACT.add(self.lost.get(event_name, Decimal(0)), amount)
        if isinstance(error, MeteringError):
            known, said = error, str(error)
        else:  # a bug of ours: its kind and place, but not its text, which may quote a prompt or a customer
            known = LedgerError(f"A run could not be recorded: {type(error).__name__}. Please report this.")
            said = f"{type(error).__name__} at {place_of(error)}"
        if lost:
            amounts = said_of(amounts_of(lost))
            said = f"{said} Not billed: {amounts}. {_WITHOUT_ON_ERROR if self.on_error is None else _NEXT_STEP}"
            why, known = known, UnrecordedError(f"{known} Not billed: {amounts}. {_NEXT_STEP}", lost, name)
            known.__cause__ = why
        logger.error("stripe-meter: a run could not be recorded: %s", said)
        self._tell(known)

    def mended(self, error: UnrecordedError) -> None:
        """What ``error`` tells of is stored now, so this recorder, if the error is its own, counts it no more.

        The same error counts once, also as a copy: its ``name`` was pickled with it.
        """
        with inside(), self._lock:
            if not error.name.startswith(f"{self._name}:") or error.name in self._mended:
                return
            self._mended.add(error.name)
            self.unrecorded -= len(error.readings)
            self._take_off(amounts_of(error.readings))

    def _take_off(self, stored: Mapping[str, Decimal]) -> None:
        for event_name, amount in stored.items():
            left = EXACT.subtract(self.lost.pop(event_name, Decimal(0)), amount)
            if left:
                self.lost[event_name] = left

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A ledger that cannot be read does not hide what could not be recorded: its ``LedgerError`` says that, too."""
        try:
            yield
        except LedgerError as error:
            if not self.unrecorded:
                raise
            amounts = f": {said_of(self.lost)}" if self.lost else ""
            readings = counted(self.unrecorded, "reading")
            raise type(error)(f"{error} This handler left {readings} unrecorded{amounts}.") from error

    def _tell(self, error: MeteringError) -> None:
        hand_on(self.on_error, error)

    def _entries(self, endings: Sequence[Ending]) -> list[Entry]:
        entries: list[Entry] = []
        for ending in endings:
            run, observed, call = ending.run, ending.observed, ending.call
            try:
                if observed is not None and call is not None and (self.bill_cache_hits or not observed.cached):
                    if not is_known(observed):
                        call = self._complete(call, run, observed)
                    if call is not None:
                        entries += self._of_call(ending, call)
                if ending.message is not None:
                    (call, facts), top = ending.message, run.top
                    made = self._of_use(Use(key_of(top), top.ended or top.started, facts, "message", call))
                    entries += [of_nobody(one, _CANCELLED) for one in made] if ending.unanswered else made
            except Exception as error:  # noqa: BLE001 - what else ended must not go with it
                self._failed(error, [])
        return entries

    def _of_call(self, ending: Ending, call: Call) -> list[Entry]:
        run, key = ending.run, key_of(ending.run)
        at, recorded = run.ended or run.started, run.billed if ending.is_rest else None
        made = self._of_use(Use(key if recorded is None else f"{key}-rest", at, run.facts, "call", call, recorded))
        entries = made if recorded is None else [self._like_its_estimate(run, one) for one in made]
        run.billed, run.billed_as = call, made
        return entries

    def _like_its_estimate(self, run: Run, rest: Entry) -> Entry:
        """What a call came to beyond its estimate is for whoever has that by now, a person or nobody included."""
        try:
            estimate = next(filter(None, map(self.ledger.reading, estimates_of(run, rest))), None)
        except LedgerError:
            return replace(of_nobody(rest, _UNSEEN), state=ReadingState.HELD)
        if estimate is None:
            return rest
        place = self.place_of_lead(run.facts) if estimate["session"] else None
        return following(rest, estimate, session=place and place[1])

    def _complete(self, call: Call, run: Run, observed: Observed) -> Call | None:
        """Apply ``on_missing_usage`` to a call whose usage nobody reported in full."""
        if self.on_missing_usage == "ignore":
            return call if observed.usage is not None else None
        if self.on_missing_usage == "hold":
            return replace(call, usage=None)
        return estimated(call, run, observed)

    def _of_use(
        self, use: Use, tenant: Tenant | Skip | None = None, source: CustomerSource | None = None, raises: bool = False
    ) -> list[Entry]:
        """Entries for what was used; ``source`` says who pays for this one alone. Where a lead cannot be read, or what
        the application calls a user, they are held for a person, or it ``raises``."""
        tenant = tenant or self.tenant_of(use.facts)
        if isinstance(tenant, Skip):
            return make_entries(use, tenant, readings_of(self.meters, use))
        readings = readings_of(self.meters if tenant.meters is None else tenant.meters, use)
        if not readings:
            return []
        payer, facts = source or tenant.customer or self.customer, use.facts
        if self.needs_lookup or source is not None:
            facts = self._with_leads(facts, tenant.account, payer)
        try:
            who = payer.identify(facts)
            if not raises:
                self._untold_of.pop(_NO_PAYER, None)
        except Exception as error:  # a chain must never break over its metering
            if raises:
                raise
            kind = LedgerError if isinstance(error, LedgerError) else ConfigurationError
            who = self._untold(_NO_PAYER, type(error).__name__, _NEXT_STEP_OF_PAYER, kind)
        entries = make_entries(use, who, readings, tenant.account)
        if self.needs_lookup and source is None and type(who) is Skip:
            session, reads = lead_session(payer, facts), lead_fields(payer)
            return [replace(entry, session=session, reads=reads) for entry in entries]
        return entries

    def _with_leads(self, facts: Facts, account: str, payer: CustomerSource) -> Facts:
        return replace(facts, lead=partial(self.leads.find, account=account)) if needs_lookup(payer) else facts

    def tenant_of(self, facts: Facts) -> Tenant | Skip:
        """Whose business a run is, by the application's own function; what it fails over is held for a person."""
        if isinstance(self.tenant, Tenant):
            return self.tenant
        try:
            tenant: object = self.tenant(facts.trusted())
            if isinstance(tenant, Tenant):
                self._untold_of.pop(NO_TENANT, None)
                return tenant if tenant.meters is None else replace(tenant, meters=checked_meters(tenant.meters))
        except Exception as error:  # noqa: BLE001 - a chain must never break over its metering
            return self._untold(NO_TENANT, f"failed: {type(error).__name__}", _NEXT_STEP_OF_TENANT)
        return Skip("no tenant") if tenant is None else self._untold(NO_TENANT, "gave no Tenant", _NEXT_STEP_OF_TENANT)

    def _untold(self, what: str, how: str, next_step: str, kind: type[MeteringError] = ConfigurationError) -> Untold:
        """Told once for as long as it goes on."""
        why = f"{what}{how}"
        self._held_told.add(why)
        if self._untold_of.get(what) != how:
            self._untold_of[what] = how
            said = f"{why}. Its usage is held: {next_step}"
            logger.error("stripe-meter: %s", said)
            self._tell(kind(said))
        return Untold(why)

    def payer(self, facts: Facts) -> tuple[str, Reference | Skip]:
        """On which account a run is billed, and who pays or why nobody does; it may ask the ledger for a lead."""
        tenant = self.tenant_of(facts)
        if isinstance(tenant, Skip):
            return "", tenant
        payer = tenant.customer or self.customer
        return tenant.account, payer.identify(self._with_leads(facts, tenant.account, payer))

    def place_of_lead(self, facts: Facts) -> tuple[str, str] | None:
        """The account and the session whose lead would pay for a run; None where there is none."""
        tenant = self.tenant_of(facts)
        if isinstance(tenant, Skip):
            return None
        session = lead_session(tenant.customer or self.customer, facts)
        return None if session is None else (tenant.account, session)

    def job_of(
        self,
        usage: Mapping[str, Any],
        *,
        id: str,
        call: Call,
        customer: CustomerSource | str | None,
        facts: Facts,
        at: int | None,
    ) -> tuple[Job, list[Entry]]:
        """Usage that no run reported, and its entries; ``facts`` are those of where it is told. Raises where the input
        is bad."""
        used, now = usage_of_job(usage, id), self.ledger.now()
        when = now if at is None else check_timestamp(at, now)
        use = Use(id, when, facts, "call", replace(call, usage=used))
        tenant = self.tenant_of(facts)
        if isinstance(tenant, Untold):  # held, it would be billed twice once the job is told again
            raise ConfigurationError(f"{tenant.reason}. Nothing is recorded: record it again, under the same id.")
        entries = self._of_use(use, tenant, None if customer is None else as_source(customer), raises=True)
        account, own = ("", None) if isinstance(tenant, Skip) else (tenant.account, tenant.meters)
        meters = counting_calls(self.meters if own is None else own)
        names = frozenset(meter.event_name for meter in meters)
        job = Job(id, account, names, is_named=customer is not None)
        return job, [replace(entry, job=job_number(id, account)) for entry in entries]
