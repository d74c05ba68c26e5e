"""From what ended to what each meter counts. Whatever fails here concerns one meter of one call, and is held."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

from langchain_stripe_meter.core.customers import Facts, Skip
from langchain_stripe_meter.core.events import derive_identifier, number_text
from langchain_stripe_meter.core.meters import Call, Meter, Reading
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.runs import Run
from langchain_stripe_meter.core.states import EventState, ReadingState
from langchain_stripe_meter.core.tenants import Untold
from langchain_stripe_meter.core.usage import Usage, completed, usage_from_metadata
from langchain_stripe_meter.core.values import EXACT, valueclass
from langchain_stripe_meter.errors import (
    ConfigurationError,
    InvalidValueError,
    Unrecorded,
    UsageError,
    logger,
    place_of,
)
from langchain_stripe_meter.ledger.inserting import COLUMNS, Other
from langchain_stripe_meter.ledger.leads import like
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.observed import Observed


@valueclass
class Ending:
    """What ended: a model call that consumed something (``observed``, and the ``call`` that it was), a message (its
    answer and who pays), or both. ``is_rest`` marks a call that was recorded as an estimate before it said so,
    ``unanswered`` a message that was cancelled before it was answered."""

    run: Run
    observed: Observed | None = None
    call: Call | None = None
    message: tuple[Call, Facts] | None = None
    is_rest: bool = False
    unanswered: bool = False


Decide = Callable[..., Sequence[Ending]]
"""What says, of an event, what has ended."""


@valueclass
class Use:
    """What a run, named by ``key``, used: a ``call``, or (``per`` "message") the call that answered a message.
    ``recorded`` is what the call was taken to be before its end was told: only what it came to beyond that counts."""

    key: str
    at: int
    facts: Facts
    per: str
    call: Call
    recorded: Call | None = None


def is_known(observed: Observed) -> bool:
    """Whether there is nothing to estimate: the usage is complete, or contradicts itself and must be held."""
    usage = observed.usage
    if observed.doubt is not None:
        return True
    # No prompt costs nothing: an input of 0 is one that some gateway left out of its stream.
    return usage is not None and bool(usage.input) and usage.output is not None and not observed.partial


def call_of(run: Run, observed: Observed) -> Call:
    """The call that ``run`` was: the model that answered, else the one that was asked for."""
    return Call(observed.usage, observed.model or run.model, run.provider, observed.doubt)


def estimated(call: Call, run: Run, observed: Observed) -> Call:
    """``call`` with what its provider left out of its usage; without any usage where that cannot be estimated."""
    from langchain_stripe_meter.estimate import estimate_usage

    try:
        estimate = estimate_usage(run.prompt, run.tools, observed.output, call.model)
    except Exception as error:  # noqa: BLE001 - a prompt or a tool of a shape that nobody expected
        return replace(call, usage=None, doubt=_doubt("the usage could not be estimated", error))
    return replace(call, usage=completed(observed.usage, estimate))


def readings_of(meters: Sequence[Meter], use: Use) -> list[Reading]:
    """What ``use`` adds to each of ``meters``. What one cannot count a person must look at; the others go on."""
    readings: list[Reading] = []
    for meter in meters:
        if meter.per != use.per:
            continue
        try:
            readings += meter.readings(use.call)
        except InvalidValueError as error:  # Stripe would refuse it
            readings.append(Reading(meter.event_name, None, doubt=str(error)))
        except Exception as error:  # noqa: BLE001 - such as a library of prices that cannot price this
            what = f"the amount could not be worked out for the model {use.call.model!r}"
            readings.append(Reading(meter.event_name, None, doubt=_doubt(what, error)))
    if use.recorded is None:
        return readings
    return _beyond(readings, readings_of(meters, replace(use, call=use.recorded, recorded=None)))


def usage_of_job(usage: object, id: object) -> Usage | None:
    """What ``record_usage`` is told, checked; a sum that is left out is 0, and one that is None unknown."""
    if not isinstance(id, str) or not id:
        raise ConfigurationError("record_usage() needs id=, the name of the job, so that it is billed once.")
    if not isinstance(usage, Mapping) or not {"input_tokens", "output_tokens"} & usage.keys():
        said = ", ".join(map(str, usage)) if isinstance(usage, Mapping) else type(usage).__name__
        raise ConfigurationError(
            "record_usage() takes usage shaped like LangChain's usage_metadata, with input_tokens, output_tokens "
            f"or both; this has {said or 'neither'}."
        )
    return usage_from_metadata({"input_tokens": 0, "output_tokens": 0, **usage})


def counting_calls(meters: Sequence[Meter]) -> list[Meter]:
    """Those of ``meters`` that count usage which no run reported; refused where none does."""
    counting = [meter for meter in meters if meter.per == "call"]
    if not counting:
        names = ", ".join(meter.event_name for meter in meters)
        raise ConfigurationError(
            f"record_usage() has nothing to count: {names} count answered messages, and this is none. "
            "Add a meter that counts calls: Tokens, Cost, or Credits(per='call')."
        )
    return counting


def _beyond(told: Sequence[Reading], recorded: Sequence[Reading]) -> list[Reading]:
    """What ``told`` comes to beyond ``recorded``, less than nothing included. Where either has no amount, what is
    recorded stands: it is an estimate, or a person settles it."""
    unknown = {one.event_name for one in (*told, *recorded) if one.value is None}
    now, before = (
        {(one.event_name, *sorted(one.dimensions.items())): one for one in these} for these in (told, recorded)
    )
    differences = []
    for key, one in {**before, **now}.items():
        new, old = (Decimal(these[key].value or 0) if key in these else Decimal(0) for these in (now, before))
        if one.event_name not in unknown and new != old:
            differences.append(replace(one, value=EXACT.subtract(new, old)))
    return differences


def _doubt(what: str, error: Exception) -> str:
    """What failed and how, but not the error's text, which may quote a prompt."""
    logger.warning("stripe-meter: %s, so it is held: %s at %s", what, type(error).__name__, place_of(error))
    return f"{what}: {type(error).__name__}"


def key_of(run: Run) -> str:
    """What names a run in the identifiers of its readings."""
    return run.id.hex if isinstance(run.id, UUID) else str(run.id)


def of_nobody(entry: Entry, reason: str | None) -> Entry:
    """The same usage, skipped."""
    return replace(
        entry, state=ReadingState.SKIPPED, customer=None, reference=None, reason=reason, session=None, reads=()
    )


def make_entries(use: Use, who: Reference | Skip, readings: Sequence[Reading], account: str = "") -> list[Entry]:
    """The readings of a run, with what is known of who pays."""
    customer = reference = reason = None
    if isinstance(who, Skip):
        known, reason = ReadingState.HELD if isinstance(who, Untold) else ReadingState.SKIPPED, who.reason
    elif who.by == "id":
        known, customer = ReadingState.RESOLVED, who.value
    else:
        known, reference = ReadingState.RECORDED, who
    entries = []
    for one in readings:
        key = derive_identifier(use.key, one.event_name, one.dimensions, account)
        state = ReadingState.HELD if one.value is None and known is not ReadingState.SKIPPED else known
        entry = Entry(
            key, one.event_name, one.value, use.at, state, customer, reference, one.dimensions, one.estimated,
            one.doubt if reason is None else reason, account,
        )  # fmt: skip
        entries.append(entry)
    return entries


def estimates_of(run: Run, rest: Entry) -> list[str]:
    """The identifiers of what ``run`` was taken to come to, the likest to ``rest`` first: a person may have settled
    each meter and kind of tokens by itself."""
    own = derive_identifier(key_of(run), rest.event_name, rest.dimensions, rest.account)
    by_likeness = sorted(run.billed_as, key=lambda one: (one.key != own, one.event_name != rest.event_name))
    return [one.key for one in by_likeness]


def following(entry: Entry, other: Mapping[Any, Any], session: str | None) -> Entry:
    """The same usage, for whoever has the ``other`` reading, as the ledger has that. Where nobody has, a lead that is
    captured for ``session`` may claim both. Where a person has taken the other back, nobody is billed or credited
    without that person's word. It is on the same account: ``tenant=`` may fail by now."""
    entry = replace(entry, account=other["account"])
    if other["state"] == ReadingState.SKIPPED:
        reads = tuple((other["reads"] or "").split(","))
        return replace(of_nobody(entry, other["reason"]), session=session, reads=reads, follows=other["key"])
    written_off = other["state"] == ReadingState.WRITTEN_OFF or other["event_state"] == EventState.WRITTEN_OFF
    if written_off or other["cancelled_at"] is not None:
        reason = f"its estimate {other['key']} was cancelled or written off: write this off too, or assign it"
        return replace(of_nobody(entry, reason), state=ReadingState.HELD)
    return like(entry, other)


HELD_TOLD = 256
"""Of how many meters and kinds of reasons a handler tells that they hold usage."""
_NUMBER = re.compile(r"(?<![\w.'/-])-?\d+(?![\w.'/-]*[\w'/-])")
"""A number by itself, as each report has others; not one in a model's name."""


def held_news(entries: Sequence[Entry], told: set[object]) -> Iterator[UsageError]:
    """What to say of usage that is held for a person, of each meter and kind of reason once; ``told`` also has reasons
    that are known by themselves."""
    for entry in entries:
        what = (entry.event_name, _NUMBER.sub("#", entry.reason or ""))
        if entry.state is ReadingState.HELD and told.isdisjoint((what, entry.reason)) and len(told) < HELD_TOLD:
            told.add(what)
            rest = "for the same reason" if len(told) < HELD_TOLD else "for whatever reason"
            yield UsageError(
                f"Usage on {entry.event_name!r} is held: {entry.reason}. See held(), and settle it with assign(...) or "
                f"write_off(...); more that is held {rest} is not told again."
            )


def same_ids(others: deque[Other]) -> Iterator[ConfigurationError]:
    """What to say of usage that the ledger did not store, for the id of its run is that of another; each once."""
    while others:
        try:
            other = others.popleft()
        except IndexError:  # another thread was faster
            return
        usage, stored = dict(zip(COLUMNS, other.row, strict=True)), other.stored
        amount = f"{'an unknown amount' if usage['value'] is None else usage['value']} on {usage['event_name']}"
        run = usage["key"].rpartition("-")[0]
        whom = "nobody" if stored.state == ReadingState.SKIPPED.value else "another customer"
        before = f"the run {run} was recorded before"
        said = {
            "payer": f"{amount} is not billed to whom this handler names: {before}, for {whom}.",
            "amount": f"{amount} is not billed: {before}, with {stored.value}.",
            "time": f"{amount} was taken for a repetition of the run {run}, long after; if it is another, it is lost.",
        }[other.by]
        yield ConfigurationError(
            f"{said} LangChain's run_id names one run, not a conversation: give each run its own run_id, or none. Of "
            "two handlers that share a ledger and a meter, the first one decides: attach one of them to a run."
        )


# -- what could not be recorded, as ``UnrecordedError`` tells it, and back again


def lost_of(entries: Sequence[Entry]) -> list[Unrecorded]:
    """What somebody was to pay of entries that no ledger has."""
    return [
        Unrecorded(
            entry.key,
            entry.event_name,
            None if entry.value is None else Decimal(entry.value),
            entry.at,
            entry.account,
            entry.customer or (entry.reference.text if entry.reference else None),
            entry.dimensions,
            entry.estimated,
            entry.reason,
        )
        for entry in entries
        if entry.state is not ReadingState.SKIPPED
    ]


def entry_of(lost: Unrecorded) -> Entry:
    """The entry again, under its own identifier: a ledger that has it all the same stores it only once."""
    named = lost.customer if ":" in (lost.customer or "") else None
    reference = Reference.of(named) if named else None
    known = ReadingState.RECORDED if reference else ReadingState.RESOLVED if lost.customer else ReadingState.HELD
    return Entry(
        lost.identifier, lost.event_name, lost.value, lost.at, ReadingState.HELD if lost.value is None else known,
        None if reference else lost.customer, reference, lost.dimensions, lost.estimated, lost.reason,
        lost.stripe_account,
    )  # fmt: skip


def amounts_of(lost: Sequence[Unrecorded]) -> dict[str, Decimal]:
    """By meter, what they come to; an unknown amount counts as nothing."""
    sums: dict[str, Decimal] = {}
    for one in lost:
        sums[one.event_name] = EXACT.add(sums.get(one.event_name, Decimal(0)), one.value or Decimal(0))
    return sums


def said_of(amounts: Mapping[str, Decimal]) -> str:
    """For an error or a log line."""
    return ", ".join(f"{number_text(amount)} on {name}" for name, amount in amounts.items())
