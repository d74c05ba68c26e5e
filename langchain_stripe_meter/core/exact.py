"""Sums that are exact, whatever decimal context the application has set (Python's own rounds to 28 digits)."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Context, Decimal
from functools import reduce

EXACT = Context(prec=250)


def exact_sum(values: Iterable[Decimal]) -> Decimal:
    """The sum; 0 of none."""
    return reduce(EXACT.add, values, Decimal(0))
