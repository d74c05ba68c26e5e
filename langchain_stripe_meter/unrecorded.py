"""What could not be recorded, as ``UnrecordedError`` tells it, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.core.events import number_text
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.values import EXACT
from langchain_stripe_meter.errors import Unrecorded
from langchain_stripe_meter.ledger.store import Entry


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
