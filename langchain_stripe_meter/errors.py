"""Every error this package raises, grouped by who must act.

    MeteringError
    ├── ConfigurationError      the caller: an argument, a setting, an environment variable
    │   └── InvalidValueError   the caller: a value that Stripe could never accept (also a ValueError)
    ├── LedgerError             the operator: the database cannot be used as it stands
    │   ├── ForeignLedgerError      it is not a ledger, or it belongs to somebody else
    │   ├── NewerLedgerError        it was written by a newer version of this package
    │   └── UnrecordedError         usage could not be stored; its ``readings`` say how much, when and whose
    ├── UnidentifiedError       the caller: a run names nobody who pays, and on_unidentified="raise" refuses it
    ├── AgeAlarm                the operator: usage grows old before Stripe has it
    ├── UsageError              a person: what a provider reported cannot be billed as it is, and is held
    ├── SpendLimitError         the customer: a limit is used up (the only one that is raised into a chain)
    ├── IllegalMoveError        a state change that the table in core/states.py does not have
    └── StripeError             what Stripe answered, when a person asked a question of it

Only what was asked for is ever raised into a chain, ``UnidentifiedError`` and ``SpendLimitError``: the handler turns
what goes wrong inside a run into a counter, one log line and a call of ``on_error``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

logger = logging.getLogger("langchain_stripe_meter")


class MeteringError(Exception):
    """The root: ``except MeteringError`` catches everything this package raises on purpose."""


class ConfigurationError(MeteringError):
    """An argument, setting or environment variable cannot be used; the message names it."""


class InvalidValueError(ConfigurationError, ValueError):
    """A value breaks one of Stripe's limits, so it is refused before anything is stored or sent."""


class LedgerError(MeteringError):
    """The ledger's database cannot be read or written as it stands."""


class ForeignLedgerError(LedgerError):
    """The database is not a ledger of this package, or is pinned to another Stripe account."""


class NewerLedgerError(LedgerError):
    """The database was written by a newer version of this package."""


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """What a run should have been billed on one meter, and no ledger has: ``value`` in the meter's unit, or None where
    nobody knew it; ``at`` in Unix seconds.

    ``customer`` is a ``cus_…`` id, or how the payer was named (``email:…``); it is left out of the repr. ``reason`` is
    why it would have been held.
    """

    identifier: str
    event_name: str
    value: Decimal | None
    at: int
    stripe_account: str = ""
    customer: str | None = field(default=None, repr=False)
    dimensions: Mapping[str, str] = field(default_factory=dict, hash=False)
    estimated: bool = False
    reason: str | None = None


class UnrecordedError(LedgerError):
    """Usage could not be stored; the message says how much on each meter, ``readings`` when and whose, and
    ``__cause__`` is why. ``meter.record_again(error)`` stores it once that is mended. ``name`` tells the handler that
    it is one of its own, and which."""

    def __init__(self, message: str, readings: Sequence[Unrecorded] = (), name: str = "") -> None:
        super().__init__(message, readings, name)  # as they are, so that it can be pickled
        self.readings = tuple(readings)
        self.name = name

    def __str__(self) -> str:
        return str(self.args[0])


class UnidentifiedError(MeteringError):
    """A run names nobody who pays; it was refused before the model was called. The message says what was missing."""


class UsageError(MeteringError):
    """What a provider reported cannot be billed as it is: it contradicts itself (the message names both numbers), or a
    meter cannot count it, for it has no credits or no price for the model. ``on_error`` is told of what is held for
    that, once for each reason."""


class SpendLimitError(MeteringError):
    """A customer has used up a limit, so the model was not called.

    ``event_name`` is the meter's, ``limit`` and ``used`` are in its unit, ``resets_at`` (UTC) is when the next period
    begins. All are None where nobody could be identified. The message names nobody.
    """

    def __init__(
        self,
        message: str,
        event_name: str | None = None,
        limit: Decimal | None = None,
        used: Decimal | None = None,
        resets_at: datetime | None = None,
    ) -> None:
        super().__init__(message, event_name, limit, used, resets_at)  # as they are, so that it can be pickled
        self.event_name = event_name
        self.limit = limit
        self.used = used
        self.resets_at = resets_at

    def __str__(self) -> str:
        return str(self.args[0])


class IllegalMoveError(MeteringError):
    """The state table has no such move."""


class StripeError(MeteringError):
    """Stripe refused a question that a person asked (listing meters, looking up a customer)."""


def place_of(error: BaseException) -> str:
    """Where an error was raised, ``file:line``: what may be logged of a bug, whose text may quote a person."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


class AgeAlarm(MeteringError):  # noqa: N818 - it is no error that something raised, but what ``on_error`` is told
    """Usage grows old, or its billing period closes, before Stripe has it.

    ``threshold`` is ``"7 days"``, ``"21 days"``, ``"30 days"``, ``"34 days"``, ``"closing"`` or
    ``"closed"``; ``counts`` maps meters to how many readings and events there are.
    """

    def __init__(self, message: str, threshold: str = "", counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.threshold = threshold
        self.counts = dict(counts or {})


OnError = Callable[[MeteringError], None]
