"""Where the demo plays: a ledger, two meters, four customers, and Stripe, local or real; and its last word."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import product
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from langchain_stripe_meter import StripeMeterCallbackHandler
from langchain_stripe_meter.core.customers import CustomerSource
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.gateway.client import Gateway, as_stripe_error
from langchain_stripe_meter.gateway.meters import make_meter
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

LIVE_WAIT_SECONDS = 180
"""How long Stripe's own summaries may lag behind before the demo gives up on them."""
PEOPLE = ("acme", "ann", "bob", "lead")


@dataclass(frozen=True, slots=True)
class Compared:
    """One customer on one meter: what the ledger recorded, and what Stripe's summaries bill."""

    meter: str
    customer: str
    recorded: Decimal
    billed: Decimal

    @property
    def agrees(self) -> bool:
        """Whether Stripe bills exactly what was recorded."""
        return self.recorded == self.billed


@dataclass(frozen=True, slots=True)
class Played:
    """How the demo came out; ``delivered`` counts meter events."""

    compared: tuple[Compared, ...]
    delivered: int
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether anything was recorded at all, and all of it billed exactly."""
        return any(one.recorded for one in self.compared) and all(one.agrees for one in self.compared)

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"agrees": self.agrees, **asdict(self), "seconds": round(self.seconds, 1)}


@dataclass
class Stage:
    """What every scene works with. ``customers`` maps the names of people to their ids at Stripe."""

    console: Console
    address: str
    gateway: Gateway
    tokens: str
    credits: str
    customers: dict[str, str]
    emails: dict[str, str]
    sandbox: StripeSandbox | None
    ledger: Ledger
    step: int = 0
    delivered: int = 0
    _shown: set[str] = field(default_factory=set)

    def title(self, text: str) -> None:
        """A scene begins."""
        self.step += 1
        self.console.print(f"\n[bold cyan]{self.step}[/]  [bold]{text}[/]")

    def say(self, text: str) -> None:
        """A sentence of a scene."""
        self.console.print(Padding(text, (0, 0, 0, 3), expand=False))

    @contextmanager
    def handler(self, meter: Meter, customer: CustomerSource | str) -> Iterator[StripeMeterCallbackHandler]:
        """A handler of its own for each scene, all on one ledger."""
        handler = StripeMeterCallbackHandler(meter, customer=customer, ledger=self.address, stripe=self.gateway.client)
        try:
            yield handler
            self.delivered += handler.flush(30).delivered
        finally:
            handler.close()

    def new_rows(self) -> list[views.Row]:
        """What the ledger has recorded since it was last shown."""
        return [row for row in views.tail(self.ledger, 100) if row.identifier not in self._shown]

    def show_recorded(self) -> None:
        """What the scene left in the ledger, read from the ledger."""
        rows = self.new_rows()
        self._shown |= {row.identifier for row in rows}
        sums: dict[str, Decimal] = {}
        for row in rows:
            if row.state != "skipped" and row.value is not None:
                who = self.name_of(row.customer)
                sums[who] = sums.get(who, Decimal(0)) + row.value
        said = [f"{who} {value:,}" for who, value in sums.items()]
        skipped = sum(row.state == "skipped" for row in rows)
        if skipped:
            said.append(f"{skipped} skipped")
        if said:
            unit = "credits" if rows[0].event_name == self.credits else "tokens"
            self.say(f"[green]→[/] [dim]recorded ({unit}):[/] {', '.join(said)}")

    def name_of(self, customer: str | None) -> str:
        """The person behind a customer's id."""
        names = {id_: name for name, id_ in self.customers.items()}
        return names.get(customer or "", customer or "?")

    def compare(self) -> tuple[Compared, ...]:
        """The ledger against Stripe, for everybody on both meters. The real Stripe lags, so it is given time."""
        deadline = time.monotonic() + (LIVE_WAIT_SECONDS if self.sandbox is None else 5)
        with self.console.status("waiting for Stripe's summaries"):
            while True:
                compared = self._compare()
                if all(one.agrees for one in compared) or time.monotonic() > deadline:
                    return compared
                time.sleep(1)

    def _compare(self) -> tuple[Compared, ...]:
        recorded = {key: sum(states.values(), Decimal(0)) for key, states in views.totals(self.ledger).items()}
        everybody = [*product((self.tokens, self.credits), self.customers.values())]
        keys = dict.fromkeys([*everybody, *recorded])  # also what was recorded for somebody unexpected
        compared = [
            Compared(event_name, self.name_of(who), recorded.get((event_name, who), Decimal(0)),
                     self._billed(event_name, who))
            for event_name, who in keys
        ]  # fmt: skip
        return tuple(one for one in compared if one.recorded or one.billed)

    def _billed(self, event_name: str, customer: str) -> Decimal:
        meter = self.gateway.meter(event_name)
        now = int(time.time()) // 60 * 60
        found = self.gateway.billed(meter.id, customer, now - 3600, now + 600) if meter else None
        return found or Decimal(0)


@contextmanager
def open_stage(console: Console, *, live: bool) -> Iterator[Stage]:
    """Set everything up, and clear away what is local."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stripe-meter-demo-"))
        sandbox = None if live else stack.enter_context(StripeSandbox())
        gateway = _live_gateway() if sandbox is None else Gateway(sandbox.api_key, api_base=sandbox.url)
        stack.callback(gateway.close)
        suffix = f"_{uuid.uuid4().hex[:8]}" if live else ""
        names = (f"ai_tokens{suffix}", f"message_credits{suffix}")
        for name in names:
            make_meter(gateway, name, None)
        emails = {name: f"{name}{suffix}@example.com" for name in PEOPLE}
        customers = {name: _create_customer(gateway, name, email) for name, email in emails.items()}
        address = f"sqlite:///{folder}/ledger.db"
        ledger = Ledger(address)
        stack.callback(ledger.close)
        yield Stage(console, address, gateway, *names, customers, emails, sandbox, ledger)


def _live_gateway() -> Gateway:
    key = os.environ.get("STRIPE_API_KEY", "")
    if not key.startswith(("sk_test_", "rk_test_")):
        raise ConfigurationError("demo --live needs a test key in $STRIPE_API_KEY (sk_test_… or rk_test_…).")
    return Gateway(key)


def _create_customer(gateway: Gateway, name: str, email: str) -> str:
    with as_stripe_error("create a customer"):
        return str(gateway.client.v1.customers.create({"email": email, "name": name.title()}).id)


def table(compared: tuple[Compared, ...]) -> Table:
    """Recorded against billed, with a bar for each customer's share of its meter."""
    most: dict[str, Decimal] = {}
    for one in compared:
        most[one.meter] = max(most.get(one.meter, Decimal(0)), one.recorded, one.billed)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("meter", "customer"):
        shown.add_column(column)
    for column in ("recorded", "billed"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for one in compared:
        colour = "green" if one.agrees else "red"
        bar = "█" * max(1, round(one.billed / most[one.meter] * 20))
        shown.add_row(
            one.meter, one.customer, f"{one.recorded:,}", f"[{colour}]{one.billed:,}[/]", f"[{colour}]{bar}[/]"
        )
    return shown
