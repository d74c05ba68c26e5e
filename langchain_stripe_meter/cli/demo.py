"""``stripe-meter demo``: a real agent and a real chain, a local Stripe, every promise tried before your eyes."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from langchain_stripe_meter import Credits, StripeMeterCallbackHandler, Tokens, from_lead, from_metadata
from langchain_stripe_meter.cli.scripted import ScriptedModel, says
from langchain_stripe_meter.core.customers import CustomerSource
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer

EVENTS = "/v1/billing/meter_events"
LIVE_WAIT_SECONDS = 180


@dataclass
class Stage:
    """Where the demo plays: a ledger, two meters, four customers, and the way to ask Stripe what it will bill."""

    console: Console
    ledger: str
    gateway: Gateway
    tokens: str
    credits: str
    customers: dict[str, str]
    emails: dict[str, str]
    sandbox: StripeSandbox | None
    step: int = 0
    delivered: int = 0

    def title(self, text: str) -> None:
        self.step += 1
        self.console.print(f"\n[bold cyan]{self.step}[/]  [bold]{text}[/]")

    def say(self, text: str) -> None:
        self.console.print(Padding(text, (0, 0, 0, 3)))

    @contextmanager
    def handler(self, meter: Meter, customer: CustomerSource | str) -> Iterator[StripeMeterCallbackHandler]:
        """A handler of its own for each step, all on one ledger."""
        handler = StripeMeterCallbackHandler(meter, customer=customer, ledger=self.ledger, stripe=self.gateway.client)
        try:
            yield handler
            self.delivered += handler.flush(30).delivered
        finally:
            handler.close()

    def billed(self, event_name: str, customer: str) -> Decimal:
        """What Stripe's own summaries say."""
        meter = self.gateway.meter(event_name)
        now = int(time.time()) // 60 * 60
        found = self.gateway.billed(meter.id, customer, now - 3600, now + 600) if meter else None
        return found or Decimal(0)


def run(console: Console, *, live: bool) -> bool:
    """Play the demo; True if Stripe bills exactly what was recorded."""
    start = time.monotonic()
    with ExitStack() as stack:
        stage = _open(console, stack, live=live)
        for scene in (static_customer, by_metadata, by_lead, message_credits, outage, sent_again):
            scene(stage)
        exact = compare(stage)
    console.print(f"\n{'Recorded and billed agree' if exact else '[red]Recorded and billed differ[/]'}", end="")
    console.print(f", after {time.monotonic() - start:.1f} s and {stage.delivered} delivered events.")
    console.print(
        "Next: attach a handler to your own chain (README.md, 'Use it'), or try [bold]stripe-meter doctor[/]."
    )
    return exact


def _open(console: Console, stack: ExitStack, *, live: bool) -> Stage:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stripe-meter-demo-"))
    ledger = f"sqlite:///{folder}/ledger.db"
    suffix = uuid.uuid4().hex[:8] if live else "demo"
    people = ("acme", "ann", "bob", "lead")
    emails = {name: f"{name}.{suffix}@example.com" for name in people}
    sandbox = None if live else stack.enter_context(StripeSandbox())
    gateway = _live_gateway() if sandbox is None else Gateway(sandbox.api_key, api_base=sandbox.url)
    stack.callback(gateway.close)
    names = (f"ai_tokens_{suffix}", f"credits_{suffix}") if live else ("ai_tokens", "message_credits")
    for name in names:
        gateway.create_meter(name)
    client = gateway.client.v1.customers
    customers = {name: client.create({"email": email, "name": name.title()}).id for name, email in emails.items()}
    where = "Stripe itself (test mode)" if live else f"a local Stripe at {sandbox.url if sandbox else ''}"
    console.print(f"[bold]stripe-meter demo[/]: a LangChain chain and a LangGraph agent, billed through {where}.")
    return Stage(console, ledger, gateway, *names, customers, emails, sandbox)


def _live_gateway() -> Gateway:
    key = os.environ.get("STRIPE_API_KEY", "")
    if not key.startswith(("sk_test_", "rk_test_")):
        raise ConfigurationError("demo --live needs a test key in $STRIPE_API_KEY (sk_test_… or rk_test_…).")
    return Gateway(key)


def chain(model: str, *script: Any) -> Any:
    """A prompt and a model: the plainest chain there is."""
    from langchain_core.prompts import ChatPromptTemplate

    return ChatPromptTemplate.from_template("{question}") | ScriptedModel(model=model, script=list(script))


def agent(model: str) -> Any:
    """An agent that looks an order up with a tool: two model calls for one answer."""
    from langchain.agents import create_agent
    from langchain_core.tools import tool

    @tool
    def order_status(number: int) -> str:
        """Where an order is."""
        return f"Order {number} is on its way."

    script = [
        says("", 210, 18, call={"name": "order_status", "args": {"number": 7}}),
        says("Your order is on its way.", 260, 12),
    ]
    return create_agent(ScriptedModel(model=model, script=script), [order_status])


def ask(runnable: Any, handler: StripeMeterCallbackHandler, **metadata: Any) -> None:
    runnable.invoke({"question": "Where is my order?"}, {"callbacks": [handler], "metadata": metadata})


def static_customer(stage: Stage) -> None:
    stage.title("A static customer pays for everything")
    with stage.handler(Tokens(stage.tokens), stage.customers["acme"]) as meter:
        ask(chain("gpt-4o-mini", says("On its way.", 120, 30)), meter)
        stage.say("One run of a chain, 150 tokens: recorded on disk before the run returned.")


def by_metadata(stage: Stage) -> None:
    stage.title("The customer is in each run's metadata")
    bot = chain("gpt-4o-mini", says("It left our house this morning.", 100, 20))
    with stage.handler(Tokens(stage.tokens), from_metadata("stripe_customer_id")) as meter:
        ask(bot, meter, stripe_customer_id=stage.customers["ann"])
        config = {"callbacks": [meter], "metadata": {"stripe_customer_id": stage.customers["bob"]}}
        for _ in bot.stream({"question": "And mine?"}, config):
            pass
        asyncio.run(bot.ainvoke({"question": "And now?"}, config))
        ask(bot, meter)
        stage.say("Ann asked once; Bob twice, streamed and async. A run without an id was skipped, and counted:")
        stage.say(f"[dim]{meter.flush(30)}[/]")


def by_lead(stage: Stage) -> None:
    stage.title("A conversation whose lead gives an e-mail in the third message")
    bot = chain("gpt-4o-mini", says("Gladly!", 80, 10))
    with stage.handler(Tokens(stage.tokens), from_lead(by="email")) as meter:
        ask(bot, meter, session_id="chat-1")
        ask(bot, meter, session_id="chat-1")
        meter.leads.capture("chat-1", email=stage.emails["lead"])
        ask(bot, meter, session_id="chat-1")
        report = meter.flush(30)
        stage.say(
            f"{report.skipped} messages before it were skipped; the third was billed to the customer with that e-mail."
        )


def message_credits(stage: Stage) -> None:
    stage.title("Message credits: 10 for gpt-4o, 1 for gpt-4o-mini")
    meter = Credits(stage.credits, {"gpt-4o": 10, "gpt-4o-mini": 1})
    with stage.handler(meter, stage.customers["ann"]) as handler:
        question = {"messages": [{"role": "user", "content": "Where is order 7?"}]}
        agent("gpt-4o").invoke(question, {"callbacks": [handler]})
        ask(chain("gpt-4o-mini", says("You're welcome.", 60, 8)), handler)
        stage.say("An agent with a tool called gpt-4o twice for one message: 10. A chain with gpt-4o-mini: 1.")


def outage(stage: Stage) -> None:
    stage.title("Stripe is down, and nothing is lost")
    if stage.sandbox is None:
        stage.say("[dim]Left out: the real Stripe does not go down when asked.[/]")
        return
    bot = chain("gpt-4o-mini", says("Still here.", 40, 10))
    with stage.handler(Tokens(stage.tokens), stage.customers["bob"]) as meter:
        with stage.sandbox.outage():
            for _ in range(3):
                ask(bot, meter)
            down = meter.flush(0.5)
            stage.say(f"Three chats went on as ever while Stripe refused everything: {down.pending} events pending.")
        stage.say(f"Stripe is back: {meter.flush(30).delivered} delivered.")


def sent_again(stage: Stage) -> None:
    stage.title("The same events again, and nothing billed twice")
    if stage.sandbox is None:
        stage.say("[dim]The lost answer is left out: it needs the local Stripe.[/]")
    else:
        stage.sandbox.fail(drop_answer(), path=EVENTS)
    bot = chain("gpt-4o-mini", says("Once is enough.", 30, 5))
    with (
        stage.handler(Tokens(stage.tokens), stage.customers["acme"]) as one,
        stage.handler(Tokens(stage.tokens), stage.customers["acme"]) as two,
    ):
        bot.invoke({"question": "Twice?"}, {"callbacks": [one, two]})
        stage.say("Two handlers recorded the same run: one row in the ledger.")
        one.flush(30)
    if stage.sandbox is not None:
        tries = [r for r in stage.sandbox.requests if r.path == EVENTS and r.params["payload"].get("value") == "35"]
        stage.say(
            f"Stripe took it, but its answer was lost, so it was sent {len(tries)} times under one identifier. "
            "Stripe knew it, and billed it once."
        )


def compare(stage: Stage) -> bool:
    """The last word: recorded against billed, per customer and meter."""
    from langchain_stripe_meter.ledger.store import Ledger
    from langchain_stripe_meter.ledger.views import totals

    stage.title("Recorded against billed")
    ledger = Ledger(stage.ledger)
    recorded = {key: sum(states.values(), Decimal(0)) for key, states in totals(ledger).items()}
    ledger.close()
    billed = _settled(stage, recorded)
    stage.console.print(_table(stage, recorded, billed))
    return recorded == billed


def _settled(stage: Stage, recorded: dict[tuple[str, str], Decimal]) -> dict[tuple[str, str], Decimal]:
    """Stripe's sums, which lag behind on the real one: wait for them with a sign of life."""
    deadline = time.monotonic() + (LIVE_WAIT_SECONDS if stage.sandbox is None else 5)
    with stage.console.status("waiting for Stripe's summaries"):
        while True:
            billed = {key: stage.billed(*key) for key in recorded}
            if billed == recorded or time.monotonic() > deadline:
                return billed
            time.sleep(1)


def _table(stage: Stage, recorded: dict[tuple[str, str], Decimal], billed: dict[tuple[str, str], Decimal]) -> Table:
    names = {customer: name for name, customer in stage.customers.items()}
    most = {event: max(v for (e, _), v in recorded.items() if e == event) for event, _ in recorded}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("   meter", "customer"):
        table.add_column(column)
    for column in ("recorded", "billed"):
        table.add_column(column, justify="right")
    table.add_column("")
    for (event, customer), value in sorted(recorded.items()):
        same = billed[event, customer] == value
        bar = "█" * max(1, round(value / most[event] * 20))
        colour = "green" if same else "red"
        table.add_row(
            f"   {event}", names.get(customer, customer), f"{value:,}", f"[{colour}]{billed[event, customer]:,}[/]",
            f"[{colour}]{bar}[/]",
        )  # fmt: skip
    return table
