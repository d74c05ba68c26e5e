"""What a courier does every minute beside delivering."""

from __future__ import annotations

from collections.abc import Callable

from langchain_stripe_meter.audit.ages import Ages
from langchain_stripe_meter.audit.doubts import Doubts
from langchain_stripe_meter.audit.telling import OnError
from langchain_stripe_meter.audit.windows import Windows
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger.keeping import PruneChore
from langchain_stripe_meter.ledger.store import Ledger


def chores(
    ledger: Ledger,
    gateway: Gateway,
    *,
    on_error: OnError | None = None,
    billing_day: int = 1,
    prune_after_days: int | None = None,
) -> list[Callable[[int], None]]:
    """For ``Courier(chores=...)``; ``ConfigurationError`` where ``prune_after_days`` is less than 36."""
    pruning = [] if prune_after_days is None else [PruneChore(ledger, prune_after_days)]
    return [
        Doubts(ledger, gateway),
        Ages(ledger, on_error, billing_day).chore,
        Windows(ledger, gateway, on_error).chore,
        *pruning,
    ]
