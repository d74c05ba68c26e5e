"""The insert that runs once per run, in SQL: SQLAlchemy's own statement costs three times as much per row."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from langchain_stripe_meter.core.runs import ABANDONED_AFTER
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger.schema import readings

_ALWAYS = ("key", "event_name", "customer", "value", "at", "estimated", "state")
_SELDOM = {
    "reference": None, "dimensions": None, "reason": None, "account": "", "session": None, "reads": None, "job": None,
}  # fmt: skip
"""Columns that most rows leave at these, the table's own defaults."""
_DEFAULTS = tuple(_SELDOM.values())
COLUMNS = (*_ALWAYS, *_SELDOM)
_PLAIN = len(_ALWAYS)
_KEY, _VALUE, _AT, _JOB, _ESTIMATED, _STATE, _CUSTOMER, _REFERENCE = map(
    COLUMNS.index, ("key", "value", "at", "job", "estimated", "state", "customer", "reference")
)
SAME_SECONDS = 300
"""How far apart two handlers' times of one run may be, which wait for the ledger one after the other."""
GIVEN_UP_SECONDS = ABANDONED_AFTER + SAME_SECONDS
"""The same for an estimate, which may be dated when each of them gave the run up."""

Row = tuple[Any, ...]
"""The values of ``COLUMNS``."""


class Stored(NamedTuple):
    """What the ledger has under the key of a row that was not stored."""

    value: str | None
    at: int
    state: str
    customer: str | None
    reference: str | None


class Other(NamedTuple):
    """A row that was not stored, what stands in its place, and in what the two differ."""

    row: Row
    stored: Stored
    by: Literal["payer", "amount", "time"]


def _statement(mark: str, columns: Sequence[str] = COLUMNS) -> str:
    marks = ", ".join([mark] * len(columns))
    return f"INSERT INTO {readings.name} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT (key) DO NOTHING"  # noqa: S608


_ON_POSTGRES = _statement("%s")
_ON_SQLITE = _statement("?")
_PLAIN_ON_SQLITE = _statement("?", _ALWAYS)
_FIND = f"SELECT {', '.join(Stored._fields)} FROM {readings.name} WHERE key = "  # noqa: S608


def insert_on_sqlite(driver: Any, rows: list[Row]) -> Sequence[Other]:
    """Insert in one transaction: a single row commits by itself, which saves two round trips."""
    if len(rows) == 1:
        row = rows[0]
        if row[_PLAIN:] == _DEFAULTS:
            stored = driver.execute(_PLAIN_ON_SQLITE, row[:_PLAIN]).rowcount
        else:
            stored = driver.execute(_ON_SQLITE, row).rowcount
    else:
        driver.execute("BEGIN IMMEDIATE")  # where anything fails from here on, the lane rolls back
        stored = driver.executemany(_ON_SQLITE, rows).rowcount
        driver.execute("COMMIT")
    return () if stored == len(rows) else others(driver, rows)


def insert_on_postgres(driver: Any, rows: list[Row]) -> Sequence[Other]:
    """As ``insert_on_sqlite``."""
    if len(rows) == 1:
        stored = driver.execute(_ON_POSTGRES, rows[0]).rowcount
    else:
        driver.execute("BEGIN")
        cursor = driver.cursor()
        cursor.executemany(_ON_POSTGRES, rows)
        stored = cursor.rowcount
        driver.execute("COMMIT")
    return () if stored == len(rows) else others(driver, rows)


def others(driver: Any, rows: Sequence[Row]) -> list[Other]:
    """Of rows that were inserted, those whose key stands for another run, which has another amount or is of another
    time, or for one that somebody else pays, or nobody.

    A job may be told again at another time.
    """
    find = _FIND + ("?" if "sqlite" in type(driver).__module__ else "%s")
    found = []
    for row in rows:
        there = driver.execute(find, (row[_KEY],)).fetchone()
        if there is not None and row[_JOB] is None:
            stored = Stored(*there)
            by = _difference(row, stored)
            if by is not None:
                found.append(Other(row, stored, by))
    return found


def _difference(row: Row, stored: Stored) -> Literal["payer", "amount", "time"] | None:
    if _pays_otherwise(row, stored):
        return "payer"
    if stored.value is None or row[_VALUE] is None:
        return None
    if Decimal(stored.value) != Decimal(row[_VALUE]):
        return "amount"
    most = GIVEN_UP_SECONDS if row[_ESTIMATED] else SAME_SECONDS
    return "time" if abs(stored.at - row[_AT]) > most else None


def _pays_otherwise(row: Row, stored: Stored) -> bool:
    """Whether ``row`` names somebody who pays, and what is stored another, or nobody."""
    pairs = ((row[_CUSTOMER], stored.customer), (row[_REFERENCE], stored.reference))
    named = row[_STATE] != ReadingState.SKIPPED.value and any(ours is not None for ours, _ in pairs)
    is_other = any(None not in pair and pair[0] != pair[1] for pair in pairs)
    return named and (is_other or stored.state == ReadingState.SKIPPED.value)
