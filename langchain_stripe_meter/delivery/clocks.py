"""Is our clock right? Stripe dates each answer, and usage is dated by us."""

from __future__ import annotations

from collections.abc import Callable

from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.ledger.store import Ledger

WRONG_SECONDS = 300
"""How wrong our clock may be before it is told: by more, Stripe refuses what is dated ahead."""
CLOCK = "clock"
"""The ledger's note that says how wrong the clock of the machine that delivers is."""


class Clocks:
    """Compares for one courier. ``tell`` is told once when our clock is found wrong."""

    def __init__(self, ledger: Ledger, tell: Callable[[Exception], None]) -> None:
        self._ledger = ledger
        self._tell = tell
        self._is_wrong: bool | None = None

    def compare(self, date: int, asked_at: int, now: int) -> None:
        """Stripe answered at ``date``, by its clock, what was sent at ``asked_at`` and settled at ``now``, by ours."""
        ahead = date - now if date > now else min(date - asked_at, 0)
        is_wrong = abs(ahead) > WRONG_SECONDS
        if is_wrong is self._is_wrong:
            return
        self._is_wrong = is_wrong
        said = f"This machine's clock is {abs(ahead)} seconds {'behind' if ahead > 0 else 'ahead of'} Stripe's"
        self._ledger.set_note(CLOCK, said if is_wrong else None)
        if is_wrong:
            self._tell(StripeError(f"{said}; usage is billed for the wrong time. Set the clock."))
