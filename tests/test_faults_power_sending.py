"""Power loss while usage is sent and settled: whatever the disk made of it, all is billed, and billed once."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path

import pytest
from auditing import Books
from faults import settled
from power_loss import moments, trace, ways

from langchain_stripe_meter.core.events import MeterEvent
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.epoch import KILLED, told
from langchain_stripe_meter.sandbox import StripeSandbox

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which records the writes, is absent")

SENDER = """
import json, os, sys
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger

class Alone(Courier):
    def _dispatch(self, job):  # in this thread, so that one call follows the other
        self._results.put(self._ask_stripe(job))

folder, url, key, at, batches = sys.argv[1:]
ledger = Ledger(f"sqlite:///{folder}/ledger.db")
courier = Alone(ledger, Gateway(key, api_base=url), concurrency=2)
for batch in json.loads(batches):
    usage = [(name, "ai_tokens", value, int(at), ReadingState.RESOLVED, who) for name, (who, value) in batch.items()]
    ledger.record([Entry(*facts) for facts in usage])
    os.write(1, " ".join([*batch, ""]).encode())
    while views.status(ledger).pending:
        courier.turn()
courier.close(5)
ledger.close()
"""
BATCHES = [{f"job-{batch}-{who}": (f"cus_{who}", 2 ** (3 * batch + who)) for who in range(1, 4)} for batch in range(4)]
"""Of three customers; no sum of some amounts is that of others."""
USAGE = {name: facts for batch in BATCHES for name, facts in batch.items()}
IMAGES = 60

Found = tuple[Mapping[str, bytes], set[str], list[str]]
"""An image, what had been acknowledged by then, and what Stripe had."""


def images(quick_folder: Path, at: int) -> Iterator[Found]:
    """Images of every moment at which there was anything to send."""
    folder, chance = quick_folder / "traced", random.Random(1)
    folder.mkdir()
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for who in range(1, 4):
            sandbox.create_customer(id=f"cus_{who}")
        facts = (sandbox.url, sandbox.api_key, str(at), json.dumps(BATCHES))
        lines = trace(SENDER, folder, *facts, output=quick_folder / "trace")
    for disk in moments(lines, folder):
        if disk.said:
            for choose in ways(chance):
                yield disk.image(choose), set(disk.said), list(disk.posted)
    assert set(disk.said) == set(disk.posted) == set(USAGE)
    assert disk.image(lambda: True)["ledger.db"] == (folder / "ledger.db").read_bytes()


def go_on(folder: Path, image: Mapping[str, bytes], posted: list[str], at: int, hours: int) -> Books:
    """Start again, so many hours later, on what the disk kept, with a Stripe that has what was posted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in image.items():
        (folder / name).write_bytes(content)
    books = Books(folder)
    for name in posted:
        who, value = USAGE[name]
        books.gateway.send_once(MeterEvent("ai_tokens", who, Decimal(value), name, at))
    books.sandbox.advance(hours=hours)
    books.deliver()
    for _ in range(4):  # what is in doubt is compared with Stripe's sums, twice
        if views.status(books.ledger).doubtful:
            books.sandbox.advance(hours=3)
            books.do_chores()
            books.deliver()
    return books


def test_after_any_power_loss_all_is_billed_once(quick_folder: Path) -> None:
    at, chance = int(time.time()), random.Random(2)
    every = list(images(quick_folder, at))
    assert len(every) > 500
    for image, said, posted in chance.sample(every, IMAGES):
        hours = chance.choice([0, 25])  # a day later, Stripe has forgotten the identifiers
        with go_on(quick_folder / "lab", image, posted, at, hours) as books:
            fault = "power loss at a write, fsync or request while it delivers"
            settled(books.ledger, books.sandbox, fault=fault, acknowledged=said)
            assert not views.status(books.ledger).doubtful
            assert set(books.states().values()) == {"delivered"}
            with books.ledger.read() as connection:
                noticed = told(connection)
            assert noticed is None or (hours and noticed.endswith(KILLED))  # and it is not taken for a backup
