"""A sandbox, a ledger that goes by its clock, and couriers between them: what the tests of delivery share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from conftest import is_pending, wait_until

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import RecordedRequest, StripeSandbox, hang

EVENTS = "/v1/billing/meter_events"


class Shop:
    """A sandbox, a ledger that goes by its clock, and couriers between them."""

    def __init__(self, path: Path) -> None:
        self.sandbox = StripeSandbox().start()
        self.sandbox.create_meter("ai_tokens")
        for number in range(1, 5):
            self.sandbox.create_customer(id=f"cus_{number}")
        self.ledger = Ledger(f"sqlite:///{path}/ledger.db", clock=self.sandbox.now)
        self.errors: list[MeteringError] = []
        self._couriers: list[Courier] = []
        self.courier = self.another_courier()

    def another_courier(self, concurrency: int = 8, key: str | None = None, **options: Any) -> Courier:
        gateway = Gateway(key or self.sandbox.api_key, api_base=self.sandbox.url)
        courier = Courier(self.ledger, gateway, concurrency=concurrency, on_error=self.errors.append, **options)
        self._couriers.append(courier)
        return courier

    def record(self, *keys: str, value: object = 1, **facts: Any) -> None:
        usual = {
            "event_name": "ai_tokens",
            "at": self.ledger.now(),
            "state": ReadingState.RESOLVED,
            "customer": "cus_1",
        }
        made: dict[str, Any] = {**usual, **facts}
        if "reference" in made:
            made |= {"state": ReadingState.RECORDED, "customer": None}
        self.ledger.record([Entry(key, value=Decimal(str(value)), **made) for key in keys])

    def drive(self, courier: Courier | None = None, *, seconds: int = 3600) -> None:
        """Let the courier work until nothing is pending, moving the clock on while it waits, at most ``seconds``."""
        courier = courier or self.courier
        until, step = self.sandbox.now() + seconds, max(1, seconds // 200)
        while is_pending(self.ledger) and self.sandbox.now() < until:
            if not courier.turn() and not courier.in_flight:
                self.sandbox.advance(seconds=step)

    def send(self, courier: Courier | None = None) -> None:
        """Take one turn that sends: Stripe has said before which meters there are."""
        courier = courier or self.courier
        courier.gateway.load_meters()
        courier.turn()

    @property
    def status(self) -> views.Status:
        return views.status(self.ledger)

    def states(self) -> dict[str, str]:
        return {row.identifier: row.state for row in views.tail(self.ledger, 1000)}

    def sent(self, *customers: str) -> list[RecordedRequest]:
        """The requests that carried meter events (for these customers)."""
        return [
            request
            for request in self.sandbox.requests
            if request.path == EVENTS and (not customers or payer(request) in customers)
        ]

    def billed(self, customer: str = "cus_1") -> Decimal:
        return self.sandbox.billed("ai_tokens", customer)

    def close(self) -> None:
        for courier in self._couriers:
            courier.close(5)
            courier.gateway.close()
        self.ledger.close()
        self.sandbox.stop()


class StillShop(Shop):
    """A shop whose ledger's clock stands still until ``pass_`` moves it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.now = self.sandbox.now()
        self.ledger = Ledger(f"sqlite:///{path}/still.db", clock=lambda: self.now)
        self.courier = self.another_courier()

    def pass_(self, seconds: int) -> None:
        self.now += seconds

    def drive_still(self, courier: Courier) -> None:
        """Let the courier work until nothing is pending."""
        while is_pending(self.ledger):
            if not courier.turn() and not courier.in_flight:
                self.pass_(10)

    def asked(self, path: str) -> int:
        """How many requests there were for ``path``."""
        return len([request for request in self.sandbox.requests if request.path.startswith(path)])

    def hang(self, path: str = EVENTS) -> tuple[threading.Event, list[str]]:
        """What lets requests for ``path`` be answered, and the paths of those that have arrived."""
        answer, arrived = threading.Event(), list[str]()
        self.sandbox.fail(
            hang(answer), path=path, times=None, where=lambda request: arrived.append(request.path) is None
        )
        return answer, arrived

    def answered(self) -> None:
        """Take turns until nothing is in flight."""
        wait_until(lambda: self.courier.turn() + 1 and not self.courier.in_flight)


def payer(request: RecordedRequest) -> str:
    return str(request.params["payload"]["stripe_customer_id"])


def of(customer: str) -> Callable[[RecordedRequest], bool]:
    return lambda request: payer(request) == customer
