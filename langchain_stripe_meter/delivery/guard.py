"""What is looked at before anything is sent: is it this ledger's account, may the key send at all, is each account open
to us, with meters that add up rightly, how much does Stripe take at once, and is our clock right?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from cachetools import LRUCache

from langchain_stripe_meter.core.states import Move, backoff
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.errors import ForeignLedgerError, StripeError, logger
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import problem_with
from langchain_stripe_meter.ledger import resolving, sealing
from langchain_stripe_meter.ledger.epoch import Epoch
from langchain_stripe_meter.ledger.outbox import Line
from langchain_stripe_meter.ledger.resolving import Waiting
from langchain_stripe_meter.ledger.store import ACCOUNT, Ledger, first_note, pin

PAUSED = "paused"
"""The ledger's note that says why sending is paused."""
WAITS = "waits"
"""The ledger's note that says why Stripe takes nothing for now; a status shows it while it is new, and usage waits."""
PAUSE_SECONDS = 30
"""How long everything rests after Stripe refused the key, before one event tries it again."""
LISTINGS_AT_ONCE = 8
"""Accounts that are asked for their meters at the same time."""
LISTING_DELAY = 30
"""The longest wait, in seconds, before an account is asked again that did not answer, unless Stripe wishes more."""
RESTS_REMEMBERED = 1000
"""Accounts and meters that rest, or did until they were asked again."""
HICCUP_SECONDS = 4
"""How long Stripe may take nothing before that is logged."""
QUIET_SECONDS = 2
"""How long everything rests when Stripe did not take even one event at a time."""
RESTING_AT_MOST = 100
LONGEST_REST = 3600
"""Nothing rests for longer, in seconds: of a longer wish this much is obeyed, and what still seems to rest for longer
was told by a clock that has been set back since."""
WRONG_SECONDS = 300
"""How wrong our clock may be before it is told: by more, Stripe refuses what is dated ahead."""
CLOCK = "clock"
"""The ledger's note that says how wrong the clock of the machine that delivers is."""


class Listing(NamedTuple):
    """A question to Stripe: which meters does this account have?"""

    account: str


class _Rest(NamedTuple):
    """``why`` an account or a meter is held until then (Unix seconds); without it, Stripe has not answered so far."""

    until: int
    why: str | None
    tries: int = 0


class NotStartedError(StripeError):
    """No thread could be started for a request: usually, the interpreter is shutting down."""


class Guard:
    """Checks for one courier. ``tell`` is told what waits; ``listing`` are the accounts that have not answered yet."""

    def __init__(self, ledger: Ledger, gateway: Gateway, pace: Pace, tell: Callable[[Exception], None]) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self._pace = pace
        self._tell = tell
        self._is_ours = False
        self._pause_noted: bool | None = None
        self._waits_since: int | None = None
        self._told_wait = False
        self._epoch = Epoch(ledger, tell)
        self.sends, self.end = self._epoch.sends, self._epoch.end
        self.listing: set[str] = set()
        self._listed: set[str] = set()
        self._refused: dict[str, str] = {}
        self._rests: LRUCache[tuple[str, str | None], _Rest] = LRUCache(RESTS_REMEMBERED)  # also those that are over

    def check(self, now: int) -> bool:
        """Whether anything may be sent: not where Stripe does not say whose key this is, nor to another account than
        the ledger's."""
        if self._pace.is_quiet(now):
            return False
        try:
            self._epoch.keep(now)
            if not self._is_ours:
                self._check_account()
                self._answered()
        except ForeignLedgerError as error:
            self._pause(str(error), now)
            return False
        except StripeError as error:
            outcome = self._gateway.outcome_of(error)
            if outcome.move is Move.UNAUTHORISED:
                self.pause(outcome.message, now)
            else:
                self._pace.rest(outcome.retry_after or QUIET_SECONDS, now)
                logger.info("stripe-meter: sending waits: %s", error)
                self.unanswered(str(error), now)
            return False
        return True

    def unanswered(self, why: str, now: int) -> None:
        """Stripe does not answer, or takes nothing for now: what is pending waits. That is no news for some seconds."""
        self._ledger.set_note(WAITS, why)
        self._waits_since = now if self._waits_since is None else self._waits_since
        if not self._told_wait and now - self._waits_since >= HICCUP_SECONDS:
            self._told_wait = True
            logger.warning("stripe-meter: what is pending waits, nothing is lost: %s", why)

    def pause(self, why: str, now: int) -> None:
        """Stripe has refused the key: everything rests, and then one event at a time tries it."""
        next_step = f"Check the key: it is tried again every {PAUSE_SECONDS} seconds."
        self._pause(f"Stripe refused the key; {why.rstrip('.')}. {next_step}", now)

    def _pause(self, message: str, now: int) -> None:
        is_news = not self._pause_noted
        self._pace.probe(now + PAUSE_SECONDS)
        self._ledger.set_note(PAUSED, message)
        self._pause_noted = True
        if is_news:
            self._tell(StripeError(f"Sending is paused, nothing is lost. {message}"))

    def check_meters(self, now: int) -> tuple[list[str], list[Listing]]:
        """The accounts whose usage may be sealed, and those whose meters Stripe must be asked for first.

        Holds what must not be sent, and releases what was held and may be sent by now.
        """
        self._hold_refused(now)
        with self._ledger.deliver_lane().transaction(shared=True) as connection:
            waiting = resolving.waiting_meters(connection, now)
        ready, questions = [], []
        for account, meters in waiting.items():
            if account in self.listing or self._is_at_rest(account, meters, now):
                continue
            if self._settle(account, meters, now):
                ready.append(account)
            elif len(self.listing) < LISTINGS_AT_ONCE:
                self.listing.add(account)
                questions.append(Listing(account))
        self._listed.clear()
        return ready, questions

    def closed(self, now: int) -> dict[str, str]:
        """The accounts that are not to be asked for anything now, and why."""
        at_rest = ((account, self._rest_of(account, name, now)) for account, name in list(self._rests) if name is None)
        return {account: rest.why for account, rest in at_rest if rest and rest.why} | self._refused

    def listed(self, account: str, error: StripeError | None, now: int) -> None:
        """Stripe has listed an account's meters, or has not."""
        self.listing.discard(account)
        if error is None:
            self._listed.add(account)
            if self._gateway.can_read_meters(account):
                self._rests.pop((account, None), None)
            return
        outcome = self._gateway.outcome_of(error, account)
        if outcome.move in (Move.NO_ACCESS, Move.REFUSED, Move.UNSEAL):
            self.refused(account, outcome.message)
        elif outcome.move is Move.UNAUTHORISED:
            self.pause(outcome.message, now)
        else:
            before = self._rests.get((account, None))
            tries = before.tries + 1 if before else 1
            delay = max(min(backoff(tries, account), LISTING_DELAY), min(outcome.retry_after or 0, LONGEST_REST))
            self._rests[account, None] = _Rest(now + delay, None, tries)
            if before is None and not isinstance(error, NotStartedError):
                self._tell(StripeError(f"Usage on {_called(account)} waits: {error}"))

    def opened(self, account: str) -> None:
        """Stripe has taken something on an account: neither it nor anything else is closed to the key."""
        self._rests.pop((account, None), None)
        if self._pause_noted is None:  # an earlier process may have left it
            self._pause_noted = self._ledger.note(PAUSED) is not None
        if self._pause_noted:
            self._ledger.set_note(PAUSED, None)
            self._pause_noted = False
        self._answered()

    def _answered(self) -> None:
        if self._waits_since is not None:
            self._ledger.set_note(WAITS, None)
            self._waits_since, self._told_wait = None, False

    def refused(self, account: str, why: str) -> None:
        """Stripe has closed an account to us: the next check holds what is to be sent there."""
        self._refused[account] = why

    def _hold_refused(self, now: int) -> None:
        for account, why in list(self._refused.items()):
            rest = self._rest_of(account, None, now)
            with self._ledger.deliver_lane().transaction() as connection:
                _, due = resolving.hold_usage(connection, (account, None), why, now, rest and rest.until)
                sealing.withdraw(connection, account, why, due)
            del self._refused[account]
            before = self._rests.get((account, None))
            self._rests[account, None] = _Rest(due, why)
            if before is None or before.why is None:
                said = f"Usage on {_called(account)} is held: {why.rstrip('.')}. See: stripe-meter held"
                self._tell(StripeError(said))

    def _rest_of(self, account: str, event_name: str | None, now: int) -> _Rest | None:
        rest = self._rests.get((account, event_name))
        return rest if rest is not None and now < rest.until <= now + LONGEST_REST else None

    def _is_at_rest(self, account: str, meters: Mapping[str, Waiting], now: int) -> bool:
        """Whether all of an account waits. What is new is held with the rest, unless somebody wants a new look."""
        rest = self._rest_of(account, None, now)
        if rest is None or rest.why is None:
            return rest is not None
        if any(meter.again for meter in meters.values()):
            self._rests.pop((account, None))
            return False
        with self._ledger.deliver_lane().transaction() as connection:
            resolving.hold_usage(connection, (account, None), rest.why, now, rest.until)
        return True

    def _settle(self, account: str, meters: Mapping[str, Waiting], now: int) -> bool:
        """Hold the usage of meters that would bill it wrongly, and release that of the others.

        False, with nothing done, where Stripe must be asked first.
        """
        known = self._gateway.known_meters(account)
        if known is ...:
            return False
        wrong = {} if known is None else {
            name: problem for name in meters if (problem := problem_with(name, known.get(name))) is not None
        }  # fmt: skip
        rests = {name: self._rest_of(account, name, now) for name in wrong if not meters[name].again}
        if account not in self._listed and not all(rests.get(name) for name in wrong):
            return False
        for name in [name for name, meter in meters.items() if name not in wrong]:
            self._rests.pop((account, name), None)
            if meters[name].is_due:
                with self._ledger.deliver_lane().transaction() as connection:
                    resolving.release(connection, account, name, now)
        for name, problem in wrong.items():
            self._hold_meter((account, name), problem, now, rests.get(name))
        return True

    def _hold_meter(self, meter: tuple[str, str], problem: str, now: int, rest: _Rest | None) -> None:
        with self._ledger.deliver_lane().transaction() as connection:
            held, due = resolving.hold_usage(connection, meter, problem, now, rest and rest.until)
        before = self._rests.get(meter)
        self._rests[meter] = _Rest(due, problem)
        if held and (before is None or before.why != problem):
            self._tell(StripeError(f"{counted(held, 'reading')} held: {problem}."))

    def _check_account(self) -> None:
        """Pin the ledger to the key's mode and account. A key that may not read its account does not pin that."""
        pin(self._ledger.deliver_lane(), self._ledger.now(), is_test=self._gateway.is_test)
        account = self._gateway.account_id()
        if account is not None:
            with self._ledger.deliver_lane().transaction() as connection:
                refuse_foreign(first_note(connection, ACCOUNT, account, self._ledger.now()), account)
        self._is_ours = True


def refuse_foreign(pinned: str | None, account: str | None) -> None:
    """``ForeignLedgerError`` where a ledger that is pinned to one account is given a key of another, as far as both are
    known."""
    if None not in (pinned, account) and pinned != account:
        raise ForeignLedgerError(
            f"The ledger holds usage of the Stripe account {pinned}, but the key belongs to {account}; nothing is "
            "sent. Use that account's key, or give this account a ledger of its own."
        )


def _called(account: str) -> str:
    return f"the account {account}" if account else "our own account"


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
