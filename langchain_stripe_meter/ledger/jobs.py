"""Usage that is told under a name of its own, and told again: the same changes nothing, anything else is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, select

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.schema import acts, readings
from langchain_stripe_meter.ledger.store import ASSIGNED, Entry


@dataclass(frozen=True, slots=True)
class Job:
    """Usage that no run reported, named by its ``id`` on an ``account``; ``event_names`` are the meters that count it.

    ``is_named``: whoever tells it says who pays.
    """

    id: str
    account: str
    event_names: frozenset[str]
    is_named: bool


def job_number(id: str, account: str) -> int:
    """By which a ledger finds all that it has of a job, in 60 bits."""
    told = f"{len(account)}:{account}{id}"
    return int(hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:15], 16)


def check_job(connection: Connection, entries: Sequence[Entry], job: Job) -> None:
    """Refuse, with ``ConfigurationError``, what was recorded under the id of a job that stands for something else.

    As for ``check_same``; besides, nobody else pays for what other meters count of it, and a meter that counts it has
    nothing of it that is not told now, such as another kind of tokens.
    """
    check_same(connection, entries, job.id, is_named=job.is_named)
    number, told = job_number(job.id, job.account), {entry.key for entry in entries}
    mine = select(readings).where(readings.c.job == number, readings.c.account == job.account)
    for row in connection.execute(mine.order_by(readings.c.id)).all():
        if row.key in told:
            continue
        if row.event_name in job.event_names or any(_is_anothers(connection, row, entry) for entry in entries):
            raise _other(row, job.id)


def check_same(connection: Connection, entries: Sequence[Entry], id: str, *, is_named: bool = False) -> None:
    """Refuse, with ``ConfigurationError``, what was recorded under an ``id`` that stands for something else.

    Only what is known of both can differ: a customer may have been found since, and a person may have said who pays
    for what was held. But where it was skipped, or held for want of an amount, and is known now (``is_named``: the
    caller says who pays), to accept it would be to bill nothing and not to say so.
    """
    found = connection.execute(select(readings).where(readings.c.key.in_([entry.key for entry in entries])))
    rows = {row.key: row for row in found}
    for entry in entries:
        row = rows.get(entry.key)
        if row is None:
            continue
        if is_named and row.state == ReadingState.SKIPPED != entry.state:
            raise ConfigurationError(
                f"The id {id!r:.120} stands for {row.value} of nobody on {row.event_name}: it was skipped when it was "
                "first told, and stays so. To bill it, give it another id."
            )
        if row.value is None and entry.value is not None:
            raise ConfigurationError(
                f"The id {id!r:.120} stands for an unknown amount on {row.event_name}, which a person settles: see "
                "held(), and say how much it was with assign(held, value=…)."
            )
        has_amounts = row.value is not None and entry.value is not None
        if (has_amounts and Decimal(row.value) != entry.value) or _is_anothers(connection, row, entry):
            raise _other(row, id)


def _other(row: Any, id: str) -> ConfigurationError:
    return ConfigurationError(
        f"The id {id!r:.120} stands for {row.value} of {row.customer or 'somebody else'} on {row.event_name}. "
        "Give this one another id."
    )


def _is_anothers(connection: Connection, row: Any, entry: Entry) -> bool:
    """Whether a reading names somebody else than an entry does, for all that is known of both."""
    if entry.value is None or (row.tries and _was_assigned(connection, row.customer)):
        return False
    told = entry.reference.text if entry.reference else None
    known = ((row.customer, entry.customer), (row.reference, told))
    return any(None not in (theirs, ours) and theirs != ours for theirs, ours in known)


def _was_assigned(connection: Connection, customer: str | None) -> bool:
    """Whether a person has ever said of something that was held that ``customer`` pays."""
    said = (acts.c.detail + ",").startswith(f"{customer},", autoescape=True)
    return connection.execute(select(acts.c.id).where(acts.c.act == ASSIGNED, said).limit(1)).first() is not None
