"""A long life in a short time: many runs through one process, Stripe failing all the while, memory and disk bounded.

Run: nice python tests/benchmarks/soak.py [--runs 1000000] [--memory 300]. Each run is a ``record_usage``; they come in
bursts over a hundred days of the ledger's and the sandbox's clock, a courier rolls them up by the minute, and what is
final and older than 40 days is pruned. Prints its figures; exit code 1 where a bound or the invariant does not hold.
The sandbox, with all that it was ever sent, lives in the same process and is part of its memory.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.keeping import PruneChore
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import (
    StripeSandbox,
    broken_body,
    drop_answer,
    drop_request,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)

DAYS = 100
CUSTOMERS = 20
THREADS = 4
FAULTS = (rate_limited, drop_answer, drop_request, broken_body, server_error, server_error_after_accept, refuse)


@dataclass
class Figures:
    """What came of it, in MiB; ``disk_first`` is when the first rows were 45 days old.

    What is on disk is the database without SQLite's log, which stays below a few MiB.
    """

    runs: int
    seconds: float = 0
    record_seconds: float = 0
    faults: int = 0
    events: int = 0
    rss_start: float = 0
    rss_peak: float = 0
    disk_first: float = 0
    disk_peak: float = 0
    disk_end: float = 0
    pruned: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)


def soak(folder: Path, runs: int, *, memory: float, seed: int = 1, burst: int = 2000) -> Figures:
    """Live through it; ``wrong`` in the figures is empty where everything held. ``memory`` in MiB."""
    chance, figures = random.Random(seed), Figures(runs)
    expected: Counter[str] = Counter()
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for number in range(CUSTOMERS):
            sandbox.create_customer(id=f"cus_{number}")
        url = f"sqlite:///{folder}/ledger.db"
        handler = StripeMeterCallbackHandler(Tokens("ai_tokens"), ledger=url, deliver=False, clock=sandbox.now)
        ledger: Ledger = handler._ledger
        gateway = Gateway(sandbox.api_key, api_base=sandbox.url)
        courier = Courier(ledger, gateway, roll_up=60, chores=[PruneChore(ledger, 40, lambda: gateway.date)])
        began, bursts = time.monotonic(), max(runs // burst, 1)
        figures.rss_start = rss()
        for number in range(bursts):
            for _ in range(chance.randrange(6)):
                sandbox.fail(chance.choice(FAULTS)(), times=chance.randrange(1, 4))
                figures.faults += 1
            figures.record_seconds += record(handler, number, burst, expected)
            drain(ledger, courier, sandbox, figures)
            sandbox.advance(seconds=DAYS * 86_400 // bursts)
            measure(figures, ledger, number / bursts)
            tell(figures, (number + 1) * burst)
            if figures.rss_peak > memory:
                figures.wrong.append(f"{figures.rss_peak:.0f} MiB of memory, more than {memory:.0f}")
            if figures.wrong:
                break
        courier.close(10)
        gateway.close()
        figures.seconds = time.monotonic() - began
        judge(figures, ledger, sandbox, expected)
        handler.close()
    return figures


def record(handler: StripeMeterCallbackHandler, number: int, burst: int, expected: Counter[str]) -> float:
    """One burst of runs, by a few threads at once; the seconds that it took."""

    def some(thread: int) -> None:
        for run in range(thread, burst, THREADS):
            usage = {"input_tokens": 10 + run % 7, "output_tokens": 5}
            handler.record_usage(usage, id=f"{number:06}-{run:06}", customer=f"cus_{run % CUSTOMERS}")

    threads = [threading.Thread(target=some, args=(thread,)) for thread in range(THREADS)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in range(burst):
        expected[f"cus_{run % CUSTOMERS}"] += 15 + run % 7
    return time.monotonic() - start


def drain(ledger: Ledger, courier: Courier, sandbox: StripeSandbox, figures: Figures) -> None:
    """Let the minute end, and wait until all of it is delivered; the clock goes on, as it would."""
    sandbox.advance(seconds=61)
    pause, waited = threading.Event(), 0
    while True:
        courier.wake()
        with ledger.read() as connection:
            if not views.pending(connection):
                return
        waited += 1
        if waited > 6_000:
            figures.wrong.append(f"{views.status(ledger)} after a long time")
            return
        sandbox.advance(seconds=waited % 2)
        pause.wait(0.02)


def rss() -> float:
    """Resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(figures: Figures, ledger: Ledger, share: float) -> None:
    with ledger.read() as connection:
        pages, size = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
        )
    disk = pages * size / 2**20
    figures.rss_peak, figures.disk_end = max(figures.rss_peak, rss()), disk
    figures.disk_peak = max(figures.disk_peak, disk)
    if share * DAYS <= 45:
        figures.disk_first = figures.disk_peak


def tell(figures: Figures, done: int) -> None:
    if sys.stderr.isatty() or done % 100_000 == 0:
        print(
            f"{done:,} of {figures.runs:,} runs, {rss():.0f} MiB of memory, {figures.disk_end:.0f} MiB on disk",
            file=sys.stderr,
        )


def judge(figures: Figures, ledger: Ledger, sandbox: StripeSandbox, expected: Counter[str]) -> None:
    """Recorded = delivered = billed, each once; what is no longer there is in the sums."""
    known = {customer: states for (_, customer), states in views.totals(ledger).items()}
    billed = sandbox.billed("ai_tokens")
    for customer, amount in expected.items():
        if known.get(customer) != {"delivered": Decimal(amount)}:
            figures.wrong.append(f"{customer}: {amount} were recorded, the ledger says {known.get(customer)}")
        if billed.get(customer) != amount:
            figures.wrong.append(f"{customer}: {amount} were recorded, {billed.get(customer)} billed")
    identifiers = Counter(event.identifier for event in sandbox.events)
    figures.wrong += [f"{name} was billed {count} times" for name, count in identifiers.items() if count > 1]
    now = views.status(ledger)
    figures.events, figures.pruned = len(identifiers), now.pruned
    figures.left = figures.runs - now.pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--memory", type=float, default=300, help="MiB that the process may take")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), options.runs, memory=options.memory, seed=options.seed)
    for name, value in asdict(figures).items():
        print(f"{name:<16} {value:,.1f}" if isinstance(value, float) else f"{name:<16} {value}")
    print(f"{'runs/s recorded':<16} {figures.runs / figures.record_seconds:,.0f}")
    sys.exit(1 if figures.wrong else 0)


if __name__ == "__main__":
    main()
