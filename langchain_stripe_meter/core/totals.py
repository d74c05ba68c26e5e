"""The ledger's totals against Stripe's: what agrees, what is still on its way, what differs, and what Stripe reports to
have taken and refused later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from langchain_stripe_meter.core.doubts import MINUTE, SUMS_LAG
from langchain_stripe_meter.core.events import MAX_DIGITS
from langchain_stripe_meter.core.states import EventState
from langchain_stripe_meter.core.values import EXACT, exact_sum

SKEW_SECONDS = 600
"""By how much a report's window is widened: our clock and Stripe's differ, and it judges events after it took them."""
GONE_CODES = frozenset({"archived_meter", "no_meter", "meter_event_customer_not_found"})
"""Codes that say that a meter or a customer is not there (any more)."""
NO_CUSTOMER = "meter_event_customer_not_found"
DUPLICATE = "duplicate_meter_event"
"""The code of an event that Stripe has already: it refused a repetition, not the event."""


def _beyond(at_stripe: Decimal, least: Decimal, most: Decimal) -> Decimal:
    """How far a sum of Stripe's lies outside what is possible.

    Stripe's sums are floats, which are read to 15 digits. What they cannot say is no difference: up to one unit in the
    last place, half of it for the rounding to so few digits, the rest for what adding up floats may do to the last one.
    """
    nearest = min(max(at_stripe, least), most)
    off = EXACT.subtract(at_stripe, nearest)
    unit = EXACT.scaleb(Decimal(1), nearest.adjusted() + 1 - MAX_DIGITS) if nearest else Decimal(0)
    return off if off.copy_abs() > unit else Decimal(0)


def is_settled(
    state: str, now: int, settled_at: int | None, first_unknown_at: int | None, cancelled_at: int | None
) -> bool:
    """Whether it is certain that Stripe's sums show an event that is delivered, and no other.

    Times are Unix seconds, None for what did not happen; ``cancelled_at`` also stands for the wish to cancel it.
    """
    if state in (EventState.SENDING, EventState.DOUBTFUL):
        return False
    if state == EventState.PENDING:
        return first_unknown_at is None
    delivered_at = settled_at if state == EventState.DELIVERED else None
    return max(delivered_at or 0, cancelled_at or 0) <= now - SUMS_LAG


@dataclass(slots=True)
class Known:
    """What the ledger knows of a customer's usage on a meter: Stripe's sum lies between ``least`` and ``most``."""

    recorded: Decimal = Decimal(0)
    delivered: Decimal = Decimal(0)
    least: Decimal = Decimal(0)
    most: Decimal = Decimal(0)

    def add(self, value: Decimal, state: str, *, is_settled: bool) -> None:
        """Take in an amount; unless it ``is_settled``, Stripe's sum may show it or not."""
        self.recorded = EXACT.add(self.recorded, value)
        is_delivered = state == EventState.DELIVERED
        if is_delivered:
            self.delivered = EXACT.add(self.delivered, value)
        if is_delivered if is_settled else value < 0:
            self.least = EXACT.add(self.least, value)
        if is_delivered if is_settled else value > 0:
            self.most = EXACT.add(self.most, value)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One customer's usage on one meter: what the ledger says, and what Stripe says.

    ``recorded`` is everything, in whatever state; ``delivered`` what Stripe took; ``at_least`` what its sum must come
    to, and ``uncertain`` how much more it may be: by what is being sent or in doubt, and by what was delivered or
    cancelled within the last two hours, for the sums lag behind. ``at_stripe`` is that sum, None where it cannot be
    asked (customer or meter unknown). ``account`` is the connected account, ``""`` the key's own. ``problem`` says why
    that account could not be asked: nothing was compared.
    """

    event_name: str
    customer: str
    recorded: Decimal
    delivered: Decimal
    at_least: Decimal
    uncertain: Decimal
    at_stripe: Decimal | None
    account: str = ""
    problem: str | None = None

    @property
    def difference(self) -> Decimal:
        """How far Stripe's sum lies outside what is possible: positive, it has too much; negative, too little."""
        if self.problem is not None:
            return Decimal(0)
        at_stripe = Decimal(0) if self.at_stripe is None else self.at_stripe
        at_most = EXACT.add(self.at_least, self.uncertain)
        return _beyond(at_stripe, self.at_least, at_most)


def compare(
    event_name: str,
    customer: str,
    known: Known,
    at_stripe: Decimal | None,
    account: str = "",
    *,
    later: Known | None = None,
    problem: str | None = None,
) -> Comparison:
    """Hold what the ledger knew before Stripe was asked against Stripe's sum.

    ``later`` is what it knew after Stripe was asked: what was delivered in between may be in the sum or not.
    ``problem`` is why it could not be asked.
    """
    after = known if later is None else later
    least, most = min(known.least, after.least), max(known.most, after.most)
    return Comparison(
        event_name=event_name,
        customer=customer,
        recorded=known.recorded,
        delivered=known.delivered,
        at_least=least,
        uncertain=EXACT.subtract(most, least),
        at_stripe=at_stripe,
        account=account,
        problem=problem,
    )


# -- what Stripe took and refused later


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the events that a report is about: Stripe names only some."""

    identifier: str
    code: str


@dataclass(frozen=True, slots=True)
class Report:
    """What Stripe refused of what it took between ``start`` and ``end`` (Unix seconds): ``errors`` events in all."""

    samples: tuple[Sample, ...]
    errors: int
    codes: frozenset[str]
    start: int
    end: int


def read_report(data: Mapping[str, Any], now: int) -> Report:
    """The ``data`` of a fetched event. A part that is not as documented counts as absent; a window without bounds is
    the last day, since Stripe reports within minutes."""
    listed = _list(_mapping(data.get("reason")).get("error_types"))
    kinds = [kind for kind in listed if isinstance(kind, Mapping) and kind.get("code") != DUPLICATE]
    samples = [
        Sample(identifier, str(kind.get("code")))
        for kind in kinds
        for sample in _list(kind.get("sample_errors"))
        if (identifier := identifier_of(_mapping(_mapping(sample).get("request"))))
    ]
    return Report(
        samples=tuple(dict.fromkeys(samples)),
        errors=sum(count for kind in kinds if isinstance(count := kind.get("error_count"), int)),
        codes=frozenset(str(kind.get("code")) for kind in kinds),
        start=_seconds(data.get("validation_start"), now - 86_400),
        end=_seconds(data.get("validation_end"), now),
    )


def identifier_of(request: Mapping[str, Any]) -> str:
    """The event that a sample's request was for, ``""`` where it does not say.

    Stripe documents ``{"identifier"}`` and ``{"id", "idempotency_key"}``. Our idempotency keys are the identifier, a
    dot and the attempt, and no identifier of ours has a dot.
    """
    named = request.get("identifier") or request.get("idempotency_key")
    return named.partition(".")[0] if isinstance(named, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _seconds(value: object, otherwise: int) -> int:
    if not isinstance(value, str):
        return otherwise
    try:
        moment = datetime.fromisoformat(value)
        return int(moment.timestamp()) if moment.tzinfo else otherwise
    except (ValueError, OverflowError):
        return otherwise


class Verdict(StrEnum):
    """What Stripe's sum says of a customer's events."""

    AGREES = "agrees"
    ABSENT = "absent"
    """Stripe has nothing of them."""
    PARTIAL = "partial"
    """Neither: which of them Stripe has cannot be told."""


@dataclass(frozen=True, slots=True)
class Minute:
    """A customer's events on one meter whose usage lies in the minute from ``start`` (Unix seconds).

    ``delivered`` are those that Stripe took long enough ago for its sums to show them, by identifier; ``uncertain``
    are the values of those that its sums may or may not have, which time alone ends where it ``is_changing``.
    """

    start: int
    delivered: Mapping[str, Decimal]
    uncertain: tuple[Decimal, ...] = ()
    is_changing: bool = False


def judge(delivered: Sequence[Decimal], uncertain: Sequence[Decimal], at_stripe: Decimal | None) -> Verdict:
    """Hold what Stripe must have, and may have, against its sum (None: it cannot be asked).

    Values of both signs can add up to nothing, so then a sum of 0 proves nothing.
    """
    if at_stripe is None:
        return Verdict.PARTIAL
    low = exact_sum([*delivered, *(value for value in uncertain if value < 0)])
    high = exact_sum([*delivered, *(value for value in uncertain if value > 0)])
    if not _beyond(at_stripe, low, high):
        return Verdict.AGREES
    values = [*delivered, *uncertain]
    one_sign = all(value >= 0 for value in values) or all(value <= 0 for value in values)
    return Verdict.ABSENT if at_stripe == 0 and one_sign else Verdict.PARTIAL


Ask = Callable[[int, int], Decimal | None]
"""Stripe's sum for a customer and meter from one whole minute to another (Unix seconds)."""


def disagreeing(minutes: Sequence[Minute], ask: Ask) -> Iterator[tuple[Minute, Verdict, Decimal | None]]:
    """The minutes, given in order, in which Stripe does not have what it took, and its sums.

    It is asked for halves, and for their halves, so that what agrees costs few questions; but for every minute where
    one may make up for what another lacks, with an amount of the other sign, or one that is uncertain.
    """
    if not minutes:
        return
    at_stripe = ask(minutes[0].start, minutes[-1].start + MINUTE)
    delivered = [value for minute in minutes for value in minute.delivered.values()]
    uncertain = [value for minute in minutes for value in minute.uncertain]
    verdict = judge(delivered, uncertain, at_stripe)
    makes_up = uncertain or min(delivered, default=0) < 0 < max(delivered, default=0)
    if verdict is Verdict.AGREES and not (makes_up and len(minutes) > 1):
        return
    if len(minutes) == 1 or at_stripe is None:
        yield from ((minute, verdict, at_stripe) for minute in minutes)
        return
    half = len(minutes) // 2
    yield from disagreeing(minutes[:half], ask)
    yield from disagreeing(minutes[half:], ask)
