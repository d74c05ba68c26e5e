"""The states of readings and events, the only moves between them, and how long to wait before the next try.

The two tables are the whole truth: an illegal move is a missing key, and the README's picture is made from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from langchain_stripe_meter.errors import IllegalMoveError

SAFE_WINDOW = 23 * 3600
"""Seconds after a first unknown outcome in which the same identifier may be sent again. Stripe promises 24 hours of
deduplication; the last hour is ours."""
STALE_AFTER = 34 * 86_400
"""Age in seconds at which usage is held instead of sent. Stripe refuses it at 35 days, and only a person may re-time
it."""
CLOCK_MARGIN = 3600
"""Seconds by which our clock may run back unnoticed: the last hour of Stripe's 24."""
FIRST_DELAY = 1
MAX_DELAY = 600
MAX_WISH = 6 * 3600
"""The longest ``Retry-After`` that is obeyed, in seconds: a broken one must not park an event until it is too old."""
LONGEST_WAIT = MAX_WISH + CLOCK_MARGIN
"""What seems to be due later than that, in seconds from now, was put off by a clock that was ahead."""


class ReadingState(StrEnum):
    """What became of one reading."""

    RECORDED = "recorded"
    """It names somebody who must still be looked up at Stripe."""
    RESOLVED = "resolved"
    """Its Stripe customer is known."""
    SEALED = "sealed"
    """It is part of a meter event."""
    SKIPPED = "skipped"
    """Nobody to bill."""
    HELD = "held"
    """Somebody unknown or ambiguous, an unknown amount, or too old: it waits for Stripe or for a person."""
    WRITTEN_OFF = "written_off"
    """A person decided not to bill it."""


class EventState(StrEnum):
    """What became of one meter event."""

    PENDING = "pending"
    SENDING = "sending"
    DELIVERED = "delivered"
    DOUBTFUL = "doubtful"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"
    """Stripe has not taken it, and its customer or meter is gone, its account is closed to us, or it is too old: its
    readings are held, and its row is removed."""
    WRITTEN_OFF = "written_off"


class Move(StrEnum):
    """What can happen to a reading or to an event."""

    FOUND = "found"
    NOT_FOUND = "not found"
    HOLD = "hold"
    TRY_AGAIN = "try again"
    ASSIGN = "assign"
    SEAL = "seal"
    UNSEAL = "customer or meter is gone"
    TOO_OLD = "too old"
    CLAIM = "claimed by a lead"
    RETIME = "re-time"
    CANCEL = "cancel"
    WRITE_OFF = "write off"
    SEND = "send"
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    REFUSED_FOR_NOW = "refused for now"
    UNAUTHORISED = "unauthorised"
    NO_ACCESS = "no access to the account"
    UNKNOWN = "unknown outcome"
    OUT_OF_WINDOW = "unknown for too long"
    REFUSED = "refused for good"
    SEEN_AT_STRIPE = "seen at Stripe"
    ABSENT_AT_STRIPE = "absent at Stripe"
    CONTRADICTED = "known to Stripe, though said to be absent"
    REJECTED_LATER = "rejected later"


_R, _E, _M = ReadingState, EventState, Move

READING_MOVES: Mapping[ReadingState, Mapping[Move, ReadingState]] = {
    _R.RECORDED: {_M.FOUND: _R.RESOLVED, _M.NOT_FOUND: _R.HELD, _M.HOLD: _R.HELD},
    _R.RESOLVED: {_M.SEAL: _R.SEALED, _M.HOLD: _R.HELD},
    _R.SEALED: {_M.UNSEAL: _R.HELD, _M.TOO_OLD: _R.HELD},
    _R.HELD: {
        _M.TRY_AGAIN: _R.RECORDED,
        _M.ASSIGN: _R.RESOLVED,
        _M.RETIME: _R.RESOLVED,
        _M.WRITE_OFF: _R.WRITTEN_OFF,
    },
    _R.SKIPPED: {_M.CLAIM: _R.RECORDED},
    _R.WRITTEN_OFF: {},
}

EVENT_MOVES: Mapping[EventState, Mapping[Move, EventState]] = {
    _E.PENDING: {
        _M.SEND: _E.SENDING,
        _M.OUT_OF_WINDOW: _E.DOUBTFUL,
        _M.TOO_OLD: _E.WITHDRAWN,
        _M.NO_ACCESS: _E.WITHDRAWN,
    },
    _E.SENDING: {
        _M.ACCEPTED: _E.DELIVERED,
        _M.DUPLICATE: _E.DELIVERED,
        _M.REFUSED_FOR_NOW: _E.PENDING,
        _M.UNAUTHORISED: _E.PENDING,
        _M.NO_ACCESS: _E.PENDING,
        _M.UNKNOWN: _E.PENDING,
        _M.OUT_OF_WINDOW: _E.DOUBTFUL,
        _M.CONTRADICTED: _E.DOUBTFUL,
        _M.REFUSED: _E.REJECTED,
        _M.UNSEAL: _E.WITHDRAWN,
    },
    _E.DOUBTFUL: {
        _M.SEEN_AT_STRIPE: _E.DELIVERED,
        _M.ABSENT_AT_STRIPE: _E.PENDING,
        _M.REJECTED_LATER: _E.REJECTED,
        _M.WRITE_OFF: _E.WRITTEN_OFF,
    },
    _E.DELIVERED: {_M.REJECTED_LATER: _E.REJECTED, _M.CANCEL: _E.WRITTEN_OFF},
    _E.REJECTED: {_M.TRY_AGAIN: _E.PENDING, _M.TOO_OLD: _E.WITHDRAWN, _M.WRITE_OFF: _E.WRITTEN_OFF},
    _E.WITHDRAWN: {},
    _E.WRITTEN_OFF: {},
}


def next_reading_state(state: ReadingState, move: Move) -> ReadingState:
    """Where ``move`` takes a reading; ``IllegalMoveError`` where the table has no such move."""
    try:
        return READING_MOVES[state][move]
    except KeyError:
        raise IllegalMoveError(f"A reading that is {state} cannot {move}.") from None


def next_event_state(state: EventState, move: Move) -> EventState:
    """Where ``move`` takes an event; ``IllegalMoveError`` where the table has no such move."""
    try:
        return EVENT_MOVES[state][move]
    except KeyError:
        raise IllegalMoveError(f"An event that is {state} cannot {move}.") from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one attempt to send came to. ``retry_after`` is Stripe's own wish, in seconds; ``date`` is when it answered,
    by its own clock, in Unix seconds."""

    move: Move
    message: str = ""
    request_id: str | None = None
    retry_after: int | None = None
    date: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is known of an event when an attempt ends. Times are Unix seconds, by our clock. ``was_absent``: it was in
    doubt before, and Stripe's sums, or a person, said that Stripe did not have it."""

    identifier: str
    attempts: int
    sent_at: int
    first_unknown_at: int | None = None
    was_absent: bool = False

    @property
    def is_first(self) -> bool:
        """Whether Stripe cannot have the event from this ledger by any earlier attempt."""
        return not self.attempts and self.first_unknown_at is None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the ledger must store after an attempt: the ``move`` that it was, and when to try again (``due``)."""

    move: Move
    state: EventState
    attempts: int
    due: int
    first_unknown_at: int | None


def settle(attempt: Attempt, outcome: Outcome, now: int) -> Settlement:
    """Decide what an attempt's outcome means for the event.

    An outcome is *unknown* from the moment the request was sent, so the safe window counts from there. A refused
    key, or a closed account, burns no attempt. Once unknown, an event stays so through later refusals until Stripe says
    that it has it: a 429 says nothing of the earlier try, and neither does a final no, so that one leads to doubt, not
    to rejection or to being withdrawn. Nor is believed at once that Stripe has what was said to be absent: it knows the
    identifier also of what it refused later.
    """
    first_unknown = attempt.first_unknown_at
    move = outcome.move
    if move is Move.DUPLICATE and attempt.was_absent:
        move = Move.CONTRADICTED
    if move in (Move.UNKNOWN, Move.CONTRADICTED) and first_unknown is None:
        first_unknown = attempt.sent_at
    back_in_queue = next_event_state(EventState.SENDING, move) is EventState.PENDING
    is_final = move in (Move.REFUSED, Move.UNSEAL)
    if first_unknown is not None and (is_final or (back_in_queue and out_of_window(first_unknown, now))):
        move = Move.OUT_OF_WINDOW
    attempts = attempt.attempts + (outcome.move not in (Move.UNAUTHORISED, Move.NO_ACCESS))
    delay = max(backoff(attempts, attempt.identifier), min(outcome.retry_after or 0, MAX_WISH))
    return Settlement(move, next_event_state(EventState.SENDING, move), attempts, now + delay, first_unknown)


def safe_window(now: int) -> tuple[int, int]:
    """Between which times, both excluded, an outcome must have become unknown for Stripe still to know the identifier.

    A clock that ran backwards errs to the safe side.
    """
    return now - SAFE_WINDOW, now + CLOCK_MARGIN


def out_of_window(first_unknown_at: int, now: int) -> bool:
    """Whether Stripe may have forgotten the identifier."""
    since, until = safe_window(now)
    return not since < first_unknown_at < until


def backoff(attempts: int, identifier: str) -> int:
    """Whole seconds to wait before the next try: exponential up to ten minutes, spread over its upper half.

    The spread comes from the identifier, not from chance: the same facts always give the same decision, and two
    events never march in step.
    """
    ceiling = min(MAX_DELAY, FIRST_DELAY << min(max(attempts, 1), 20))
    digest = hashlib.sha256(f"{identifier}/{attempts}".encode()).digest()
    return ceiling // 2 + int.from_bytes(digest[:4], "big") % (ceiling - ceiling // 2 + 1)


def picture() -> str:
    """Both tables as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2"]
    for title, table in (("Reading", READING_MOVES), ("Event", EVENT_MOVES)):
        lines.append(f"    state {title} {{")
        lines += [f"        {old} --> {new}: {move}" for old, moves in table.items() for move, new in moves.items()]
        lines.append("    }")
    return "\n".join(lines)
