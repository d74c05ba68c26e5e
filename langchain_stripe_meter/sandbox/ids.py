"""Identifiers that look like Stripe's and are the same in every run."""

from __future__ import annotations

import hashlib
import itertools


class Ids:
    """Makes ids such as ``cus_Vb1c…``; two makers with different seeds never make the same one."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._count = itertools.count(1)

    def make(self, prefix: str, length: int = 14) -> str:
        """The next id with this prefix."""
        digest = hashlib.sha256(f"{self._seed}/{next(self._count)}".encode()).hexdigest()
        return f"{prefix}_{digest[:length]}"
