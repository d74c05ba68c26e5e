"""Clocks that jump and time zones: what may be in Stripe's memory or not is never sent again blindly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import assert_invariant, is_pending
from faults import settled

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import Fault, StripeSandbox, drop_answer, drop_request

HOUR, DAY = 3600, 86_400
JUMPS = [-40 * DAY, -3 * DAY, -25 * HOUR, -2 * HOUR, -600, 600, 2 * HOUR, 22 * HOUR, 25 * HOUR, 3 * DAY, 40 * DAY]


class Clock:
    """Our clock: Stripe's, and how wrong it is."""

    def __init__(self, sandbox: StripeSandbox) -> None:
        self.sandbox = sandbox
        self.wrong = 0

    def __call__(self) -> int:
        return self.sandbox.now() + self.wrong


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for name in ("cus_1", "cus_2", "cus_3"):
            sandbox.create_customer(id=name)
        yield sandbox


@pytest.fixture
def clock(sandbox: StripeSandbox) -> Clock:
    return Clock(sandbox)


@pytest.fixture
def ledger(quick_folder: Path, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{quick_folder}/ledger.db", clock=clock)
    yield ledger
    ledger.close()


@pytest.fixture
def courier(ledger: Ledger, sandbox: StripeSandbox) -> Iterator[Courier]:
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=sandbox.url))
    yield courier
    courier.close(5)
    courier.gateway.close()


def record(ledger: Ledger, *customers: str) -> None:
    for customer in customers:
        key = f"{customer}-{ledger.now()}"
        ledger.record([Entry(key, "ai_tokens", Decimal(1), ledger.now(), ReadingState.RESOLVED, customer)])


def one_without_an_answer(courier: Courier, sandbox: StripeSandbox, fault: Fault) -> None:
    """A run of the first customer's, of which nobody knows whether Stripe has it."""
    record(courier.ledger, "cus_1")
    sandbox.fail(fault, times=None)  # a slow machine sends it twice
    while not sandbox.requests or sandbox.requests[-1].path != "/v1/billing/meter_events" or courier.in_flight:
        courier.turn()
    sandbox.clear_faults()


def work(courier: Courier, sandbox: StripeSandbox, *, seconds: int, step: int = 60) -> None:
    """Let the courier work for so long by Stripe's clock, which goes on only while the courier waits."""
    until = sandbox.now() + seconds
    while sandbox.now() < until:
        if not courier.turn() and not courier.in_flight:
            if not is_pending(courier.ledger):
                return
            sandbox.advance(seconds=step)
        assert_invariant(courier.ledger, sandbox)


@pytest.mark.parametrize("lost", [drop_answer, drop_request], ids=["Stripe had accepted", "Stripe had nothing"])
@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_while_an_outcome_is_unknown_bills_nothing_twice(
    courier: Courier, sandbox: StripeSandbox, clock: Clock, jump: int, lost: Callable[[], Fault]
) -> None:
    """It jumps, runs are recorded by the wrong clock, and it is set right after two hours."""
    ledger = courier.ledger
    one_without_an_answer(courier, sandbox, lost())
    clock.wrong = jump
    record(ledger, "cus_2")
    work(courier, sandbox, seconds=2 * HOUR)
    clock.wrong = 0
    record(ledger, "cus_3")
    work(courier, sandbox, seconds=2 * HOUR)
    assert sandbox.billed("ai_tokens", "cus_3") == 1  # what the wrong clock said holds nothing up
    work(courier, sandbox, seconds=45 * DAY, step=6 * HOUR)
    settled(ledger, sandbox, fault="the clock jumps while an outcome is unknown")
    states = {row.customer: row.state for row in views.tail(ledger)}
    assert states["cus_1"] == ("delivered" if -HOUR < jump < 23 * HOUR else "doubtful")
    # What Stripe finds more than 5 minutes ahead waits until it is not; what it finds 35 days old, a person re-times.
    assert states["cus_2"] == ("delivered" if jump > -35 * DAY else "rejected")
    assert states["cus_3"] == "delivered"


@pytest.mark.parametrize("jump", [-2 * HOUR, -25 * HOUR, -40 * DAY])
def test_a_clock_that_is_set_back_for_good_does_not_make_an_old_doubt_look_young(
    ledger: Ledger, courier: Courier, sandbox: StripeSandbox, clock: Clock, jump: int
) -> None:
    """By the wrong clock, Stripe still remembers the identifier; in truth it forgot it a day ago."""
    one_without_an_answer(courier, sandbox, drop_answer())
    clock.wrong = jump
    work(courier, sandbox, seconds=10)
    with sandbox.outage():
        work(courier, sandbox, seconds=26 * HOUR, step=600)
    work(courier, sandbox, seconds=45 * DAY, step=6 * HOUR)
    settled(ledger, sandbox, fault="the clock is set back for good while an outcome is unknown")
    assert sandbox.billed("ai_tokens", "cus_1") == 1


DELIVERER = """
import sys
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger

ledger = Ledger(sys.argv[1])
courier = Courier(ledger, Gateway())
for _ in range(20):
    courier.turn()
courier.close(10)
print(*(row.state for row in views.tail(ledger)))
"""


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime, which gives a process a wrong clock, is absent")
@pytest.mark.parametrize("wrong", ["-40d", "-25h", "+25h", "+40d"])
def test_a_process_that_starts_with_a_wrong_clock_sends_nothing_of_which_it_cannot_know(
    courier: Courier, sandbox: StripeSandbox, wrong: str
) -> None:
    """By the clock of a whole process: the interpreter, SQLite and the libraries see it too."""
    ledger = courier.ledger
    one_without_an_answer(courier, sandbox, drop_answer())
    courier.close(5)
    ledger.close()
    url = ledger.database.url.render_as_string()
    done = subprocess.run(
        ["faketime", "-f", wrong, sys.executable, "-W", "error", "-c", DELIVERER, url],
        env={**os.environ, **sandbox.environment(), "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "doubtful\n"
    settled(ledger, sandbox, fault="a process starts with a wrong clock while an outcome is unknown")
    assert sandbox.billed("ai_tokens", "cus_1") == 1


IN_A_ZONE = """
import datetime, json, sys
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from sqlalchemy import text

path, *times = sys.argv[1:]
clock = [0]

def made(**options):
    ledger = f"sqlite:///{path}"
    return StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer="cus_1", ledger=ledger, clock=lambda: clock[0], **options
    )

handler = made(deliver=False)
usage = {"input_tokens": 1, "output_tokens": 0, "total_tokens": 1}
for number, clock[0] in enumerate(map(int, times)):
    handler.record_usage(usage, id=f"job-{number}")
    model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)]))
    model.invoke("Hi", {"callbacks": [handler], "run_id": f"00000000-0000-4000-8000-{number:012}"})
made().close(30)
with handler._ledger.read() as connection:
    names = [text(f"SELECT * FROM {table} ORDER BY id") for table in ("readings", "events")]
    rows = [list(row) for name in names for row in connection.execute(name)]
handler._ledger.close()
offsets = [datetime.datetime.fromtimestamp(int(at)).astimezone().utcoffset().total_seconds() for at in times]
print(json.dumps({"rows": rows, "offsets": offsets}))
"""


def test_time_zones_and_daylight_saving_change_nothing(quick_folder: Path) -> None:
    """New York leaves daylight saving time at 06:00 UTC on 1 November 2026, when 01:30 comes twice."""
    change = 1_793_512_800
    times = [change - 1800, change - 1, change, change + 1800]
    rows, offsets = [], []
    for zone in ("UTC", "America/New_York", "Asia/Kathmandu"):
        with StripeSandbox() as own:
            own.set_time(times[-1])
            own.create_meter("ai_tokens")
            own.create_customer(id="cus_1")
            command = [sys.executable, "-c", IN_A_ZONE, str(quick_folder / zone.replace("/", "-")), *map(str, times)]
            environment = {**os.environ, **own.environment(), "TZ": zone}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
            seen = json.loads(done.stdout)
            assert sorted(event.timestamp for event in own.events) == sorted(times * 2)
            ledger = Ledger(f"sqlite:///{quick_folder}/{zone.replace('/', '-')}", clock=own.now)
            settled(ledger, own, fault="time zones, around the end of daylight saving time")
            ledger.close()
        rows.append([[column for column in row if not str(column).startswith("req_")] for row in seen["rows"]])
        offsets.append(seen["offsets"])
    assert rows[0] == rows[1] == rows[2]
    assert offsets == [[0] * 4, [-4 * HOUR] * 2 + [-5 * HOUR] * 2, [5.75 * HOUR] * 4]
