"""The courier: resolve, seal, send, settle, again and again, until nothing waits.

The ledger is the queue. The courier's thread owns nothing but a wake-up flag and the requests in flight; whatever
happens to it, the ledger knows what to do next.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from cachetools import TTLCache

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.core.states import EventState, Move, Outcome
from langchain_stripe_meter.errors import MeteringError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import outbox
from langchain_stripe_meter.ledger.outbox import Claimed
from langchain_stripe_meter.ledger.store import Ledger

logger = logging.getLogger("langchain_stripe_meter")

IDLE_SECONDS = 5.0
"""How often a courier with nothing to do looks whether another process has recorded something."""
PAUSE_SECONDS = 30
"""How long everything rests after Stripe refused the key, before one event tries it again."""
RESOLVE_PAUSE_SECONDS = 5
"""How long lookups rest after one that Stripe did not answer."""
CUSTOMERS_CACHED_SECONDS = 300
PAUSED = "paused"
"""The ledger's note that says why sending is paused."""

OnError = Callable[[MeteringError], None]


class Courier:
    """Delivers what the ledger holds. ``wake`` starts its thread when there is work; after a fork it starts anew.

    ``concurrency`` is how many requests are in flight at once; one customer and meter never has more than one.
    """

    def __init__(
        self,
        ledger: Ledger,
        gateway: Gateway,
        *,
        concurrency: int = 16,
        on_error: OnError | None = None,
    ) -> None:
        self.ledger = ledger
        self.gateway = gateway
        self._concurrency = concurrency
        self._on_error = on_error or (lambda _error: None)
        self._customers: TTLCache[Reference, list[str]] = TTLCache(10_000, CUSTOMERS_CACHED_SECONDS)
        self.delivered = 0
        self.rejected = 0
        self._reset()

    def _reset(self) -> None:
        """Everything that belongs to this process alone."""
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._work: SimpleQueue[Claimed | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Claimed, Outcome] | None] = SimpleQueue()
        self._senders = 0
        self._in_flight = 0
        self._paused_until = 0
        self._resolve_after = 0

    def wake(self) -> None:
        """There may be something to deliver: start the thread if need be."""
        if self._pid != os.getpid():
            self._reset()
        self._wake.set()
        self._results.put(None)  # it may be waiting for an answer
        if self._thread is None or not self._thread.is_alive():
            self._start()

    def _start(self) -> None:
        with self._starting:
            if self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            thread = threading.Thread(target=self._run, name="stripe-meter-courier", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down: the ledger keeps it for the next start
                logger.info("stripe-meter: no courier can start during shutdown; the ledger keeps what is pending")
                return
            self._thread = thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            try:
                moved = self.turn()
            except Exception as error:  # noqa: BLE001 - the courier must outlive any fault; it is reported
                self._report(error)
                self._closing.wait(1)
                continue
            if not moved and not self._in_flight:
                self._rest()
        self._drain_in_flight()

    def _rest(self) -> None:
        """Wait until woken, or until something is due, without the ledger being asked in vain."""
        now = self.ledger.now()
        with self.ledger.deliver_lane().lock:
            due = outbox.next_due(self.ledger.deliver_lane().connection)
        wait = IDLE_SECONDS if due is None else min(max(due - now, 0.05), IDLE_SECONDS)
        if self._paused_until > now:
            wait = min(self._paused_until - now, IDLE_SECONDS)
        self._wake.wait(wait)

    def turn(self) -> int:
        """One round: settle what came back, look up who is unknown, seal, claim and send. Returns what moved."""
        results = self._collect()
        now = self.ledger.now()
        moved = len(results) + self._resolve(now)
        slots = self._slots(now)
        self._check_meters(now)
        with self.ledger.deliver_lane().transaction() as connection:
            states = outbox.finish(connection, results, now)
            moved += outbox.reap(connection, now)
            moved += outbox.seal(connection, now)
            claimed = outbox.claim(connection, slots, now) if slots > 0 else []
        self._account(results, states)
        for item in claimed:
            self._dispatch(item)
        return moved + len(claimed)

    def _slots(self, now: int) -> int:
        """How many requests may start: none during a pause, and one to try the key after it."""
        if now < self._paused_until:
            return 0
        if self._paused_until:
            return 1 - self._in_flight
        return self._concurrency - self._in_flight

    def _collect(self) -> list[tuple[Claimed, Outcome]]:
        """Answers that have arrived; waits for the first one while requests are in flight."""
        results: list[tuple[Claimed, Outcome]] = []
        block = self._in_flight > 0 and not self._wake.is_set()
        while True:
            try:
                item = self._results.get(block=block, timeout=0.5 if block else None)
            except Empty:
                break
            block = False
            if item is not None:
                results.append(item)
        self._in_flight -= len(results)
        return results

    def _dispatch(self, claimed: Claimed) -> None:
        self._in_flight += 1
        if self._senders < min(self._in_flight, self._concurrency):
            self._senders += 1
            threading.Thread(target=self._send_loop, name="stripe-meter-sender", daemon=True).start()
        self._work.put(claimed)

    def _send_loop(self) -> None:
        work, results = self._work, self._results
        while (claimed := work.get()) is not None:
            results.put((claimed, self.gateway.send(claimed.event, claimed.attempt.attempts)))

    def _account(self, results: list[tuple[Claimed, Outcome]], states: list[EventState | None]) -> None:
        """Count what became of the attempts, and pause or resume as the key was refused or accepted."""
        for (claimed, outcome), state in zip(results, states, strict=True):
            self.delivered += state is EventState.DELIVERED
            if outcome.move is Move.UNAUTHORISED:
                self._pause(outcome.message)
            elif self._paused_until and outcome.move in (Move.ACCEPTED, Move.DUPLICATE, Move.REFUSED):
                self._paused_until = 0
                self.ledger.set_note(PAUSED, None)
            if state in (EventState.REJECTED, EventState.DOUBTFUL):
                self.rejected += state is EventState.REJECTED
                self._report(StripeError(f"Meter event {claimed.event.identifier} is {state}: {outcome.message}"))

    def _pause(self, message: str) -> None:
        first = not self._paused_until
        self._paused_until = self.ledger.now() + PAUSE_SECONDS
        self.ledger.set_note(PAUSED, message)
        if first:
            self._report(
                StripeError(f"Stripe refused the key; sending is paused, nothing is lost. {message}. Check the key.")
            )

    def _resolve(self, now: int) -> int:
        """Look up whom readings name by e-mail, name or phone; hold what Stripe does not know exactly once."""
        if now < max(self._paused_until, self._resolve_after):
            return 0
        with self.ledger.deliver_lane().transaction() as connection:
            references = outbox.unresolved(connection, now)
        moved = 0
        for reference in references:
            try:
                found = self._customers.get(reference) or self.gateway.find_customers(reference)
            except StripeError as error:  # those whose customer is known must not wait for this
                self._resolve_after = now + RESOLVE_PAUSE_SECONDS
                self._report(error)
                break
            if len(found) == 1:
                self._customers[reference] = found
            with self.ledger.deliver_lane().transaction() as connection:
                if len(found) == 1:
                    moved += outbox.resolve(connection, reference, found[0])
                else:
                    moved += outbox.hold(connection, reference, _why_held(reference, found), now)
        return moved

    def _check_meters(self, now: int) -> None:
        """Hold the readings of a meter that Stripe would add up wrongly, or does not have."""
        with self.ledger.deliver_lane().transaction() as connection:
            outbox.release_held(connection, now)
            names = outbox.open_meters(connection)
        for name in names:
            info = self.gateway.meter(name)
            problem = info.problem if info else None
            if info is None and self.gateway.can_read_meters():
                problem = f"Stripe has no meter with the event name {name!r}; create it, or correct the name"
            if problem is None:
                continue
            with self.ledger.deliver_lane().transaction() as connection:
                held = outbox.hold_meter(connection, name, problem, now)
            if held:
                self._report(StripeError(f"{held} readings are held: {problem}."))

    def _report(self, error: Exception) -> None:
        if not isinstance(error, MeteringError):
            logger.warning("stripe-meter: the courier failed: %s", type(error).__name__, exc_info=error)
            return
        logger.warning("stripe-meter: %s", error)
        try:
            self._on_error(error)
        except Exception as own:  # noqa: BLE001 - the caller's callback must not stop delivery
            logger.warning("stripe-meter: on_error itself failed: %s", type(own).__name__)

    @property
    def is_running(self) -> bool:
        """Whether this process's courier has been started and still runs."""
        return self._pid == os.getpid() and self._thread is not None and self._thread.is_alive()

    def close(self, timeout: float) -> None:
        """Stop after what is in flight, or when ``timeout`` seconds are up."""
        self._closing.set()
        self._wake.set()
        self._results.put(None)
        thread = self._thread
        if thread is not None and self._pid == os.getpid() and thread is not threading.current_thread():
            thread.join(max(timeout, 0))

    def _drain_in_flight(self) -> None:
        """Settle what was being sent when the courier was told to stop."""
        deadline = time.monotonic() + 5
        try:
            while self._in_flight and time.monotonic() < deadline:
                self._wake.clear()
                results = self._collect()
                with self.ledger.deliver_lane().transaction() as connection:
                    states = outbox.finish(connection, results, self.ledger.now())
                self._account(results, states)
        except MeteringError as error:
            self._report(error)
        for _ in range(self._senders):
            self._work.put(None)


def _why_held(reference: Reference, found: list[str]) -> str:
    if not found:
        return f"Stripe has no customer with this {reference.by}"
    return f"Stripe has {len(found)} customers with this {reference.by}: {', '.join(sorted(found)[:10])}"

