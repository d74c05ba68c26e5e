"""``stripe-meter doctor``: what is set up, what is not, and what to do."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import Gateway


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
        gateway = Gateway()
    except MeteringError as error:
        yield Finding("key", "fail", str(error))
        return
    mode = "test mode" if gateway.is_test else "live mode"
    yield Finding("key", "ok", f"a key for {mode}")
    try:
        known = {meter.event_name: meter for meter in gateway.meters()}
    except MeteringError as error:
        yield Finding("meters", "warn" if names == [] else "fail", f"{error} Reading meters needs its own permission.")
        return
    yield Finding("Stripe", "ok", f"answers, and has {len(known)} meters")
    for name in names or sorted(known):
        meter = known.get(name)
        if meter is None:
            yield Finding(f"meter {name}", "fail", f"not there. Run: stripe-meter meters create {name}")
        elif meter.problem:
            yield Finding(f"meter {name}", "fail" if names else "warn", meter.problem)
        else:
            yield Finding(f"meter {name}", "ok", "active, sums up, no window")


def _ledger(url: str) -> Iterator[Finding]:
    from langchain_stripe_meter.ledger import views
    from langchain_stripe_meter.ledger.store import Ledger

    try:
        ledger = Ledger(url)
        path = Path(str(ledger.database.url.database))
        if ledger.database.is_sqlite and not path.exists():
            yield Finding("ledger", "ok", f"{path} will be made by the first run")
            return
        now = views.status(ledger)
        ledger.close()
    except MeteringError as error:
        yield Finding("ledger", "fail", str(error))
        return
    yield Finding("ledger", "ok", f"{now.pending} pending, {now.delivered} delivered")
    if ledger.database.is_sqlite and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("ledger", "warn", f"others may read {path}. Run: chmod 600 {path}")
    for count, what in ((now.held, "held"), (now.rejected, "rejected"), (now.doubtful, "in doubt")):
        if count:
            yield Finding("ledger", "warn", f"{count} {what}: a person should look (stripe-meter held, tail)")
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
