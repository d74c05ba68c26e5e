"""A handler that delivers to a sandbox, and what came of it: what the tests of the handler share."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import stripe

from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.ledger.views import Row, tail
from langchain_stripe_meter.sandbox import StripeSandbox

USUAL_METERS: tuple[Meter, ...] = (Tokens("in", count="input"), Tokens("out", count="output"), Messages("messages"))
ONE_ANSWER = {"in": 12, "out": 3, "messages": 1}
"""What one usual reply of a provider's stand-in comes to on the usual meters."""


class Shop:
    """A Stripe account with the meters of one handler and two customers, ``cus_1`` and ``cus_2``."""

    def __init__(self, folder: Path, *meters: Meter, **options: Any) -> None:
        self.sandbox = StripeSandbox().start()
        self.meters = meters or USUAL_METERS
        for meter in self.meters:
            self.sandbox.create_meter(meter.event_name)
        for customer in ("cus_1", "cus_2"):
            self.sandbox.create_customer(id=customer)
        self._options = {
            "customer": from_metadata("stripe_customer_id"),
            "ledger": f"sqlite:///{folder / 'ledger.db'}",
            "stripe": stripe.StripeClient(self.sandbox.api_key, base_addresses={"api": self.sandbox.url}),
            **options,
        }
        self._handlers: list[StripeMeterCallbackHandler] = []
        self.handler = self.another_handler()

    def another_handler(self, **options: Any) -> StripeMeterCallbackHandler:
        """One more handler with the same meters and the same ledger."""
        handler = StripeMeterCallbackHandler(*self.meters, **{**self._options, **options})
        self._handlers.append(handler)
        return handler

    def config(self, customer: str = "cus_1", **more: Any) -> Any:
        """The config of a call that is attached to the handler and that ``customer`` pays."""
        return {**paid_by(customer, self.handler), **more}

    def billed(self, customer: str = "cus_1") -> dict[str, Any]:
        """What the customer owes on each meter, once everything is delivered; meters that nothing came to are left
        out."""
        for handler in self._handlers:
            assert handler.flush(60).pending == 0
        bills: Mapping[str, Decimal] = {
            meter.event_name: self.sandbox.billed(meter.event_name, customer) for meter in self.meters
        }
        return {name: value for name, value in bills.items() if value}

    def rows(self) -> dict[str, Row]:
        """The readings by event name, where there is at most one of each."""
        rows = tail(self.handler._ledger, 1000)
        assert len({row.event_name for row in rows}) == len(rows)
        return {row.event_name: row for row in rows}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for handler in self._handlers:
                handler.close()
        finally:
            self.sandbox.stop()


def paid_by(customer: str, *handlers: StripeMeterCallbackHandler) -> Any:
    """A config that says who pays, attached to ``handlers`` if there are any."""
    attached = {"callbacks": list(handlers)} if handlers else {}
    return {"metadata": {"stripe_customer_id": customer}, **attached}
