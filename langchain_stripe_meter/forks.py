"""What a forked child does before anything else: let go of what belongs to its parent.

A child has one thread, so locks that other threads held at the fork would stay locked for good. This runs before the
child can start a second thread, so nothing here can race.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Something with locks, threads or connections."""

    def after_fork(self) -> None:
        """Called once in each child, which has a single thread then."""


_known: WeakSet[Forkable] = WeakSet()


def renew_after_fork(one: Forkable) -> None:
    """Call ``one.after_fork()`` in every child, for as long as ``one`` lives."""
    _known.add(one)


def _renew_all() -> None:
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
