"""A process that forks children which die by kill -9 at a chosen statement of the ledger's work.

    python crashing.py < orders

Each line of its input is an order in JSON: what to do, and at which statement to die (0: at none). It answers each with
a line of JSON, when the child is gone: the keys whose recording had returned, and whether the child lived to its end.
Nothing in the package knows of this: the database drivers count the statements.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import alembic.command  # noqa: F401 - for all children
import psycopg
from sqlalchemy import Engine, event

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

ANN = Reference("email", "ann@example.com")


def batches(now: int) -> Iterator[list[Entry]]:
    """What one child records: single readings, several at once, and one of somebody known by e-mail."""
    known: Any = {"event_name": "ai_tokens", "at": now, "state": ReadingState.RESOLVED}
    yield [Entry("one", value=Decimal(1), customer="cus_1", **known)]
    yield [Entry(f"many-{n}", value=Decimal(10), customer=f"cus_{n}", **known) for n in (1, 2)]
    yield [Entry("mailed", "ai_tokens", Decimal(100), now, ReadingState.RECORDED, reference=ANN)]


WHOLE = {"cus_1": Decimal(11), "cus_2": Decimal(10), "cus_ann": Decimal(100)}
"""What all of it comes to."""


def die_at(statement: int) -> None:
    """Kill this process, without any warning, when its n-th statement begins."""
    left = [statement]

    def count(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (count(), method(*args, **kwargs))[1]

    def watch(connection: Any, _record: object) -> None:
        if hasattr(connection, "set_trace_callback"):
            connection.set_trace_callback(count)

    event.listen(Engine, "connect", watch)
    for name in ("execute", "executemany"):
        setattr(psycopg.Cursor, name, counted(getattr(psycopg.Cursor, name)))


def work(order: dict[str, Any], tell: Callable[[str], object]) -> None:
    """Record and deliver; ``tell`` every key whose recording has returned."""
    ledger = Ledger(order["url"])
    ledger.note("opened")  # brings a new ledger up to date
    if order["act"] == "open":
        return
    for batch in batches(int(time.time())):
        ledger.record(batch)
        for entry in batch:
            tell(f"{entry.key}\n")
    courier = Courier(ledger, Gateway(order["key"], api_base=order["stripe"]), concurrency=1)
    while is_pending(ledger):
        courier.turn()
    courier.close(5)
    ledger.close()


def is_pending(ledger: Ledger) -> bool:
    """One statement only: a death at a read that decides nothing tells nothing."""
    with ledger.read() as connection:
        return views.pending(connection) > 0


def in_a_child(order: dict[str, Any]) -> dict[str, Any]:
    """Carry an order out in a child, and say what it had told before it was gone."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(60)
            Path(order["pid_file"]).write_text(str(os.getpid()))
            die_at(order["die_at"])
            work(order, lambda line: os.write(writing, line.encode()))
            code = 0
        except BaseException:  # noqa: BLE001 - the test sees the exit code, and a person this
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        keys = told.read().split()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"acknowledged": keys, "code": code}


def import_all() -> None:
    """Do it once, so that what children need is imported: the Stripe client imports most of itself when it is used."""
    with TemporaryDirectory() as folder, StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for customer in WHOLE:
            sandbox.create_customer(id=customer, email=ANN.value if customer == "cus_ann" else None)
        stripe = {"key": sandbox.api_key, "stripe": sandbox.url}
        work({"act": "all", "url": f"sqlite:///{folder}/ledger.db", **stripe}, lambda _line: None)
    for thread in set(threading.enumerate()) - {threading.main_thread()}:  # a fork would not take them along
        thread.join(10)
        assert not thread.is_alive()


if __name__ == "__main__":
    import_all()
    for line in sys.stdin:
        print(json.dumps(in_a_child(json.loads(line))), flush=True)
