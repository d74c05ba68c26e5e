"""``stripe-meter doctor``: what is set up, what is not, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from langchain_stripe_meter.cli.shared import new_gateway, open_gateway
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.errors import ForeignLedgerError, MeteringError
from langchain_stripe_meter.gateway.client import MeterInfo
from langchain_stripe_meter.gateway.meters import problem_with

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger
    from langchain_stripe_meter.ledger.views import Status


_ROOM = 16_384
"""Bytes that must find room: more than the last block of a file on a full disk may have left."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "warn", "fail"]
    said: str


def examine(ledger: str, meters: list[str]) -> list[Finding]:
    """Look at the key, Stripe, the meters, the ledger and tiktoken."""
    return [*_stripe(meters), *_ledger(ledger), _tiktoken()]


def _stripe(names: list[str]) -> Iterator[Finding]:
    try:
        gateway = new_gateway()
    except MeteringError as error:
        yield Finding("key", "fail", str(error))
        return
    yield Finding("key", "ok", f"a key for {'test mode' if gateway.is_test else 'live mode'}")
    try:
        known = {meter.event_name: meter for meter in gateway.meters()}
    except MeteringError as error:
        yield _unanswered(error, names)
        return
    else:
        yield Finding("Stripe", "ok", f"answers, and has {counted(len(known), 'meter')}")
        for name in names or sorted(known):
            yield _meter(name, known.get(name), wanted=bool(names))
        yield from _customers(gateway)
    finally:
        gateway.close()


def _customers(gateway: Gateway) -> Iterator[Finding]:
    try:
        gateway.find_customers(Reference("email", "nobody@example.com"), "")
    except MeteringError as error:
        said = str(error)
        if getattr(error.__cause__, "http_status", None) == 403:
            said = "the key may not look them up. Where an e-mail, a name or a phone number says who pays"
            said += ", give it 'Customers: Read'; ids need no such right."
        yield Finding("customers", "warn", said)


def _unanswered(error: MeteringError, names: list[str]) -> Finding:
    """Why Stripe did not list the meters. A key that may only send events is a good one, unless meters were named."""
    if getattr(error.__cause__, "http_status", None) != 403:
        return Finding("Stripe", "fail", str(error))
    remedy = "Give the key 'Billing meters: Read', so that meters can be checked."
    return Finding("meters", "fail" if names else "warn", f"{str(error).rstrip('.')}. {remedy}")


def _meter(name: str, meter: MeterInfo | None, *, wanted: bool) -> Finding:
    problem = problem_with(name, meter)
    if problem is not None:
        return Finding(f"meter {name}", "fail" if wanted else "warn", problem)
    return Finding(f"meter {name}", "ok", "active, sums up, no window")


def _ledger(url: str) -> Iterator[Finding]:
    from langchain_stripe_meter.ledger import views
    from langchain_stripe_meter.ledger.store import Ledger

    try:
        ledger = Ledger(url)
        path = Path(str(ledger.database.url.database))
        if ledger.database.is_sqlite and not path.exists():
            yield _to_be_made(path)
            return
        try:
            ledger.set_note("doctor", "." * _ROOM)  # committed: before that, SQLite may not have touched the disk
            ledger.set_note("doctor", None)
            now = views.status(ledger)
            foreign = list(_belongs(ledger))
        finally:
            ledger.close()
    except MeteringError as error:
        yield Finding("ledger", "fail", str(error))
        return
    said = f"writable: {now.pending:,} pending, {now.delivered:,} delivered"
    yield from foreign or [Finding("ledger", "ok", said)]
    yield from _attention(now)


def _belongs(ledger: Ledger) -> Iterator[Finding]:
    """Whether the key is of the ledger's account and mode."""
    from langchain_stripe_meter.delivery.guard import refuse_foreign
    from langchain_stripe_meter.ledger.store import ACCOUNT, LIVEMODE, refuse_other_mode

    try:
        with open_gateway() as gateway:
            refuse_other_mode(ledger.note(LIVEMODE), is_test=gateway.is_test)
            refuse_foreign(ledger.note(ACCOUNT), gateway.account_id())
    except ForeignLedgerError as error:
        yield Finding("ledger", "fail", str(error))
    except MeteringError:  # of the key or of Stripe: said above
        return


def _to_be_made(path: Path) -> Finding:
    if os.access(path.parent, os.W_OK):
        return Finding("ledger", "ok", f"{path} will be made by the first run")
    return Finding("ledger", "fail", f"{path.parent} is no folder that can be written to. Give another --ledger.")


def _attention(now: Status) -> Iterator[Finding]:
    waiting = (
        (now.held, "held", "Run: stripe-meter held"),
        (now.rejected, "rejected", "Run: stripe-meter tail"),
        (now.doubtful, "in doubt", "Run: stripe-meter doubtful"),
    )
    for count, what, remedy in waiting:
        if count:
            yield Finding("ledger", "warn", f"{count:,} {what}. {remedy}")
    if now.restored:
        yield Finding("ledger", "warn", now.restored)
    if now.paused:
        yield Finding("ledger", "fail", f"sending is paused: {now.paused}")


def _tiktoken() -> Finding:
    from langchain_stripe_meter.estimate import has_vocabulary

    if has_vocabulary():
        return Finding("tiktoken", "ok", "its vocabulary is here; estimates are close")
    return Finding(
        "tiktoken", "warn", "no vocabulary here (it is downloaded when first used); estimates will be rough. "
        "Set TIKTOKEN_CACHE_DIR to a folder that has it."
    )  # fmt: skip
