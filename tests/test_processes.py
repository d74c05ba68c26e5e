"""Real processes on one ledger, really killed: nothing is billed twice, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from faults import settled as settled_after

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, delay, drop_answer, hang

WORKER = """
import sys, time
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger

act, url, name, count = sys.argv[1:]
ledger = Ledger(url)
courier = Courier(ledger, Gateway(), concurrency=4)

def record(number):
    customer = f"cus_{number % 4}"
    ledger.record([Entry(f"{name}-{number}", "ai_tokens", 1, int(time.time()), ReadingState.RESOLVED, customer)])
    print(f"{name}-{number}", flush=True)

if act != "deliver":
    for number in range(int(count)):
        record(number)
        if act == "both":
            courier.wake()
print("ready", flush=True)
if act == "deliver":
    sys.stdin.readline()
if act != "record":
    while views.status(ledger).pending:
        courier.wake()
        time.sleep(0.02)
courier.close(10)
ledger.close()
"""


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for number in range(4):
            sandbox.create_customer(id=f"cus_{number}")
        yield sandbox


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def patient_url(url: str) -> str:
    """Many processes write at once: on a busy machine one of them may wait for its turn longer than the usual 5 s."""
    return f"{url}?timeout=60"


@pytest.fixture
def start(sandbox: StripeSandbox) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a worker that records, delivers or does both; what still runs when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(act: str, url: str, name: str = "run", count: int = 0) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, act, url, name, str(count)],
            env={**os.environ, **sandbox.environment()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def kill(worker: subprocess.Popen[str]) -> list[str]:
    """Kill -9; the keys that the worker had been told are stored."""
    worker.send_signal(signal.SIGKILL)
    lines = worker.communicate()[0].splitlines()
    assert worker.returncode == -signal.SIGKILL
    return [line for line in lines if line != "ready"]


def finish(start: Callable[..., Any], url: str) -> None:
    worker = start("deliver", url)
    worker.communicate("\n", timeout=60)
    assert worker.returncode == 0


def settled(url: str, sandbox: StripeSandbox, recorded: int, *, fault: str, tried: int = 1) -> None:
    """Everything is delivered, and Stripe bills exactly what was recorded."""
    ledger = Ledger(url)
    settled_after(ledger, sandbox, fault=fault, tried=tried)
    assert views.status(ledger).delivered == recorded
    assert sum(sandbox.billed("ai_tokens").values()) == recorded
    ledger.close()


def recorded(url: str) -> set[str]:
    ledger = Ledger(url)
    keys = {row.identifier for row in views.tail(ledger, 100_000)}
    ledger.close()
    return keys


# -- killed


@pytest.mark.parametrize("after", [1, 20, 100])
def test_what_a_process_that_was_killed_while_recording_had_acknowledged_is_billed(
    start: Callable[..., Any], sandbox: StripeSandbox, url: str, after: int
) -> None:
    worker = start("record", url, count=1_000_000)
    told = [worker.stdout.readline().strip() for _ in range(after)] + kill(worker)
    keys = recorded(url)
    assert keys >= set(filter(None, told[:-1]))  # the last line may have been cut short
    assert len(keys) >= after
    finish(start, url)
    settled(url, sandbox, len(keys), fault="kill -9 while it records")


def test_killed_while_the_request_is_on_its_way(start: Callable[..., Any], sandbox: StripeSandbox, url: str) -> None:
    answer, arrived = threading.Event(), threading.Event()
    sandbox.fail(hang(answer), where=lambda _: not arrived.is_set() and (arrived.set() or True))
    worker = start("both", url, count=8)
    assert arrived.wait(60)
    wait_until(lambda: len(recorded(url)) == 8)
    kill(worker)
    answer.set()
    finish(start, url)
    settled(url, sandbox, 8, fault="kill -9 while it delivers")


def test_killed_after_stripe_accepted_and_before_that_was_noted(
    start: Callable[..., Any], sandbox: StripeSandbox, url: str
) -> None:
    """The answer is dropped and the next try hangs, so the process dies knowing nothing of what Stripe did."""
    never, again = threading.Event(), threading.Event()
    sandbox.fail(drop_answer())
    sandbox.fail(hang(never), where=lambda _: again.set() or True)  # type: ignore[func-returns-value]
    worker = start("both", url, count=1)
    assert again.wait(60)
    assert sum(sandbox.billed("ai_tokens").values()) == 1
    kill(worker)
    never.set()
    finish(start, url)
    settled(url, sandbox, 1, fault="kill -9 after Stripe accepted and before that was noted")


def test_killed_again_and_again_while_it_delivers(start: Callable[..., Any], sandbox: StripeSandbox, url: str) -> None:
    subprocess.Popen.communicate(start("record", url, count=120), timeout=60)
    for goal in (10, 40, 70):
        worker = start("deliver", url)
        worker.stdin.write("\n")
        worker.stdin.flush()
        wait_until(lambda goal=goal: len(sandbox.events) >= goal)
        kill(worker)
    finish(start, url)
    settled(url, sandbox, 120, fault="kill -9 while it delivers", tried=3)


def test_a_process_that_was_stopped_and_resumed_bills_nothing_twice(
    start: Callable[..., Any], sandbox: StripeSandbox, url: str
) -> None:
    start("record", url, count=40).communicate(timeout=60)
    answer = threading.Event()
    sandbox.fail(hang(answer), times=4)
    zombie = start("deliver", url)
    zombie.stdin.write("\n")
    zombie.stdin.flush()
    wait_until(lambda: stopped_while_it_waits(zombie, url))
    answer.set()
    ledger = Ledger(url, clock=lambda: sandbox.now() + 200)  # its leases have run out
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=sandbox.url))
    wait_until(lambda: courier.wake() or not views.status(ledger).pending, 60)  # type: ignore[func-returns-value]
    courier.close(10)
    courier.gateway.close()
    ledger.close()
    zombie.send_signal(signal.SIGCONT)
    zombie.communicate(timeout=60)
    assert zombie.returncode == 0
    settled(url, sandbox, 40, fault="a process is stopped while it delivers, and resumed after its lease")


def stopped_while_it_waits(worker: subprocess.Popen[str], url: str) -> bool:
    """Stop it, but not while it holds SQLite's lock, which nobody could take from it."""
    worker.send_signal(signal.SIGSTOP)
    os.waitpid(worker.pid, os.WUNTRACED)
    ledger = Ledger(f"{url}?timeout=0.05")
    try:
        if {row.state for row in views.tail(ledger, 1000)} == {"pending", "sending"}:
            ledger.set_note("probe", "1")
            return True
    except LedgerError:
        pass
    finally:
        ledger.close()
    worker.send_signal(signal.SIGCONT)
    return False


# -- together


def test_prefork_children_each_record_and_deliver_and_nothing_goes_twice(
    sandbox: StripeSandbox, patient_url: str
) -> None:
    ledger = Ledger(patient_url)
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=sandbox.url), concurrency=4)
    note(ledger, "parent", 4)
    courier.wake()
    wait_until(lambda: views.status(ledger).delivered)  # a fork amid the import of stripe could not import it
    children = []
    for number in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12: this process has other threads
            pid = os.fork()
        if not pid:
            code = 1
            try:
                signal.alarm(100)
                assert not courier.is_running
                note(ledger, f"child-{number}", 10)
                courier.wake()
                wait_until(lambda: not views.status(ledger).pending, 60)
                courier.close(10)
                ledger.close()
                code = 0
            except BaseException:  # noqa: BLE001 - the parent sees the exit code, and a person this
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    note(ledger, "meanwhile", 6)
    courier.wake()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    wait_until(lambda: not views.status(ledger).pending)
    courier.close(10)
    courier.gateway.close()
    ledger.close()
    fault = "a prefork server: children record and deliver beside their parent"
    settled(patient_url, sandbox, 4 + 6 + 80, fault=fault, tried=8)


def note(ledger: Ledger, name: str, count: int) -> None:
    for number in range(count):
        customer = f"cus_{number % 4}"
        ledger.record(
            [Entry(f"{name}-{number}", "ai_tokens", Decimal(1), ledger.now(), ReadingState.RESOLVED, customer)]
        )


@pytest.mark.parametrize(("engine", "couriers"), [("patient", 2), ("postgres", 4)], ids=["sqlite", "postgresql"])
def test_couriers_in_several_processes_share_a_ledger_and_nothing_goes_twice(
    start: Callable[..., Any], sandbox: StripeSandbox, request: pytest.FixtureRequest, engine: str, couriers: int
) -> None:
    url = str(request.getfixturevalue(f"{engine}_url"))
    ledger = Ledger(url)
    for number in range(20):
        sandbox.create_customer(id=f"cus_many{number}")
    ledger.record(
        [
            Entry(
                f"run-{number}", "ai_tokens", Decimal(1), ledger.now(), ReadingState.RESOLVED, f"cus_many{number % 20}"
            )
            for number in range(400)
        ]
    )
    ledger.close()
    workers = [start("deliver", url) for _ in range(couriers)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=100)
        assert worker.returncode == 0
    settled(url, sandbox, 400, fault="several processes deliver from one ledger", tried=couriers)
    sent = [request for request in sandbox.requests if request.path == "/v1/billing/meter_events"]
    assert [request.status for request in sent] == [200] * 400  # never two calls for one customer and meter at once


def test_eight_couriers_that_are_killed_or_stopped_at_random_bill_everything_once(
    start: Callable[..., Any], sandbox: StripeSandbox, postgres_url: str
) -> None:
    """Whoever is killed is replaced; whoever is stopped goes on a moment later, and sends what it still believes in."""
    ledger = Ledger(postgres_url)
    for number in range(40):
        sandbox.create_customer(id=f"cus_many{number}")
    ledger.record(
        [
            Entry(f"run-{number}", "ai_tokens", 1, ledger.now(), ReadingState.RESOLVED, f"cus_many{number % 40}")
            for number in range(800)
        ]
    )
    ledger.close()
    sandbox.fail(delay(0.02), times=None)
    chance, killed, stopped = random.Random(1), 0, 0
    workers = [started(start, postgres_url) for _ in range(8)]
    for goal in range(50, 700, 50):
        wait_until(lambda goal=goal: len(sandbox.events) >= goal)
        hit = chance.randrange(8)
        if chance.random() < 0.5:
            kill(workers[hit])
            killed, workers[hit] = killed + 1, started(start, postgres_url)
        else:
            workers[hit].send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0, 0.3))
            workers[hit].send_signal(signal.SIGCONT)
            stopped += 1
    assert killed
    assert stopped
    for worker in workers:
        worker.communicate(timeout=100)
        assert worker.returncode == 0
    fault = "eight couriers, killed with kill -9 or stopped and resumed at random"
    settled(postgres_url, sandbox, 800, fault=fault, tried=killed + stopped)


def started(start: Callable[..., Any], url: str) -> subprocess.Popen[str]:
    """A courier that was told to begin."""
    worker: subprocess.Popen[str] = start("deliver", url)
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return worker
