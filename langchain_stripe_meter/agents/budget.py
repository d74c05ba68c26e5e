"""How much a customer may use, and the gate that stops what goes beyond, before the model is called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any, Literal
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config

from langchain_stripe_meter.core.customers import Facts, Skip
from langchain_stripe_meter.core.events import is_async, number_text
from langchain_stripe_meter.core.periods import Per, Period
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.tenants import account_of
from langchain_stripe_meter.core.values import EXACT
from langchain_stripe_meter.errors import (
    ConfigurationError,
    LedgerError,
    MeteringError,
    SpendLimitError,
    logger,
    place_of,
)
from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.ledger.counters import Counters
from langchain_stripe_meter.workers import in_worker

Policy = Literal["allow", "stop"]
Amount = int | Decimal


@dataclass(frozen=True, slots=True)
class Spender:
    """Whose limit is asked for: how they are identified, the facts of their run (empty outside of one), and the
    connected account that they pay on (``""`` for the key's own)."""

    reference: Reference
    facts: Facts
    account: str = ""


LimitOf = Callable[[Spender], Amount | None]
"""Says how much somebody may use, such as their plan allows; None for no limit. It runs before every model call."""


@dataclass(frozen=True)
class SpendLimit:
    """At most ``amount`` of the meter ``event_name``, in its unit, in each ``per``.

    ``amount`` is a number, or a callable that says how much a ``Spender`` may use (None: no limit). ``per`` is
    ``"day"``, ``"week"`` (from Monday), ``"month"``, each in UTC, ``"ever"``, or a ``timedelta``: spans of that length
    since the Unix epoch, so ``timedelta(hours=1)`` are the full hours. Months begin on ``billing_day``.
    """

    event_name: str
    amount: Amount | LimitOf
    per: Per = "month"
    billing_day: int = 1

    def __post_init__(self) -> None:
        self.period  # noqa: B018 - refuses what is none
        if not callable(self.amount):
            check_amount(self.amount)
        elif is_async(self.amount):
            raise ConfigurationError(f"The amount of the limit on {self.event_name!r} is async; use a plain function.")

    @property
    def period(self) -> Period:
        """What ``per`` means, and for how long a period counts on in the next one (see ``StripeCredit``)."""
        after = getattr(self.amount, "settled_after", 0)
        return Period(self.per, self.billing_day, after if type(after) is int else 0)

    def amount_for(self, spender: Spender) -> Decimal | None:
        """How much ``spender`` may use; None for no limit.

        Raises ``ConfigurationError`` where ``amount`` fails, or gives what is no amount.
        """
        if not callable(self.amount):
            return Decimal(self.amount)
        what = f"The limit on {self.event_name!r} cannot be worked out"
        try:
            amount = self.amount(spender)
        except Exception as error:  # noqa: BLE001 - not handed on: it may quote whom the limit is for
            failed = f"{what}: its amount failed with {type(error).__name__} at {place_of(error)}."
            raise ConfigurationError(failed) from None
        try:
            return None if amount is None else check_amount(amount)
        except ConfigurationError as error:
            raise ConfigurationError(f"{what}. {error}") from None


def check_amount(amount: object) -> Decimal:
    """An amount of a limit, exactly as it was given."""
    if isinstance(amount, int | Decimal) and not isinstance(amount, bool):
        exact = Decimal(amount)
        if exact.is_finite() and exact >= 0:
            return exact
    shown = repr(amount) if isinstance(amount, int | float | Decimal) else type(amount).__name__
    raise ConfigurationError(f"A limit is an int or a Decimal of at least 0, or None for no limit; not {shown}.")


@dataclass(frozen=True, slots=True)
class Allowance:
    """How one limit stands for one customer. ``limit`` is None where there is none; ``resets_at`` is in UTC, and None
    where no period follows."""

    event_name: str
    per: Per
    limit: Decimal | None
    used: Decimal
    resets_at: datetime | None

    @property
    def remaining(self) -> Decimal | None:
        """What may still be used, never below 0; None for no limit."""
        return None if self.limit is None else max(EXACT.subtract(self.limit, self.used), Decimal(0))

    @property
    def is_used_up(self) -> bool:
        """Whether nothing remains."""
        return self.limit is not None and self.used >= self.limit


Customer = str | Reference | Facts | None


class Budget:
    """What each customer of a handler may use, told from the handler's ledger and never from Stripe.

    Args:
        meter: The handler that records the usage; its ``customer`` says whose limit it is, as it says who pays.
        *limits: At least one, each on one of the handler's meters. All apply.
        unidentified: What to do with runs of nobody: ``"allow"`` them (the handler skips them), or ``"stop"``.
        on_failure: What to do when the ledger cannot be read (``LedgerError``) or a limit's own callable fails
            (``ConfigurationError``): ``"allow"`` the call, log it and tell the handler's ``on_error`` (the other limits
            hold all the same); or ``"stop"`` it by raising that error.

    Usage counts as soon as its run has ended, in whichever process shares the ledger. What a call will use is not known
    before it ends, so calls that have begun when the limit is reached go beyond it: by what was in flight, no more. Of
    several limits that are used up, ``SpendLimitError`` tells of the one that begins anew last.

    A limit holds for a lead's e-mail, name or phone also before Stripe's customer is known. The first check of a
    process reads the readings of the longest period (a second or more, where there are hundreds of thousands);
    ``refresh`` does so when a server starts. So does the next check, every ten seconds at most, after a person has
    changed what was recorded, or a captured lead has claimed what was skipped.
    """

    def __init__(
        self,
        meter: StripeMeterCallbackHandler,
        *limits: SpendLimit,
        unidentified: Policy = "allow",
        on_failure: Policy = "allow",
    ) -> None:
        for name, policy in (("unidentified", unidentified), ("on_failure", on_failure)):
            if policy not in ("allow", "stop"):
                raise ConfigurationError(f"{name}={policy!r}: use 'allow' or 'stop'.")
        check_meter(meter, "Budget(meter, *limits)")
        _check_limits(meter, limits)
        self.limits = limits
        self._meter = meter
        self._stops_nobody = unidentified == "stop"
        self._stops_on_failure = on_failure == "stop"
        self._counters = Counters(meter._ledger, [limit.period for limit in limits])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.limits))})"

    def allowances(self, customer: Customer = None, *, account: str | None = None) -> list[Allowance]:
        """How each limit stands for ``customer``: a ``cus_…`` id, a ``Reference``, or the facts of a run.

        Without one it is whoever pays for the present run (inside a tool or a node). Empty where that is nobody.
        ``account`` is the connected account of an id or a ``Reference``: by default the handler's ``stripe_account``,
        and with ``tenant=`` it must be said (``""`` for the key's own).
        Raises ``LedgerError`` where the ledger cannot be read, ``ConfigurationError`` where a limit's callable fails.
        It reads the database: on an event loop, call it with ``asyncio.to_thread``.
        """
        spender, now = self._spender(customer, account), self._meter._ledger.now()
        return [] if spender is None else [_allowance(one, spender, used, now) for one, used in self._used(spender)]

    def remaining(
        self, customer: Customer = None, event_name: str | None = None, *, account: str | None = None
    ) -> Decimal | None:
        """What ``customer`` may still use of ``event_name`` (needed where the limits are on several meters): the least
        that any limit leaves; None where there is no limit, or nobody to limit. Otherwise as ``allowances``."""
        names = {limit.event_name for limit in self.limits}
        if event_name is None and len(names) > 1:
            raise ConfigurationError(f"The limits are on several meters; say which: {', '.join(sorted(names))}.")
        if event_name is not None and event_name not in names:
            raise ConfigurationError(f"There is no limit on {event_name!r}, only on {', '.join(sorted(names))}.")
        wanted = event_name or names.pop()
        left = [one.remaining for one in self.allowances(customer, account=account) if one.event_name == wanted]
        return min((amount for amount in left if amount is not None), default=None)

    def check(self, customer: Customer = None, *, account: str | None = None) -> None:
        """Raise ``SpendLimitError`` where ``customer`` (of ``account``, as for ``allowances``) has used up a limit."""
        try:
            spender = self._spender(customer, account)
            used = [] if spender is None else self._used(spender)
        except LedgerError as error:
            self._failed(error)
            return
        if spender is None:
            if self._stops_nobody:
                raise SpendLimitError("Nobody could be identified whose limit it is, so the model is not called.")
            return
        stands = [self._allowance(limit, spender, spent) for limit, spent in used]
        used_up = [one for one in stands if one is not None and one.is_used_up]
        if used_up:
            raise _used_up(max(used_up, key=_last))

    def _allowance(self, limit: SpendLimit, spender: Spender, used: Decimal) -> Allowance | None:
        try:
            return _allowance(limit, spender, used, self._meter._ledger.now())
        except ConfigurationError as error:  # the other limits hold all the same
            self._failed(error)
            return None

    def _failed(self, error: MeteringError) -> None:
        if self._stops_on_failure:
            raise error
        logger.warning("stripe-meter: a limit could not be checked, the call goes on: %s", error)
        self._meter._recorder._tell(error)

    def _used(self, spender: Spender) -> list[tuple[SpendLimit, Decimal]]:
        wanted = [(limit.event_name, limit.period) for limit in self.limits]
        used = self._counters.used(spender.reference, wanted, spender.account)
        return list(zip(self.limits, used, strict=True))

    async def acheck(self, customer: Customer = None, *, account: str | None = None) -> None:
        """As ``check``, without blocking the event loop."""
        await in_worker(self.check, customer, account=account)

    def refresh(self) -> None:
        """Read what the first check would, such as when a server starts. Raises ``LedgerError``."""
        self._counters.used(Reference("id", "cus_nobody"), ())

    def _spender(self, customer: Customer, account: str | None) -> Spender | None:
        if isinstance(customer, str | Reference):
            reference = Reference("id", customer) if isinstance(customer, str) else customer
            return Spender(reference, Facts(), customers_account(self._meter, account))
        if customer is not None and not isinstance(customer, Facts):
            raise ConfigurationError(
                f"A customer is a 'cus_…' id, a Reference, or the Facts of a run; not {type(customer).__name__}."
            )
        if account is not None:
            raise ConfigurationError("account= goes with a 'cus_…' id or a Reference: a run has the account it bills.")
        facts = customer or self._meter.facts_at_start((var_child_runnable_config.get() or {}).get("metadata"))
        try:
            account, who = self._meter._recorder.payer(facts)
        except MeteringError:
            raise
        except Exception as error:  # noqa: BLE001 - as in amount_for()
            failed = f"Whose limit it is could not be looked up: {type(error).__name__} at {place_of(error)}."
            raise LedgerError(failed) from None
        return None if isinstance(who, Skip) else Spender(who, facts, account)


def check_meter(meter: object, what: str) -> None:
    """Refuse what is no handler, for ``what`` takes one first."""
    if not isinstance(meter, StripeMeterCallbackHandler):
        raise ConfigurationError(f"{what} takes a StripeMeterCallbackHandler first, not {type(meter).__name__}.")


def customers_account(meter: StripeMeterCallbackHandler, account: str | None) -> str:
    """On which connected account somebody named by id or ``Reference`` pays."""
    return account_of(account, meter._stripe_account, has_tenants=meter._has_tenants, what="customer")


def check_budget(budget: object, what: str) -> None:
    """Refuse what is no budget, for ``what`` takes one."""
    if not isinstance(budget, Budget):
        raise ConfigurationError(
            f"{what} takes a Budget, not {type(budget).__name__}: Budget(meter, SpendLimit('ai_tokens', 100_000))."
        )


def _check_limits(meter: StripeMeterCallbackHandler, limits: tuple[SpendLimit, ...]) -> None:
    if not limits:
        raise ConfigurationError("Budget needs at least one limit, such as SpendLimit('ai_tokens', 100_000).")
    wrong = next((one for one in limits if not isinstance(one, SpendLimit)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"Budget(meter, *limits) takes each limit as a SpendLimit, not {type(wrong).__name__}."
        )
    known = [one.event_name for one in meter.meters]
    unknown = next((limit.event_name for limit in limits if limit.event_name not in known), None)
    if unknown is not None:
        raise ConfigurationError(f"The handler has no meter {unknown!r} to limit; it has {', '.join(known)}.")


def _allowance(limit: SpendLimit, spender: Spender, used: Decimal, now: int) -> Allowance:
    at = limit.period.resets_at(now)
    resets_at = None if at is None else datetime.fromtimestamp(at, UTC)
    return Allowance(limit.event_name, limit.per, limit.amount_for(spender), used, resets_at)


def _last(one: Allowance) -> datetime:
    """When an allowance begins anew, to find the last; never comes after all."""
    return one.resets_at or datetime.max.replace(tzinfo=UTC)


def _used_up(one: Allowance) -> SpendLimitError:
    until = "" if one.resets_at is None else f"; it begins anew at {one.resets_at:%Y-%m-%d %H:%M:%S} UTC"
    limit, used = number_text(one.limit or 0), number_text(one.used)
    said = f"The limit of {limit} {one.event_name} is used up ({used} were used){until}."
    return SpendLimitError(said, one.event_name, one.limit, one.used, one.resets_at)


class _Gate:
    """A start event that checks the budget first. A coroutine function for whoever can await one, so that no event loop
    waits for the database, and a plain function for everybody else.

    Whether a loop runs in this thread does not tell: a model may be called synchronously inside one, as in a notebook,
    and there LangChain would run a coroutine elsewhere and swallow what it raises.
    """

    def __get__(self, handler: SpendLimitCallback | None, owner: type | None = None) -> Any:
        if handler is None:
            return self
        if sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE:
            return handler._acheck
        return handler._check


class SpendLimitCallback(BaseCallbackHandler):
    """Stops model calls of customers whose budget is used up, in anything that takes callbacks.

    Raises ``SpendLimitError`` into the run before its model is called. Put it last:
    ``config={"callbacks": [meter, SpendLimitCallback(budget)]}``. In async runs LangChain drops the coroutines of the
    handlers after one that raises, and Python then warns of a coroutine that was never awaited. The meter learns that
    the call was stopped, and bills nothing.
    """

    raise_error = True
    run_inline = True
    ignore_agent = True
    ignore_chain = True
    ignore_custom_event = True
    ignore_retriever = True
    ignore_retry = True

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        check_budget(budget, "SpendLimitCallback")
        self._budget, self._meter = budget, budget._meter

    on_chat_model_start = _Gate()
    on_llm_start = _Gate()

    def _check(
        self,
        *args: Any,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            self._budget.check(self._meter.facts_at_start(metadata, parent_run_id))
        except BaseException as error:  # LangChain does not tell the meter that a call which it was told of is not made
            self._meter._recorder.settle(partial(self._meter._call_failed, error, run_id=run_id))
            raise

    async def _acheck(
        self,
        *args: Any,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            await self._budget.acheck(self._meter.facts_at_start(metadata, parent_run_id))
        except BaseException as error:  # a task that is cancelled here makes no call either
            await self._meter._recorder.asettle(partial(self._meter._call_failed, error, run_id=run_id))
            raise
