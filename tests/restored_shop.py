"""A sandbox, a ledger that goes by its clock, and what may become of the ledger's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from conftest import is_pending, wait_until

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import LedgerError, MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.epoch import backup
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox


class Shop:
    """A sandbox, a ledger by its clock, and one courier after the other, each as in a new process."""

    def __init__(self, folder: Path) -> None:
        self.sandbox = StripeSandbox().start()
        self.sandbox.create_meter("m")
        self.sandbox.create_customer(id="cus_1")
        self.path = folder / "ledger.db"
        self.copy = folder / "copy.db"
        self.sidecar = folder / "ledger.db.epoch"
        self.ledger = self.open()
        self.errors: list[MeteringError] = []

    def open(self) -> Ledger:
        return Ledger(f"sqlite:///{self.path}", clock=self.sandbox.now)

    def record(self, *keys: str, value: int = 1, at: int | None = None) -> None:
        known: dict[str, Any] = {"state": ReadingState.RESOLVED, "customer": "cus_1"}
        at = self.ledger.now() if at is None else at
        self.ledger.record([Entry(key, "m", Decimal(value), at, **known) for key in keys])

    def deliver(self, roll_up: int | None = None, until: Callable[[], Any] | None = None, *, ends: bool = True) -> None:
        """One courier's life; unless it ``ends``, it is killed."""
        gateway = Gateway(self.sandbox.api_key, api_base=self.sandbox.url)
        courier = Courier(self.ledger, gateway, on_error=self.errors.append, roll_up=roll_up)
        until = until or (lambda: not is_pending(self.ledger))
        wait_until(lambda: (courier.turn(), until())[1])
        if ends:
            courier.close(5)
        gateway.close()

    def send_since_a_backup(self) -> None:
        """``first`` is sent and ``second`` recorded when the backup is taken, and then ``second`` is sent."""
        self.record("first")
        self.deliver()
        self.record("second")
        backup(self.ledger, self.copy)
        self.deliver()

    def restore(self, *, sidecar: bool = True) -> None:
        """As the README says it."""
        self.ledger.close()
        for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
            (self.path.parent / name).unlink(missing_ok=True)
        shutil.copy(self.copy, self.path)
        if not sidecar:
            self.sidecar.unlink()

    def raw_copy(self) -> None:
        """A copy by somebody who does not know of ``ledger backup``."""
        self.ledger.close()
        shutil.copy(self.path, self.copy)

    def states(self) -> dict[str, str]:
        return {row.identifier: row.state for row in views.tail(self.ledger, 1000)}

    @property
    def told(self) -> list[str]:
        return [str(error) for error in self.errors if isinstance(error, LedgerError)]

    def billed(self) -> list[str]:
        """The identifiers of everything that Stripe has, once for each time."""
        return sorted(event.identifier for event in self.sandbox.events)


@contextmanager
def killed(shop: Shop) -> Iterator[Callable[[], None]]:
    """A courier that sends what is there when it is told to, and never ends by itself."""
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append)
    yield lambda: wait_until(lambda: (courier.turn(), not is_pending(shop.ledger))[1])
    gateway.close()
