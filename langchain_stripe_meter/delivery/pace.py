"""How much is sent at once, and what rests meanwhile: as Stripe answers, not as we would like."""

from __future__ import annotations

from langchain_stripe_meter.ledger.outbox import Line

QUIET_SECONDS = 2
"""How long everything rests when Stripe did not take even one event at a time."""
RESTING_AT_MOST = 100
LONGEST_REST = 3600
"""Nothing rests for longer, in seconds: of a longer wish this much is obeyed, and what still seems to rest for longer
was told by a clock that has been set back since."""


class Pace:
    """``most`` events at once; fewer, down to one, while Stripe refuses or does not answer. Times are Unix seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._resting: dict[Line, int] = {}
        self.quiet_until = 0

    def is_quiet(self, now: int) -> bool:
        """Whether everything rests."""
        return now < self.quiet_until <= now + LONGEST_REST

    def slots(self, in_flight: int, now: int) -> int:
        """How many events may start now."""
        return 0 if self.is_quiet(now) else self._limit - in_flight

    def at_rest(self, now: int) -> list[Line]:
        """Of whom Stripe wants to hear nothing yet; the newest, if there are very many."""
        self._resting = {line: until for line, until in self._resting.items() if now < until <= now + LONGEST_REST}
        return list(self._resting)[-RESTING_AT_MOST:]

    def faster(self) -> None:
        """Stripe answered: one more at once."""
        self._limit = min(self._limit + 1, self._most)
        self.quiet_until = 0

    def slower(self, line: Line, wish: int | None, now: int) -> None:
        """Halve what is in flight; where Stripe says how long to wait (seconds), this customer and meter does."""
        if wish:
            self._resting[line] = now + min(wish, LONGEST_REST)
        if self._limit == 1:
            self.rest(QUIET_SECONDS, now)
        self._limit = max(self._limit // 2, 1)

    def rest(self, seconds: int, now: int) -> None:
        """Nothing is sent for so long, nor before an earlier rest is over."""
        until = now + min(seconds, LONGEST_REST)
        self.quiet_until = max(self.quiet_until, until) if self.is_quiet(now) else until

    def probe(self, after: int) -> None:
        """Nothing is sent before ``after``, and then one event at a time."""
        self._limit = 1
        self.quiet_until = after
