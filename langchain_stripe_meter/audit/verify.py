"""Does Stripe agree? The ledger's totals against Stripe's own meter event summaries."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import NamedTuple, TypeVar

from langchain_stripe_meter.audit.windows import some
from langchain_stripe_meter.core.doubts import MINUTE
from langchain_stripe_meter.core.events import LAST_SECOND
from langchain_stripe_meter.core.states import Move
from langchain_stripe_meter.core.tables import table_of
from langchain_stripe_meter.core.totals import Comparison, Known, compare, is_settled
from langchain_stripe_meter.core.values import EXACT
from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import billed_on, meters_named
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.reversals import maybe_cancelled
from langchain_stripe_meter.ledger.store import ACCOUNT, Ledger

AT_ONCE = 8
"""Questions to Stripe at a time; it takes 100 a second, in its sandboxes 25."""
PORTION = 200
PATIENCE = 30
"""The longest wait, in seconds, before a question is asked again."""


UNCERTAIN = (
    "uncertain: what is being sent or in doubt, and what was delivered or cancelled within the last two hours, for "
    "Stripe's sums lag behind."
)
MORE = (
    "Stripe has more than this ledger knows of: {}. Another program or ledger billed it, or this ledger was restored "
    "from a backup (see stripe-meter status) or was told not to bill what Stripe had taken (see stripe-meter acts). "
    "What was not used is taken back at Stripe by its identifier within 24 hours, or by stripe-meter correct."
)
LESS = (
    "Stripe has less than was delivered: {}. If its sums are late, looking again later shows it. Else Stripe rejected "
    "it after it took it, and told the webhook: stripe-meter tail shows what is rejected and why; repair that, then "
    "stripe-meter retry. Without a webhook, look for the reason in Stripe's Dashboard, and bill what is missing by "
    "stripe-meter correct."
)
MAYBE_CANCELLED = (
    "Of that, these may have been cancelled: {}. Where that explains it, cancel them again; when Stripe no longer does "
    "that, write them off."
)
UNKNOWN = "Stripe has no such customer or meter: {}. Is the key of another account, or was the customer deleted?"

Answer = TypeVar("Answer")


class Place(NamedTuple):
    """An account (``""``: the key's own), a meter's event name, and a customer."""

    account: str
    event_name: str
    customer: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared. ``agrees`` is False where Stripe's sum cannot be explained by what the ledger knows, or where
    a connected account could not be asked.
    """

    comparisons: tuple[Comparison, ...]
    maybe_cancelled: tuple[str, ...] = ()
    """Identifiers of delivered events, where Stripe has less, of which nobody knows whether they are cancelled."""

    @property
    def agrees(self) -> bool:
        """Whether everything was compared, and there is no difference at all."""
        return not (self.differences or self.not_compared)

    @property
    def differences(self) -> tuple[Comparison, ...]:
        """The comparisons that do not agree."""
        return tuple(one for one in self.comparisons if one.difference)

    @property
    def not_compared(self) -> tuple[Comparison, ...]:
        """Those of connected accounts that are closed to the key; their ``problem`` says why."""
        return tuple(one for one in self.comparisons if one.problem)

    @property
    def notes(self) -> str:
        """What ``uncertain`` means, where something is; else empty."""
        return UNCERTAIN if any(one.uncertain for one in self.comparisons) else ""

    @property
    def advice(self) -> str:
        """Why ``agrees`` is False, a line for each reason: whose usage differs by how much, what that may come from,
        and what to do. Empty where it is True.
        """
        closed = {one.account: one.problem for one in self.not_compared}
        said = [f"The account {account} was not compared: {problem}" for account, problem in closed.items()]
        kinds: dict[str, list[str]] = {MORE: [], LESS: [], MAYBE_CANCELLED: [*self.maybe_cancelled], UNKNOWN: []}
        for one in self.differences:
            kind = MORE if one.difference > 0 else UNKNOWN if one.at_stripe is None else LESS
            on = f"{one.event_name} of {one.account}" if one.account else one.event_name
            kinds[kind].append(f"{one.customer} on {on} by {one.difference:+,}")
        return "\n".join([*said, *(kind.format(some(named)) for kind, named in kinds.items() if named)])

    def _repr_html_(self) -> str:
        table = table_of(Comparison, self.comparisons, "difference")
        lines = [*self.notes.splitlines(), *self.advice.splitlines()]
        return table + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def verify(
    ledger: Ledger,
    gateway: Gateway,
    since: int = 0,
    until: int = LAST_SECOND,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare per customer and meter, for usage dated from ``since`` to before ``until`` (Unix seconds, each taken down
    to its minute).

    Asks Stripe one question for each customer and meter (also a meter that another of its name replaced), a few at a
    time, while delivery goes on. ``progress`` is told how many of how many are done. A connected account that is closed
    to the key is left out, and named. Raises ``StripeError`` where Stripe does not answer or the key may not read
    meters, ``ConfigurationError`` where ``until`` is not after ``since`` or one of them lies inside a day that was
    pruned.
    """
    start, end = since - since % MINUTE, until - until % MINUTE
    if end <= start:
        raise ConfigurationError(f"until={until} must be at least a minute after since={since} (Unix seconds).")
    ahead = ledger.now() // MINUTE * MINUTE + 10 * MINUTE  # events may lie five minutes ahead
    window = (start, max(min(end, ahead), start + MINUTE))
    known, later = _known(ledger, start, end), dict[Place, Known]()

    def compared() -> tuple[Comparison, ...]:
        return tuple(
            compare(*place[1:], known[place], at_stripe, place.account, later=later.get(place), problem=problem)
            for place, at_stripe, problem in asked
        )

    asked = list(_at_stripe(gateway, sorted(known), window, progress))
    if any(one.difference for one in compared()):  # what was delivered while Stripe was asked is none
        later = _known(ledger, start, end)
    found = compared()
    less = {Place(one.account, one.event_name, one.customer) for one in found if one.difference < 0}
    wished = maybe_cancelled(ledger, start, end) if less else []
    return Verification(found, tuple(row.identifier for row in wished if Place(*row[:3]) in less))


def _known(ledger: Ledger, start: int, end: int) -> dict[Place, Known]:
    now, own, found = ledger.now(), ledger.note(ACCOUNT), dict[Place, Known]()
    for account in views.accounts(ledger):
        on = "" if account == own else account
        sums: dict[tuple[str, str, str, bool, bool], Decimal] = {}  # so that each of many rows is added once
        for event_name, customer, value, state, *moments in views.amounts(ledger, start, end, account):
            if customer:
                amount = Decimal(value)
                key = (event_name, customer, state, is_settled(state, now, *moments), amount < 0)
                sums[key] = EXACT.add(sums[key], amount) if key in sums else amount
        for (event_name, customer, state, settled, _), amount in sums.items():
            known = found.setdefault(Place(on, event_name, customer), Known())
            known.add(amount, state, is_settled=settled)
    return found


def _at_stripe(
    gateway: Gateway, places: Sequence[Place], window: tuple[int, int], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Place, Decimal | None, str | None]]:
    """Stripe's sum for each place, in order, or why its account is closed; ``AT_ONCE`` questions at a time."""
    meters = {account: _meters(gateway, account) for account in sorted({place.account for place in places})}

    def ask(place: Place) -> Decimal | str | None:
        named = meters[place.account]
        if isinstance(named, str):
            return named
        if (mine := named.get(place.event_name)) is None:
            return None
        question = partial(billed_on, gateway, mine, place.customer, window, place.account)
        return _unless_closed(gateway, place.account, question)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="stripe-meter-verify") as threads:
        for first in range(0, len(places), PORTION):  # so that an error ends it soon, and little is kept
            portion = places[first : first + PORTION]
            for done, (place, answer) in enumerate(zip(portion, threads.map(ask, portion), strict=True), first + 1):
                if progress is not None:
                    progress(done, len(places))
                yield (place, None, answer) if isinstance(answer, str) else (place, answer, None)


def _meters(gateway: Gateway, account: str) -> dict[str, list[str]] | str:
    """The ids of all meters by event name, also of those that another one replaced; or why the account is closed."""
    try:
        return _unless_closed(gateway, account, lambda: meters_named(gateway, account))
    except StripeError as error:
        if getattr(error.__cause__, "http_status", None) != 403:
            raise
        raise StripeError(
            "The key may not read meters, so there is nothing to compare with. Give it that permission."
        ) from error


def _unless_closed(gateway: Gateway, account: str, ask: Callable[[], Answer]) -> Answer | str:
    """What ``ask`` returns, or Stripe's words where this connected account, and only it, is closed to the key."""
    try:
        return _patiently(gateway, ask)
    except StripeError as error:
        outcome = gateway.outcome_of(error, account)
        if outcome.move is not Move.NO_ACCESS:
            raise
        return outcome.message or "closed to the key"


def _patiently(gateway: Gateway, ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns; asked again, a few times, where Stripe has too much to do."""
    for wait in (1, 2, 4, 8):
        try:
            return ask()
        except StripeError as error:
            status = getattr(error.__cause__, "http_status", None) or 0
            if status != 429 and status < 500:
                raise
            time.sleep(min(gateway.outcome_of(error).retry_after or wait, PATIENCE))
    return ask()
