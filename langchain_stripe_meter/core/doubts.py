"""What becomes of a doubtful event: the ledger's knowledge of its minute against Stripe's sum of that minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from langchain_stripe_meter.core.events import MAX_DIGITS
from langchain_stripe_meter.core.states import STALE_AFTER, EventState, Move
from langchain_stripe_meter.core.values import EXACT, exact_sum

MINUTE = 60
"""Stripe sums up whole minutes (UTC), in seconds."""
SUMS_LAG = 2 * 3600
"""Seconds without any activity in a minute before its sum is looked at. Stripe publishes no bound for how far its sums
lag; half of this is for a clock of ours that jumps."""
LOOK_AGAIN = 600
"""Seconds between two looks; only two that saw the same decide anything."""
ASK_AGAIN = 3600
"""Seconds between looks once a person has been told."""
PERSON = "A person must decide: "
"""How the reason begins with which an event stays doubtful."""
KNOWN_THERE = "Stripe knows its identifier, though it was said to lack it"
"""Why an event is in doubt again that was sent again after a doubt: see ``settle`` in core/states.py."""
_LACKED_AND_KNOWN = (
    f"{KNOWN_THERE}, and its sums lack it: it refused it later, or somebody cancelled it there. If it refused it, "
    "settle it as absent, and it goes out under a new identifier; if it was cancelled, write it off."
)
_BESIDE_KNOWN = (
    "Stripe's sums lack it, but also another doubtful event of that minute, whose identifier Stripe knows: they may be "
    "wrong. Settle that one first."
)
MANY_SUMS = 2000
"""Beyond so many different sums of the doubts of a minute, chance explains anything, and nothing is told from them."""


@dataclass(frozen=True, slots=True)
class Look:
    """What Stripe's sum was; ``value`` is None where it cannot be told, and ``why`` says so."""

    value: Decimal | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One event as the ledger has it. Times are Unix seconds; ``seen_value`` and ``seen_at`` are the last look, and
    ``cancelled_at`` also stands for the wish to cancel it. ``is_contradicted``: Stripe knew its identifier when it was
    sent again because Stripe was said to lack it."""

    id: int
    identifier: str
    value: Decimal
    state: EventState
    at: int
    sent_at: int | None = None
    settled_at: int | None = None
    first_unknown_at: int | None = None
    seen_value: Decimal | None = None
    seen_at: int | None = None
    error: str | None = None
    cancelled_at: int | None = None
    is_contradicted: bool = False

    @property
    def is_open(self) -> bool:
        """Whether Stripe may take, or have taken, it without our knowing yet."""
        unknown = self.first_unknown_at is not None
        return self.state is EventState.SENDING or (self.state is EventState.PENDING and unknown)

    @property
    def was_given_up(self) -> bool:
        """Whether it was written off although Stripe may have it. (What it cancelled, it has no more.)"""
        is_unknown = self.first_unknown_at is not None and self.cancelled_at is None
        return self.state is EventState.WRITTEN_OFF and is_unknown

    @property
    def awaits_person(self) -> bool:
        """Whether a person has been told of it."""
        return (self.error or "").startswith(PERSON)


@dataclass(frozen=True, slots=True)
class Facts:
    """Every event of one account, customer and meter in one minute; ``pruned`` if the ledger no longer has them all."""

    events: tuple[Trace, ...]
    pruned: bool = False

    @property
    def doubts(self) -> tuple[Trace, ...]:
        """The doubtful ones."""
        return tuple(event for event in self.events if event.state is EventState.DOUBTFUL)

    @property
    def delivered(self) -> Decimal:
        """What Stripe is known to have."""
        return exact_sum([event.value for event in self.events if event.state is EventState.DELIVERED])

    @property
    def settled_since(self) -> int:
        """When Stripe's sum may have changed for the last time. What it refused for now changed nothing."""
        active = (one for one in self.events if one.state is not EventState.PENDING)
        return max(moment or 0 for one in active for moment in (one.sent_at, one.settled_at, one.cancelled_at))


@dataclass(frozen=True, slots=True)
class Verdict:
    """``move`` for all doubts of the minute, or None: they stay, for a person if there is a ``reason``; ``if_known`` is
    another reason for those that Stripe knew by their identifiers."""

    move: Move | None = None
    reason: str | None = None
    if_known: str | None = None

    def reason_of(self, doubt: Trace) -> str | None:
        """Why one of them stays for a person, who is told in any case if Stripe knew it by its identifier."""
        if self.reason is None or not doubt.is_contradicted:
            return self.reason
        return self.if_known or f"{self.reason} {KNOWN_THERE}."


def is_ready(facts: Facts, now: int) -> bool:
    """Whether a look at Stripe's sum could tell anything now."""
    if not facts.doubts or any(event.is_open for event in facts.events):
        return False
    return now - facts.settled_since >= SUMS_LAG and all(_is_due(doubt, now) for doubt in facts.doubts)


def _is_due(doubt: Trace, now: int) -> bool:
    wait = ASK_AGAIN if doubt.awaits_person else LOOK_AGAIN
    return doubt.seen_at is None or now - doubt.seen_at >= wait


def decide(facts: Facts, look: Look, now: int) -> Verdict:
    """What a look means for the doubts of a minute that ``is_ready``.

    Nothing follows from one look alone: the sum must have been the same before, and have been looked at when it could
    be trusted. The doubts of a minute share their fate, since a sum does not say who is in it.

    Stripe may also have refused, after it took it, what the ledger calls delivered, without our hearing of it. Where
    one delivered event, or all of them, amounts to as much as some of the doubts, it could have those instead: they
    would be sent again, and billed twice as soon as the refusal is heard of and made good. A person is asked, then.
    Several refusals unheard of, which add up to some of the doubts by chance, are taken for impossible; the customer's
    total would be right even so.
    """
    if not all(_saw_the_same(doubt, look, facts) for doubt in facts.doubts):
        return Verdict()
    reason = _undecidable(facts, look)
    if reason is None and look.value is not None:
        return _compare(facts, look.value, now)
    return _ask(reason or look.why)


def _saw_the_same(doubt: Trace, look: Look, facts: Facts) -> bool:
    return (
        doubt.seen_at is not None and doubt.seen_value == look.value and doubt.seen_at - facts.settled_since >= SUMS_LAG
    )


def _undecidable(facts: Facts, look: Look) -> str | None:
    """Why no sum could tell, or None."""
    values = [doubt.value for doubt in facts.doubts]
    if look.value is None:
        return look.why
    if facts.pruned:
        return "what was delivered in that minute has been pruned from the ledger."
    if any(event.was_given_up for event in facts.events):
        return "an event of that minute was written off while it was in doubt."
    if any(event.cancelled_at is not None and event.state is EventState.DELIVERED for event in facts.events):
        return "an event of that minute was asked to be cancelled, and it is not settled whether it was."
    if min(values) < 0 < max(values):
        return "usage and corrections of the same minute are in doubt."
    if not _can_be_told_apart(facts.delivered, values):
        return f"Stripe's sums have {MAX_DIGITS} digits, too few to tell."
    return None


def _can_be_told_apart(delivered: Decimal, values: Sequence[Decimal]) -> bool:
    """Whether every sum that Stripe might have is exact in the digits that it answers with."""
    parts = [EXACT.normalize(part) for part in (delivered, *values) if part]
    finest = min((int(part.as_tuple().exponent) for part in parts), default=0)
    most = max(abs(delivered), abs(exact_sum([delivered, *values])))
    return most < Decimal((0, (1,), MAX_DIGITS + finest))


def _compare(facts: Facts, at_stripe: Decimal, now: int) -> Verdict:
    in_doubt = exact_sum([doubt.value for doubt in facts.doubts])
    unexplained = EXACT.subtract(at_stripe, facts.delivered)
    if unexplained and unexplained != in_doubt:
        return _ask(
            f"Stripe has {at_stripe:f} in that minute; {facts.delivered:f} is delivered, {in_doubt:f} in doubt."
        )
    if _could_have_been_swapped(facts, seen=unexplained == in_doubt):
        return _ask(
            f"Stripe has {at_stripe:f} in that minute: either what is delivered, or as much of what is in doubt, if it "
            "refused the other later."
        )
    if unexplained == in_doubt:
        return Verdict(Move.SEEN_AT_STRIPE)
    if any(doubt.is_contradicted for doubt in facts.doubts):
        return Verdict(None, PERSON + _BESIDE_KNOWN, PERSON + _LACKED_AND_KNOWN)
    if any(now - doubt.at > STALE_AFTER for doubt in facts.doubts):
        return _ask("Stripe does not have it, but it is older than 34 days, and Stripe would refuse it.")
    return Verdict(Move.ABSENT_AT_STRIPE)


def _could_have_been_swapped(facts: Facts, *, seen: bool) -> bool:
    """Whether delivered events that Stripe does not have could hide that the doubts are not as they seem.

    Doubts that seem to be absent could be there in the place of as much that was delivered; where they seem to be
    there (``seen``), some could be missing along with as much of corrections that were delivered.
    """
    doubts = [doubt.value for doubt in facts.doubts]
    delivered = [event.value for event in facts.events if event.state is EventState.DELIVERED]
    missing = {-value if seen else value for value in (*delivered, facts.delivered)}
    hidden = {value for value in missing if value and (value < 0) == (exact_sum(doubts) < 0)}
    if not hidden:
        return False
    sums = _sums(doubts, max(map(abs, hidden)))
    return sums is None or bool(hidden & sums)


def _sums(values: Sequence[Decimal], most: Decimal) -> set[Decimal] | None:
    """Every sum of some of ``values``, which have one sign, up to the amount ``most``; None where they are too many."""
    sums = {Decimal(0)}
    for value in values:
        more = (EXACT.add(known, value) for known in sums)
        sums |= {one for one in more if abs(one) <= most}
        if len(sums) > MANY_SUMS:
            return None
    return sums


def _ask(why: str) -> Verdict:
    return Verdict(reason=PERSON + why)
