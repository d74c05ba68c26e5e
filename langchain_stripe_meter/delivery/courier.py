"""The courier: resolve, seal, send, settle, again and again, until nothing waits. The ledger is the queue: the thread
owns nothing but a wake-up flag and the requests in flight.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from cachetools import LRUCache

from langchain_stripe_meter.core.states import EventState, Move, Outcome
from langchain_stripe_meter.delivery.guard import Clocks, Guard, Listing, NotStartedError, Pace
from langchain_stripe_meter.delivery.lookups import Answer, Lookups, unnamed
from langchain_stripe_meter.errors import MeteringError, OnError, StripeError, logger, place_of
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import outbox, recalling, sealing
from langchain_stripe_meter.ledger.outbox import Claimed, Line
from langchain_stripe_meter.ledger.resolving import Unknown
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.reentry import Bell, inside
from langchain_stripe_meter.telling import tell

IDLE_SECONDS = 5.0
"""How often a courier with nothing to do looks whether another process has recorded something."""
BLOCKED_SECONDS = 0.2
"""How often it looks at what is due and may not be sent yet: another process sends for the customer, say."""
GONE_REMEMBERED = 1000
"""Customers and meters of which it was told that Stripe does not have them."""
CHORES_SECONDS = 60
"""How often what is seldom needed is looked at: doubtful events, ages."""
LAST_SECONDS = 1.0
"""How much longer than its deadline ``close`` waits for the ledger to be told what was still in flight."""

Chore = Callable[[int], None]
"""Something that is done every minute while there is a courier, given the time; it may raise. One of the ``chores`` may
ask Stripe, and rests while nothing may be sent; one of the ``watches`` looks at the ledger only, and never rests."""
Job = Claimed | Unknown | Listing
Result = tuple[Claimed, Outcome] | tuple[Unknown | Listing, Answer | StripeError | None]


class Courier:
    """Delivers what the ledger holds. ``wake`` starts its thread when there is work; a forked child gets its own.

    ``concurrency`` is how many events are in flight at once, one for each customer and meter; fewer, down to one, while
    Stripe refuses or does not answer. ``roll_up`` makes one event of what a customer used of a meter within so many
    seconds. ``create_missing`` makes a customer of somebody whom Stripe does not know.
    """

    def __init__(
        self,
        ledger: Ledger,
        gateway: Gateway,
        *,
        concurrency: int = 16,
        on_error: OnError | None = None,
        roll_up: int | None = None,
        chores: Sequence[Chore] = (),
        watches: Sequence[Chore] = (),
        create_missing: bool = False,
    ) -> None:
        self.ledger = ledger
        self.gateway = gateway
        self._concurrency = concurrency
        self._roll_up = roll_up
        self._chores = chores
        self._watches = watches
        self._create_missing = create_missing
        self._on_error = on_error
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Everything that belongs to this process alone."""
        self.delivered = self.rejected = 0
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._told_foreign = False
        self._wake = Bell()
        self._closing = threading.Event()
        self._deadline = 0.0
        self._work: SimpleQueue[Job | None] = SimpleQueue()
        self._results: SimpleQueue[Result | None] = SimpleQueue()
        self._senders = 0
        self._sending: dict[str, Claimed] = {}
        self._sent: list[tuple[Claimed, Outcome]] = []
        self._found: list[tuple[Unknown, Answer]] = []
        self._lookups = Lookups(self.ledger, create_missing=self._create_missing)
        self._round = outbox.Round()
        self._pace = Pace(self._concurrency)
        self._guard = Guard(self.ledger, self.gateway, self._pace, self._report)
        self._chores_after = 0
        self._watches_after = 0
        self._clocks = Clocks(self.ledger, self._report)
        self._gone: LRUCache[Line, bool] = LRUCache(GONE_REMEMBERED)

    @property
    def in_flight(self) -> int:
        """How many requests wait for Stripe's answer."""
        return len(self._sending) + len(self._lookups.asking) + len(self._guard.listing)

    def wake(self) -> None:
        """There may be something to deliver: start the thread if need be."""
        if self._closing.is_set():
            return
        self._nudge()
        if self._thread is None or not self._thread.is_alive():
            self._start()

    def _nudge(self) -> None:
        if not self._wake.is_set():  # else the next turn has not begun, and will see what is new
            self._wake.set()
            self._results.put(None)  # it may be waiting for an answer

    def _start(self) -> None:
        with inside(), self._starting:
            if self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            # Known before it starts: Ctrl-C may strike while it does, and then another may be started in its place.
            self._thread = threading.Thread(target=self._run, name="stripe-meter-courier", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is shutting down: the ledger keeps it for the next start
                self._thread = None
                logger.info("stripe-meter: no courier can start during shutdown; the ledger keeps what is pending")

    def _run(self) -> None:
        with inside(), self._starting:
            if self._thread is not threading.current_thread():
                return
        while not self._closing.is_set():
            self._wake.clear()
            try:
                if not self.turn() and not self.in_flight:
                    self._rest()
            except Exception as error:  # noqa: BLE001 - the courier must outlive any fault; it is reported
                self._report(error)
                self._closing.wait(1)
        self._end()

    def _end(self) -> None:
        try:
            self._finish()
            self._guard.end()
        except Exception as error:  # noqa: BLE001 - the leases of what could not be settled run out by themselves
            self._report(error)
        for _ in range(self._senders):
            self._work.put(None)
        self._senders = 0

    def _rest(self) -> None:
        """Wait until woken, or until something is due, without the ledger being asked in vain."""
        now = self.ledger.now()
        with self.ledger.deliver_lane().transaction(shared=True) as connection:
            due = outbox.next_due(connection)
        wait = IDLE_SECONDS if due is None else min(max(due - now, BLOCKED_SECONDS), IDLE_SECONDS)
        if self._pace.is_quiet(now):
            wait = min(self._pace.quiet_until - now, IDLE_SECONDS)
        self._wake.wait(wait)

    def turn(self) -> int:
        """One round: settle what came back, look up who is unknown, seal, claim and send. Returns what moved."""
        self._collect(0.5)
        moved = self._settle()
        now = self.ledger.now()
        checked = self._guard.check(now)
        moved += self._look_up(now) if checked else 0
        ready = self._check_meters(now) if checked else []
        slots = self._pace.slots(len(self._sending), now)
        with self.ledger.deliver_lane().transaction(shared=True) as connection:
            moved += outbox.reap(connection, now)
            recalling.recall(connection, now)
            moved += sealing.seal(connection, now, self._roll_up, ready) if checked else 0
            resting: list[Line | str] = [*self._pace.at_rest(now), *self._guard.closed(now)]
            claimed = outbox.claim(connection, slots, now, resting, self._round)
            if claimed:
                self._guard.sends()
        for item in claimed:
            self._sending[item.lease] = item
            self._dispatch(item)
        if _is_due(self._watches_after, now):  # also while Stripe cannot be reached: that is when usage grows old
            self._watches_after = now + CHORES_SECONDS
            self._do(self._watches, now)
        if checked and _is_due(self._chores_after, now):
            self._chores_after = now + CHORES_SECONDS
            self._do(self._chores, now)
        return moved + len(claimed)

    def _do(self, chores: Sequence[Chore], now: int) -> None:
        for chore in chores:
            try:
                chore(now)
            except Exception as error:  # noqa: BLE001 - the others, and delivery, go on
                self._report(error)

    def _collect(self, patience: float) -> None:
        """Take in the answers that have arrived; wait for the first one while requests are in flight."""
        block = self.in_flight > 0 and not self._wake.is_set()
        while True:
            try:
                result = self._results.get(block=block, timeout=patience if block else None)
            except Empty:
                return
            block = False
            if result is not None:
                self._take(result)

    def _take(self, result: Result) -> None:
        asked, answer = result
        if isinstance(asked, Claimed):
            assert isinstance(answer, Outcome)  # noqa: S101 - as Result says
            self._sending.pop(asked.lease, None)
            self._sent.append((asked, answer))
            return
        now = self.ledger.now()
        if isinstance(asked, Listing):
            assert not isinstance(answer, Answer | Outcome)  # noqa: S101 - as Result says
            self._guard.listed(asked.account, answer, now)
            return
        self._lookups.asking.discard(asked)
        if isinstance(answer, Answer):
            self._found.append((asked, answer))
        elif isinstance(answer, StripeError):
            said = self.gateway.outcome_of(answer, asked.account)
            if said.move is Move.NO_ACCESS:
                self._guard.refused(asked.account, why := unnamed(said.message, asked))
                self._found.append((asked, Answer([], why)))
            else:
                self._guard.unanswered(str(answer), now)
                if self._lookups.failed(asked, now):
                    self._report(StripeError(str(answer)))  # without its cause: Stripe's words may quote the person

    def _settle(self) -> int:
        """Store what the answers came to. They are kept until the ledger has them: it may be busy, or full."""
        if not self._sent and not self._found:
            return 0
        now, moved = self.ledger.now(), len(self._sent)
        lane = self.ledger.deliver_lane()
        with inside(), lane.lock:  # whoever counts what is pending under this lock sees these counts too
            with lane.transaction(shared=not self._found) as connection:
                states = outbox.finish(connection, self._sent, now)
                moved += sum(self._lookups.settle(connection, *answer, now) for answer in self._found)
            sent, self._sent, self._found = self._sent, [], []
            self.delivered += states.count(EventState.DELIVERED)
            self.rejected += states.count(EventState.REJECTED)
        for (claimed, outcome), state in zip(sent, states, strict=True):
            self._account(claimed, outcome, state, now)
        unanswered = [outcome.message for _, outcome in sent if outcome.move in (Move.UNKNOWN, Move.REFUSED_FOR_NOW)]
        if unanswered and self._pace.is_quiet(now) and not self._closing.is_set():
            self._guard.unanswered(unanswered[-1], now)
        return moved

    def _dispatch(self, job: Job) -> None:
        if self._senders < self.in_flight:
            try:
                threading.Thread(target=self._send_loop, name="stripe-meter-sender", daemon=True).start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                if not self._senders:
                    self._results.put(_not_done(job))
                    return
            else:
                self._senders += 1
        self._work.put(job)

    def _send_loop(self) -> None:
        work, results = self._work, self._results
        while (job := work.get()) is not None:
            results.put(self._ask_stripe(job))

    def _ask_stripe(self, job: Job) -> Result:
        if isinstance(job, Claimed):
            attempt = job.attempt
            try:
                return job, self.gateway.send(
                    job.event,
                    f"{attempt.attempts}-{secrets.token_hex(8)}",  # no other ledger's, even for the same identifier
                    # Were this process stopped meanwhile, another may have sent it long ago, and Stripe have forgotten.
                    lambda: outbox.is_over(attempt.sent_at + outbox.LEASE_SECONDS, self.ledger.now() + 1),
                )
            except Exception as error:  # noqa: BLE001 - a bug, but the event must not be lost over it
                return job, Outcome(Move.UNKNOWN, type(error).__name__)
        try:
            if isinstance(job, Unknown):
                return job, self._lookups.ask(self.gateway, job)
            self.gateway.load_meters(job.account)
        except StripeError as error:
            return job, error
        except Exception as error:  # noqa: BLE001 - as above
            what = "A customer could not be looked up" if isinstance(job, Unknown) else "Meters could not be listed"
            return job, StripeError(f"{what}: {type(error).__name__}.")
        return job, None

    def _account(self, claimed: Claimed, outcome: Outcome, state: EventState | None, now: int) -> None:
        """Slow down, pause or resume as Stripe answered; tell what needs a person."""
        if outcome.move in (Move.ACCEPTED, Move.DUPLICATE, Move.REFUSED, Move.UNSEAL):
            self._pace.faster()
            self._guard.opened(claimed.event.account)
        elif outcome.move is Move.UNAUTHORISED:
            self._guard.pause(outcome.message, now)
        elif outcome.move is Move.NO_ACCESS:
            self._guard.refused(claimed.event.account, outcome.message)
        else:
            self._pace.slower(claimed.line, outcome.retry_after, now)
        if outcome.move is Move.UNSEAL:
            self._lookups.forget(claimed.event.customer)
        if outcome.date is not None:
            self._clocks.compare(outcome.date, claimed.attempt.sent_at, now)
        if state in (EventState.REJECTED, EventState.DOUBTFUL):
            self._report(StripeError(f"Meter event {claimed.event.identifier} is {state}: {outcome.message}"))
        if outcome.move is Move.DUPLICATE and state is EventState.DELIVERED and claimed.attempt.is_first:
            self._tell_foreign(claimed.event.identifier)
        if state is EventState.WITHDRAWN and claimed.line not in self._gone:  # it is tried again every hour
            self._gone[claimed.line] = True
            what = f"Usage of {claimed.event.customer} on {claimed.event.event_name}"
            self._report(StripeError(f"{what} is held: {outcome.message.rstrip('.')}. See: stripe-meter held"))

    def _tell_foreign(self, identifier: str) -> None:
        """Told once, for all events of a database that was restored are alike; all of them are in the log's details."""
        said = f"Stripe had a meter event {identifier} already, which this ledger never sent."
        if self._told_foreign:
            logger.info("stripe-meter: %s", said)
            return
        self._told_foreign = True
        self._report(StripeError(
            f"{said} It counts as delivered, but is billed as whoever sent it said. If this ledger was restored from a "
            "backup, that was itself: run stripe-meter ledger restored. If two handlers with a ledger each meter the "
            "same runs, each is billed once: attach one. If another application sent it for something else, correct() "
            "the customer's total, and give each ids of its own. Further ones are only logged (INFO)."
        ))  # fmt: skip

    def _look_up(self, now: int) -> int:
        """Settle whom readings name by e-mail, name or phone, as far as it is known; ask Stripe for the others."""
        moved, asked = self._lookups.next(now, self._guard.closed(now))
        for one in asked:
            self._dispatch(one)
        return moved

    def _check_meters(self, now: int) -> list[str]:
        ready, questions = self._guard.check_meters(now)
        for one in questions:
            self._dispatch(one)
        return ready

    def _report(self, error: Exception) -> None:
        if not isinstance(error, MeteringError):
            logger.warning("stripe-meter: the courier failed: %s at %s", type(error).__name__, place_of(error))
            return
        tell(self._on_error, error)

    @property
    def is_running(self) -> bool:
        """Whether this process's courier has been started and still runs."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, timeout: float) -> None:
        """Stop after what is in flight, or when ``timeout`` seconds are up; then its outcome is stored as unknown."""
        timeout = max(timeout, 0)
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._nudge()
        thread = self._thread
        if thread is None:
            self._end()
        elif thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout + LAST_SECONDS)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, and not opened again since."""
        return self._closing.is_set()

    def reopen(self) -> None:
        """Deliver what is pending, also after a ``close``."""
        self._closing.clear()
        self.wake()

    def _finish(self) -> None:
        """Settle what was being sent when the courier was told to stop."""
        while self._sending and (left := self._deadline - time.monotonic()) > 0:
            self._wake.clear()
            self._collect(left)
            self._settle()
        lost = Outcome(Move.UNKNOWN, "the courier was closed before Stripe answered")
        self._sent += [(claimed, lost) for claimed in self._sending.values()]
        self._sending.clear()
        self._settle()


def _is_due(after: int, now: int) -> bool:
    """Whether it is time again; also where that was set by a clock that was ahead."""
    return not after - CHORES_SECONDS <= now < after


def _not_done(job: Job) -> Result:
    why = "no thread could be started for the request"
    return (job, Outcome(Move.REFUSED_FOR_NOW, why)) if isinstance(job, Claimed) else (job, NotStartedError(why))
