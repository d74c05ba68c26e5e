"""What the commands work on, the ledger and Stripe, and how the long ones are stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_stripe_meter.cli.show import fail

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger

DEFAULT_LEDGER = "sqlite:///stripe_meter.db"


@contextmanager
def open_ledger(url: str | None) -> Iterator[Ledger]:
    """The ledger. It must exist already: a mistyped path must not create an empty one."""
    from langchain_stripe_meter.ledger.store import Ledger

    ledger = Ledger(url or DEFAULT_LEDGER)
    if ledger.database.is_sqlite and not Path(str(ledger.database.url.database)).exists():
        where = ledger.database.url.database
        fail(f"There is no ledger at {where}. Give its address with --ledger or $STRIPE_METER_LEDGER.")
    with closing(ledger):
        yield ledger


@contextmanager
def open_gateway() -> Iterator[Gateway]:
    """Stripe, by ``$STRIPE_API_KEY``."""
    from langchain_stripe_meter.gateway.client import Gateway

    with closing(Gateway()) as gateway:
        yield gateway


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, inside the block."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
