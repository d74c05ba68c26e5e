"""What the commands work on, the ledger and Stripe, and how the long ones are stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger


@contextmanager
def open_ledger(url: str | None) -> Iterator[Ledger]:
    """The ledger. It must exist already: a mistyped path must not create an empty one."""
    ledger = new_ledger(url)
    missing = missing_file(ledger)
    if missing is not None:
        raise ConfigurationError(
            f"There is no ledger at {missing}. Give its address with --ledger or $STRIPE_METER_LEDGER."
        )
    with closing(ledger):
        yield ledger


def new_ledger(url: str | None) -> Ledger:
    """The ledger, whether it exists or not; it is opened, and made, when it is first used."""
    from langchain_stripe_meter.ledger.store import Ledger

    return Ledger(url or DEFAULT_LEDGER)


def missing_file(ledger: Ledger) -> Path | None:
    """The absolute path of the ledger's file where there is none yet."""
    if not ledger.database.is_sqlite:
        return None
    path = Path(str(ledger.database.url.database)).absolute()
    return None if path.exists() else path


@contextmanager
def open_gateway() -> Iterator[Gateway]:
    """Stripe, by ``$STRIPE_API_KEY``."""
    with closing(new_gateway()) as gateway:
        yield gateway


def new_gateway() -> Gateway:
    """Stripe, for the caller to close. The gateway's own advice about a missing key is for Python."""
    from langchain_stripe_meter.gateway.client import Gateway

    if not os.environ.get("STRIPE_API_KEY"):
        raise ConfigurationError("There is no Stripe API key. Set $STRIPE_API_KEY to yours.")
    return Gateway()


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
