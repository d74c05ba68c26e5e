"""Values: small classes whose objects nobody changes once they are made, sums that are exact, counts in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Context, Decimal
from functools import reduce
from typing import TypeVar, dataclass_transform

T = TypeVar("T")

EXACT = Context(prec=250)
"""Whatever decimal context the application has set (Python's own rounds to 28 digits)."""


def exact_sum(values: Iterable[Decimal]) -> Decimal:
    """The sum; 0 of none."""
    return reduce(EXACT.add, values, Decimal(0))


def counted(count: int, noun: str) -> str:
    """``1 reading``, ``1,000 readings``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown(value: object) -> str:
    """A value as an error quotes it: no long one whole."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write out very long ones
        return f"(a number of {value.bit_length()} bits)"
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def valueclass(kind: type[T]) -> type[T]:
    """A dataclass that the type checker holds to be frozen.

    For what is made several times in every run: freezing it at run time too would make it three times as slow to
    make.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)
