"""A ledger, a courier with its chores and a sandbox, all by one clock: what the tests of the audit share."""

from __future__ import annotations

import hashlib
import hmac
import json
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from conftest import assert_invariant

from langchain_stripe_meter.audit.chores import Ages, chores
from langchain_stripe_meter.audit.webhooks import WebhookResult, Webhooks
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import CHORES_SECONDS, Courier
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import acts, views
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import Rejection, StripeSandbox, drop_answer

ERROR_REPORT = "v1.billing.meter.error_report_triggered"


class Books:
    """A shop's sandbox with the meter ``ai_tokens`` and four customers, its ledger, and its courier."""

    def __init__(self, url: str | Path, *, billing_day: int = 1) -> None:
        self.sandbox = StripeSandbox().start()
        self.sandbox.create_meter("ai_tokens")
        for number in range(1, 5):
            self.sandbox.create_customer(id=f"cus_{number}")
        where = f"sqlite:///{url}/ledger.db" if isinstance(url, Path) else url
        self.ledger = Ledger(where, clock=self.sandbox.now)
        self.gateway = Gateway(self.sandbox.api_key, api_base=self.sandbox.url)
        self.errors: list[MeteringError] = []
        self.billing_day = billing_day
        self.webhooks = Webhooks(self.ledger, self.gateway, "whsec_sandbox", on_error=self.errors.append)
        self.courier = self.another_courier()

    def another_courier(self) -> Courier:
        """One more courier, with chores that remember nothing but what the ledger knows."""
        told = self.errors.append
        ages = Ages(self.ledger, told, self.billing_day)
        todo = chores(self.ledger, self.gateway, on_error=told)
        return Courier(self.ledger, self.gateway, on_error=told, chores=todo, watches=[ages.chore])

    def record(self, *keys: str, value: object = 1, **facts: Any) -> None:
        """Usage of ``cus_1`` now, unless told."""
        usual = {
            "event_name": "ai_tokens", "at": self.ledger.now(), "state": ReadingState.RESOLVED, "customer": "cus_1",
        }  # fmt: skip
        self.ledger.record([Entry(key, value=Decimal(str(value)), **{**usual, **facts}) for key in keys])

    def deliver(self, *keys: str, **facts: Any) -> None:
        """Record usage and send it."""
        if keys:
            self.record(*keys, **facts)
        while (now := views.status(self.ledger)).pending - now.ahead:
            if not self.courier.turn() and not self.courier.in_flight:
                self.sandbox.advance(seconds=1)

    def do_chores(self) -> None:
        """Once around, a minute later."""
        self.sandbox.advance(seconds=CHORES_SECONDS)
        self.courier.turn()

    def reject_before_it_is_sent_again(self, key: str) -> Rejection:
        """Stripe rejects what it took and whose answer was lost; then it is away for an hour, and calls it a
        duplicate."""
        self.sandbox.fail(drop_answer())
        self.record(key)
        while not self.sandbox.events or self.courier.in_flight:
            self.courier.turn()
        (rejection,) = self.sandbox.reject(key)
        with self.sandbox.outage():
            self.sandbox.advance(hours=1)
            self.courier.turn()
        self.deliver()
        return rejection

    def take(self, *rejections: Rejection) -> list[WebhookResult]:
        """Their webhooks, as Stripe sends them."""
        return [self.webhooks.handle(*self.sandbox.thin_event(rejection)) for rejection in rejections]

    def sign(self, body: bytes, *, at: int | None = None, secret: str = "whsec_sandbox") -> str:
        """A ``Stripe-Signature`` header for ``body``."""
        date = self.ledger.now() if at is None else at
        digest = hmac.new(secret.encode(), f"{date}.".encode() + body, hashlib.sha256).hexdigest()
        return f"t={date},v1={digest}"

    def states(self) -> dict[str, str]:
        """What became of each reading."""
        return {row.identifier: row.state for row in views.every(self.ledger)}

    def told(self) -> list[str]:
        """The acts that are written down, with their subjects."""
        return [f"{act.act} {act.subject}" for act in acts.every_act(self.ledger)]

    def billed(self, customer: str = "cus_1") -> Decimal:
        """What Stripe bills."""
        return self.sandbox.billed("ai_tokens", customer)

    def snapshot(self) -> str:
        """Every row that a webhook could change."""
        ours = "notes WHERE substr(name, 1, 7) = 'window:'"
        tables = ["readings", "events", "acts", "webhook_events", ours]
        with self.ledger.read() as connection:
            found = [connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1").all() for name in tables]
        return json.dumps([list(row) for rows in found for row in rows], default=str)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert_invariant(self.ledger, self.sandbox)
        self.courier.close(5)
        self.gateway.close()
        self.ledger.close()
        self.sandbox.stop()
