"""Values: small classes whose objects nobody changes once they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def valueclass(kind: type[T]) -> type[T]:
    """A dataclass that the type checker holds to be frozen.

    For what is made several times in every run: freezing it at run time too would make it three times as slow to
    make.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)
