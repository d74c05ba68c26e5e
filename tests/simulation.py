"""Weeks of a ledger, its couriers and Stripe, played out from a seed: outages, lost answers, kills, clocks that jump.

The ledger, the couriers, the gateway, the Stripe client and the sandbox's rules are the real ones. Only time is moved
by hand, requests reach the sandbox without a socket (unless ``over_http``), and a courier sends in its own thread, so
that a seed always plays the same.
"""

from __future__ import annotations

import atexit
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any

import stripe
from cachetools import TTLCache
from conftest import assert_invariant
from requests.structures import CaseInsensitiveDict
from sqlalchemy import select

from langchain_stripe_meter.audit.chores import Doubts
from langchain_stripe_meter.core.doubts import LOOK_AGAIN, SUMS_LAG
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import ACCOUNTS_CACHED, METERS_CACHED_SECONDS, Gateway
from langchain_stripe_meter.ledger import acts, outbox, sealing, views
from langchain_stripe_meter.ledger.doubts import doubtful, settle_doubt
from langchain_stripe_meter.ledger.outbox import MeterEvent
from langchain_stripe_meter.ledger.schema import events, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import (
    Fault,
    RecordedRequest,
    StripeSandbox,
    broken_body,
    drop_answer,
    drop_request,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)

START = 1_780_000_000
MINUTE, HOUR = 60, 3600
METERS = ("ai_tokens", "ai_messages")
CUSTOMERS = ("cus_0", "cus_1", "cus_2", "cus_3")
MORTAL = "cus_3"
"""The customer that may be deleted."""
EMAIL = "ann@example.com"
EVENTS = "/v1/billing/meter_events"
BASE = "http://sandbox"
NOTHING = Fault()

REFUSED = (refuse(503), drop_request(), server_error())
TAKEN = (drop_answer(), broken_body(), server_error_after_accept())
WEATHERS: dict[str, tuple[int, tuple[Fault, ...]]] = {  # hours at most, and what meter events meet
    "calm": (20, (NOTHING,)),
    "showers": (20, (NOTHING, NOTHING, *REFUSED, *TAKEN, rate_limited(7))),
    "lost answers": (30, TAKEN),
    "outage": (40, REFUSED),
    "doubtful outage": (50, (*REFUSED * 8, *TAKEN)),
    "rush": (5, (rate_limited(30), rate_limited(), NOTHING)),
    "no connection": (30, (NOTHING,)),
    "revoked": (24, (NOTHING,)),
}
NEXT = {"outage": "lost answers", "lost answers": "outage"}
"""What makes the last attempt the one that Stripe took, and the first one."""


class Killed(BaseException):
    """The courier's process dies here."""


class Sandbox(StripeSandbox):
    """A sandbox whose clock moves only when it is told to."""

    time = START

    def now(self) -> int:
        return self.time


class InProcess(stripe.HTTPClient):
    """Carries the client's requests to the sandbox without a socket. ``fuse`` requests from now, the process dies."""

    name = "in-process"

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__()
        self.sandbox = sandbox
        self.is_down = False
        self.fuse: tuple[int, bool] | None = None

    def request(self, method: str, url: str, headers: Any, post_data: Any = None, *, _usage: Any = None) -> Any:
        if self.is_down:
            raise stripe.APIConnectionError("refused") from ConnectionRefusedError()
        burnt = self._burn()
        if burnt and not self.dies_after_sending:
            raise Killed
        lower = {name.lower(): str(value) for name, value in headers.items()}
        target = url.removeprefix(BASE)
        answer = self.sandbox._desk.answer(method.upper(), target, lower, (post_data or "").encode())
        if burnt:
            raise Killed
        if answer is None:
            raise stripe.APIConnectionError("closed")
        return answer.body.decode(), answer.status, CaseInsensitiveDict(answer.headers)

    dies_after_sending = False

    def _burn(self) -> bool:
        if self.fuse is None:
            return False
        left, self.dies_after_sending = self.fuse
        self.fuse = (left - 1, self.dies_after_sending) if left else None
        return not left

    def close(self) -> None:
        """There is nothing to close."""


def gateway_to(http: InProcess) -> Gateway:
    """The real gateway and client, without a socket. What it remembers grows old by the sandbox's clock."""
    sandbox = http.sandbox
    addresses: Any = {"api": BASE, "meter_events": BASE}
    client = stripe.StripeClient(sandbox.api_key, max_network_retries=0, http_client=http, base_addresses=addresses)
    gateway = Gateway(client)
    gateway._meters = TTLCache(ACCOUNTS_CACHED, METERS_CACHED_SECONDS, lambda: sandbox.time)
    return gateway


class SteadyCourier(Courier):
    """Sends in its own thread, so that a seed always plays the same."""

    def _dispatch(self, job: Any) -> None:
        self._results.put(self._ask_stripe(job))


@dataclass
class Tally:
    """What happened in one or several worlds."""

    seeds: int = 0
    recorded: int = 0
    requests: int = 0
    kills: int = 0
    doubts: int = 0
    settled_by_themselves: int = 0
    needed_a_person: int = 0
    rejected: int = 0
    amount_for_a_person: Decimal = Decimal(0)

    def __iadd__(self, other: Tally) -> Tally:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        return self


@lru_cache
def empty_ledger() -> str:
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/empty.db"
    ledger = Ledger(f"sqlite:///{path}")
    ledger.deliver_lane()
    ledger.close()
    return path


class World:
    """One seed's ledger, couriers and Stripe."""

    def __init__(self, seed: int, folder: Path, *, over_http: bool = False) -> None:
        self.chance = Random(seed)
        self.over_http = over_http
        self.sandbox = Sandbox(summary_lag=0)
        for meter in METERS:
            self.sandbox.create_meter(meter)
        for customer in CUSTOMERS:
            self.sandbox.create_customer(id=customer)
        self.sandbox.create_customer(id="cus_ann", email=EMAIL)
        self.sandbox._desk.plan = self  # type: ignore[assignment]  # whose take() below decides what requests meet
        self.faults: tuple[Fault, ...] = (NOTHING,)
        self.weather, self.weather_until, self.reads_fail = "calm", START, False
        self.jumps = self.chance.random() < 0.4
        self.skew = 0 if self.chance.random() < 0.5 else self.chance.randint(-1800, 1800)
        self.roll_up = 60 if self.chance.random() < 0.4 else None
        self.foreign = self.chance.random() < 0.1
        self.tally = Tally(seeds=1)
        self.doubted: set[str] = set()
        path = folder / f"{seed}.db"
        shutil.copy(empty_ledger(), path)
        self.ledger = Ledger(f"sqlite:///{path}", clock=lambda: self.sandbox.time + self.skew, synchronous="NORMAL")
        self.boots = 0
        self.couriers: list[SimpleNamespace] = []

    # -- Stripe

    def take(self, request: RecordedRequest) -> Fault:
        """What a request meets: the sandbox asks."""
        self.tally.requests += 1
        if request.path == EVENTS:
            return self.chance.choice(self.faults)
        return self.chance.choice((NOTHING, refuse(503), drop_answer())) if self.reads_fail else NOTHING

    def change_weather(self) -> None:
        if self.sandbox.time < self.weather_until:
            return
        follows = NEXT.get(self.weather)
        common = ("outage", "lost answers", "doubtful outage")
        drawn = self.chance.choice((*WEATHERS, *common))
        self.set_weather(follows if follows and self.chance.random() < 0.6 else drawn)

    def set_weather(self, weather: str) -> None:
        self.weather = weather
        hours, self.faults = WEATHERS[weather]
        self.reads_fail = weather != "calm" and self.chance.random() < 0.3
        self.weather_until = self.sandbox.time + self.chance.randint(HOUR // 6, hours * HOUR)
        key = self.sandbox.api_key
        self.sandbox.revoke(key) if weather == "revoked" else self.sandbox.allow(key)
        is_down = weather == "no connection"
        if self.over_http:
            self.sandbox.stop() if is_down else self.sandbox.start()
        for courier in self.couriers:
            courier.http.is_down = is_down
        # Within what is promised: a sum shows an event when the second look is taken at the latest, by a clock that
        # may have jumped by an hour.
        most = SUMS_LAG - HOUR - 1 if self.jumps else SUMS_LAG + LOOK_AGAIN - 1
        self.sandbox.summary_lag = self.chance.choice([0, HOUR // 2, most, most])

    # -- couriers

    def boot(self) -> None:
        """A new process with a courier, on this machine or on another."""
        self.boots += 1
        http = InProcess(self.sandbox)
        http.is_down = self.weather == "no connection"
        gateway = Gateway(self.sandbox.api_key, api_base=self.sandbox.url) if self.over_http else gateway_to(http)
        gateway._meters = TTLCache(ACCOUNTS_CACHED, METERS_CACHED_SECONDS, lambda: self.sandbox.time)
        chores = [Doubts(self.ledger, gateway)]
        errors: list[MeteringError] = []
        courier = SteadyCourier(
            self.ledger, gateway, concurrency=8, roll_up=self.roll_up, on_error=errors.append, chores=chores
        )
        host = self.chance.choice(["host-a", "host-a", "host-b"])
        self.couriers.append(SimpleNamespace(courier=courier, http=http, host=host, boot=f"{self.boots:x}"))

    def turn(self, process: SimpleNamespace) -> bool:
        """One turn of a courier, as its own process; False if nothing moved."""
        with as_process(process.host, process.boot):
            try:
                return bool(process.courier.turn()) or process.courier.in_flight > 0
            except Killed:
                self.bury(process)
                return False

    def bury(self, process: SimpleNamespace) -> None:
        """A killed process leaves nothing but the ledger."""
        self.tally.kills += 1
        process.courier.gateway.close()
        self.couriers.remove(process)
        if self.chance.random() < 0.2:
            self.ledger.close()
        self.boot()

    def deliver(self, most: int = 10) -> None:
        for process in list(self.couriers):
            turns = 0
            while turns < most and process in self.couriers and self.turn(process):
                turns += 1
        self.doubted |= {row.identifier for row in doubtful(self.ledger)}

    # -- what happens

    def record(self) -> None:
        """Some usage, often several times in one minute, with amounts so small that they are easily confused."""
        now = self.ledger.now() - (self.chance.randint(0, 3 * 24 * HOUR) if self.chance.random() < 0.2 else 0)
        customer, meter = self.chance.choice(CUSTOMERS), self.chance.choice(METERS)
        entries = []
        for _ in range(self.chance.choice([1, 1, 2, 3])):
            self.tally.recorded += 1
            facts: dict[str, Any] = {"state": ReadingState.RESOLVED, "customer": customer}
            if self.chance.random() < 0.1:
                facts = {"state": ReadingState.RECORDED, "reference": Reference("email", EMAIL)}
            value = self.chance.choice([1, 1, 1, 2, 3, Decimal("0.25")])
            if self.chance.random() < 0.03:
                value = -value
            entries.append(Entry(f"run-{self.tally.recorded}", meter, Decimal(value), now, **facts))
        self.ledger.record(entries)

    def step(self) -> None:
        """Something happens, couriers work, and time goes by."""
        self.change_weather()
        roll = self.chance.random()
        if roll < 0.6:
            self.record()
        elif roll < 0.64:
            process = self.chance.choice(self.couriers)
            process.http.fuse = (self.chance.randint(0, 3), self.chance.random() < 0.5)
        elif roll < 0.66:
            self.bury(self.chance.choice(self.couriers))
        elif roll < 0.68:
            sealing.retry(self.ledger)
        elif roll < 0.69 and self.sandbox._account.customers.exists(MORTAL):
            self.sandbox.delete_customer(MORTAL)
        elif roll < 0.71:
            self.switch_meter()
        elif roll < 0.74 and self.foreign and self.weather == "calm":
            self.use_elsewhere()
        if self.jumps and self.chance.random() < 0.1:
            self.skew = self.chance.randint(-1800, 1800)
        self.deliver(self.chance.choice([1, 3, 8]))
        self.sandbox.time += self.chance.choice([2, 10 * MINUTE, HOUR, 4 * HOUR, 9 * HOUR])

    def switch_meter(self) -> None:
        meter = self.sandbox._account.meters.find(METERS[1])
        assert meter is not None
        (self.sandbox.deactivate_meter if meter.active else self.sandbox.reactivate_meter)(METERS[1])

    def use_elsewhere(self) -> None:
        """Somebody else's usage, in a minute of ours; its amount cannot be taken for one of ours."""
        with self.ledger.read() as connection:
            row = connection.execute(select(events).order_by(events.c.id.desc()).limit(1)).first()
        if row is not None:
            name = f"foreign-{self.chance.getrandbits(40)}"
            event = MeterEvent(row.event_name, row.customer, Decimal("0.01"), name, row.at)
            self.couriers[0].courier.gateway.send_once(event)

    # -- the end

    def calm_down(self) -> None:
        """Everything works again; wait until all that can settle by itself has."""
        self.set_weather("calm")
        for process in self.couriers:
            process.http.fuse = None
        meter = self.sandbox._account.meters.find(METERS[1])
        if meter is not None and not meter.active:
            self.sandbox.reactivate_meter(METERS[1])
        self.wait()

    def wait(self) -> None:
        for _ in range(200):
            self.deliver(100)
            if not self.status.pending and all(row.reason.startswith("A person") for row in doubtful(self.ledger)):
                return
            self.sandbox.time += self.chance.choice([90, SUMS_LAG])  # chores have a minute of their own
        raise AssertionError(f"stuck: {self.status}, {doubtful(self.ledger)}")

    def check(self, *, done: bool) -> None:
        """Nothing was billed twice, nothing was lost. ``done``: everything is delivered."""
        billed = [event for event in self.sandbox.events if event.billed and not event.identifier.startswith("foreign")]
        twice = [name for name, times in Counter(event.identifier for event in billed).items() if times > 1]
        assert not twice, f"billed twice: {twice}"
        with self.ledger.read() as connection:
            rows = {row.identifier: row for row in connection.execute(select(events))}
            joined = readings.outerjoin(events, events.c.id == readings.c.event_id)
            parts = connection.execute(
                select(readings.c.key, readings.c.value, readings.c.state, events.c.identifier).select_from(joined)
            ).all()
        delivered = {name: (row.customer, Decimal(row.value)) for name, row in rows.items() if row.state == "delivered"}
        uncertain = {name for name, row in rows.items() if row.state == "doubtful"}
        at_stripe = {event.identifier: (event.customer, event.value) for event in billed}
        lost = {name for name in delivered if at_stripe.get(name) != delivered[name]}
        assert not lost, f"lost: {lost}"
        assert set(at_stripe) - set(delivered) <= uncertain, "billed, but not known as delivered"
        assert {part.key for part in parts} == {f"run-{number + 1}" for number in range(self.tally.recorded)}
        sums: Counter[str] = Counter()
        for part in parts:
            assert (part.state == "sealed") == (part.identifier is not None)
            if part.identifier is not None:
                sums[part.identifier] += Decimal(part.value)  # type: ignore[assignment]
        assert dict(sums) == {name: Decimal(row.value) for name, row in rows.items()}
        if done:
            assert {part.state for part in parts} <= {"sealed"}
            assert set(at_stripe) == set(delivered) == set(rows)

    def person(self) -> None:
        """What is left is settled by somebody who looks at Stripe."""
        self.skew = 0
        there = {event.identifier for event in self.sandbox.events if event.billed}
        rows = doubtful(self.ledger)
        left = [row.identifier for row in rows]
        self.tally.amount_for_a_person += sum((row.value for row in rows), Decimal(0))
        self.tally.needed_a_person += len(left)
        self.tally.doubts += len(self.doubted)
        self.tally.settled_by_themselves += len(self.doubted) - len(left)
        settle_doubt(self.ledger, [name for name in left if name in there], delivered=True)
        settle_doubt(self.ledger, [name for name in left if name not in there], delivered=False)
        self.tally.rejected += self.status.rejected
        self.wait()
        for _ in range(3):
            if self.status.held or self.status.rejected:
                for held in views.held(self.ledger):
                    acts.assign(self.ledger, held.ids, "cus_0" if held.customer == MORTAL else held.customer)
                self.sandbox.time += HOUR
                sealing.retry(self.ledger)
                self.wait()

    @property
    def status(self) -> views.Status:
        return views.status(self.ledger)

    def open_accounts(self) -> None:
        """Enough usage of everybody that no correction makes a bill negative."""
        for customer, meter in product((*CUSTOMERS, "cus_ann"), METERS):
            self.tally.recorded += 1
            key = f"run-{self.tally.recorded}"
            self.ledger.record([Entry(key, meter, Decimal(50), START, ReadingState.RESOLVED, customer)])

    def play(self, steps: int) -> Tally:
        """Everything from the beginning to the end."""
        if self.over_http:
            self.sandbox.start()
        try:
            self.open_accounts()
            for _ in range(self.chance.choice([1, 1, 1, 2])):
                self.boot()
            for _ in range(steps):
                self.step()
            self.calm_down()
            self.check(done=False)
            self.person()
            self.check(done=True)
            if not self.foreign:
                assert_invariant(self.ledger, self.sandbox, settled=True)
        finally:
            for process in self.couriers:
                process.courier.gateway.close()
            self.ledger.close()
            self.sandbox.stop()
        return self.tally


@contextmanager
def as_process(host: str, boot: str) -> Iterator[None]:
    """Leases name this process."""
    known = outbox._BOOT, outbox.socket
    outbox._BOOT, outbox.socket = boot, SimpleNamespace(gethostname=lambda: host)  # type: ignore[assignment]
    try:
        yield
    finally:
        outbox._BOOT, outbox.socket = known


def play(seeds: Sequence[int], steps: int = 60, *, over_http: bool = False) -> Tally:
    """The worlds of these seeds, one after the other; a failure names its seed."""
    total = Tally()
    with TemporaryDirectory() as folder:
        for seed in seeds:
            try:
                total += World(seed, Path(folder), over_http=over_http).play(steps)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
    return total
