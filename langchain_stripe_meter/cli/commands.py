"""The commands. What is heavy is imported inside them, so that ``--help`` is quick."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_stripe_meter.cli.show import (
    JsonOption,
    LedgerOption,
    clear_errors,
    console,
    fail,
    print_json,
    record,
    rows,
)

if TYPE_CHECKING:
    from langchain_stripe_meter.delivery.courier import Courier
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger

app = typer.Typer(
    help="Bill LLM usage through Stripe meters.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
meters_app = typer.Typer(help="The meters of your Stripe account.", invoke_without_command=True)
leads_app = typer.Typer(help="What is known of the people behind sessions.", no_args_is_help=True)
ledger_app = typer.Typer(help="The ledger's database itself.", no_args_is_help=True)
app.add_typer(meters_app, name="meters")
app.add_typer(leads_app, name="leads")
app.add_typer(ledger_app, name="ledger")

DEFAULT_LEDGER = "sqlite:///stripe_meter.db"


def open_ledger(url: str | None) -> Ledger:
    """The ledger, which must exist already: a mistyped path must not create an empty one."""
    from langchain_stripe_meter.ledger.store import Ledger

    ledger = Ledger(url or DEFAULT_LEDGER)
    if ledger.database.is_sqlite and not Path(str(ledger.database.url.database)).exists():
        where = ledger.database.url.database
        fail(f"There is no ledger at {where}. Give its address with --ledger or $STRIPE_METER_LEDGER.")
    return ledger


def open_gateway() -> Gateway:
    """Stripe, by ``$STRIPE_API_KEY``."""
    from langchain_stripe_meter.gateway.client import Gateway

    return Gateway()


@app.command()
def demo(
    live: Annotated[bool, typer.Option("--live", help="Against Stripe itself, with a test key.")] = False,
) -> None:
    """A chain and an agent, billed before your eyes: without an account and without a network."""
    try:
        import langchain.agents  # noqa: F401
    except ImportError:
        fail("The demo builds a real agent. Run: pip install 'langchain-stripe-meter[agents]'")
    with clear_errors():
        from langchain_stripe_meter.cli.demo import run

        if not run(console, live=live):
            raise typer.Exit(1)


@app.command()
def status(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Counts and ages: what is delivered, pending, held, skipped, rejected, in doubt."""
    with clear_errors():
        from langchain_stripe_meter.ledger import views

        record(views.status(open_ledger(ledger)), as_json=as_json)


@app.command()
def tail(
    number: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 20,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest usage, and what became of it."""
    with clear_errors():
        from langchain_stripe_meter.ledger import views

        rows(
            views.tail(open_ledger(ledger), number),
            as_json=as_json,
            empty="Nothing is recorded yet.",
            hide=("identifier",),
        )


@app.command()
def held(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """What waits for Stripe to know a customer, or for a person."""
    with clear_errors():
        from langchain_stripe_meter.ledger import views

        rows(views.held(open_ledger(ledger)), as_json=as_json, empty="Nothing is held.")


@app.command()
def assign(
    ids: Annotated[list[int], typer.Argument(help="Ids of held readings, as 'held' shows them.")],
    customer: Annotated[str | None, typer.Option(help="Who pays: 'cus_…'.")] = None,
    value: Annotated[str | None, typer.Option(help="How much each, where no amount is known.")] = None,
    ledger: LedgerOption = None,
) -> None:
    """Settle held readings: who pays, and how much where no amount is known."""
    with clear_errors():
        from langchain_stripe_meter.ledger import views

        moved = views.assign(open_ledger(ledger), ids, customer, value)
        console.print(f"{moved} of {len(ids)} readings will be sent.")
        if moved < len(ids):
            fail("The others are not held, or still lack a customer or an amount: see 'stripe-meter held'.", 1)


@app.command()
def retry(ledger: LedgerOption = None) -> None:
    """Try held and rejected things again."""
    with clear_errors():
        from langchain_stripe_meter.ledger import views

        console.print(f"{views.retry(open_ledger(ledger))} will be tried again. Run: stripe-meter deliver --once")


@app.command()
def deliver(
    once: Annotated[bool, typer.Option("--once", help="Stop when nothing is pending.")] = False,
    timeout: Annotated[float, typer.Option(help="With --once: at most so many seconds.", min=0)] = 60,
    ledger: LedgerOption = None,
) -> None:
    """Send what is recorded, until Ctrl-C or SIGTERM."""
    with clear_errors():
        from langchain_stripe_meter.delivery.courier import Courier

        opened = open_ledger(ledger)
        courier = Courier(opened, open_gateway())
        stopping = threading.Event()
        _stop_on_signals(stopping)
        pending = _deliver(courier, stopping, time.monotonic() + timeout if once else None)
        courier.close(10)
        console.print(f"{courier.delivered} delivered, {courier.rejected} rejected, {pending} pending.")
        if pending and once:
            raise typer.Exit(1)


def _stop_on_signals(stopping: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())


def _deliver(courier: Courier, stopping: threading.Event, deadline: float | None) -> int:
    from langchain_stripe_meter.ledger import views

    with console.status("delivering") as shown:
        while True:
            courier.wake()
            with courier.ledger.read() as connection:
                pending = views.pending(connection)
            shown.update(f"{courier.delivered} delivered, {pending} pending")
            done = deadline is not None and (not pending or time.monotonic() > deadline)
            if done or stopping.wait(0.1 if deadline is not None else 1):
                return pending


@app.command()
def verify(
    since: Annotated[int, typer.Option(help="Usage since then, in Unix seconds.", min=0)] = 0,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold the ledger against Stripe's own sums; exit code 1 on a difference."""
    with clear_errors():
        from langchain_stripe_meter.audit.verify import verify as compare

        with console.status("asking Stripe") as shown:
            found = compare(
                open_ledger(ledger),
                open_gateway(),
                since,
                progress=lambda done, all_: shown.update(f"{done} of {all_}"),
            )
    rows(found.comparisons, as_json=as_json, empty="Nothing was recorded in that time.")
    if not found.agrees:
        names = ", ".join(
            f"{one.customer} on {one.event_name} by {one.difference:+,}" for one in found.differences[:10]
        )
        fail(f"Stripe differs for {names}. Its sums lag behind: look again in a few minutes.", 1)


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; standard output by default.")] = None,
    ledger: LedgerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of CSV.")] = False,
) -> None:
    """Every reading and what became of it, as CSV or JSON lines."""
    with clear_errors():
        opened = open_ledger(ledger)
        if file is None:
            _export(opened, sys.stdout, as_json=as_json)
            return
        with file.open("w", newline="") as stream:
            count = _export(opened, stream, as_json=as_json)
        console.print(f"{count:,} readings written to {file}.")


def _export(ledger: Ledger, stream: Any, *, as_json: bool) -> int:
    import dataclasses
    import json

    from langchain_stripe_meter.ledger import views

    names = [field.name for field in dataclasses.fields(views.Row)]
    writer = csv.DictWriter(stream, names)
    if not as_json:
        writer.writeheader()
    count = 0
    for row in views.every(ledger):
        plain = dataclasses.asdict(row)
        if as_json:
            stream.write(json.dumps(plain, default=str) + "\n")
        else:
            writer.writerow(plain)
        count += 1
    return count


@meters_app.callback()
def meters(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the meters of your Stripe account, and what is wrong with them."""
    if context.invoked_subcommand is not None:
        return
    with clear_errors():
        found = open_gateway().meters()
        if as_json:
            import dataclasses

            print_json([{**dataclasses.asdict(meter), "problem": meter.problem} for meter in found])
            return
        hide = ("id", "customer_key", "value_key")
        rows(found, as_json=False, empty="No meters yet. Run: stripe-meter meters create ai_tokens", hide=hide)
        for meter in found:
            if meter.problem:
                console.print(f"[yellow]{meter.problem}[/]")


@meters_app.command()
def create(
    event_name: Annotated[str, typer.Argument(help="The event name, such as 'ai_tokens'.")],
    display_name: Annotated[str | None, typer.Option(help="How invoices call it.")] = None,
) -> None:
    """Make a meter that sums up what it is sent."""
    with clear_errors():
        made = open_gateway().create_meter(event_name, display_name)
        console.print(f"The meter {made.event_name!r} is there: {made.id}.")


@leads_app.command()
def capture(
    session: str,
    email: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    phone: Annotated[str | None, typer.Option()] = None,
    ledger: LedgerOption = None,
) -> None:
    """Remember who is behind a session. What somebody typed into a chat proves nothing."""
    with clear_errors():
        from langchain_stripe_meter.ledger.store import Leads

        Leads(open_ledger(ledger)).capture(session, email=email, name=name, phone=phone)
        console.print("Captured. Runs of that session are billed from now on.")


@leads_app.command()
def forget(session: str, ledger: LedgerOption = None) -> None:
    """Erase what was captured for a session."""
    with clear_errors():
        from langchain_stripe_meter.ledger.store import Leads

        if not Leads(open_ledger(ledger)).forget(session):
            fail("Nothing was captured for that session.", 1)
        console.print("Forgotten.")


@ledger_app.command()
def path(ledger: LedgerOption = None) -> None:
    """Where the ledger is."""
    with clear_errors():
        console.print(open_ledger(ledger).database.url.render_as_string(hide_password=True), soft_wrap=True)


@ledger_app.command()
def upgrade(ledger: LedgerOption = None) -> None:
    """Bring the ledger's tables up to date (PostgreSQL; SQLite does it by itself)."""
    with clear_errors():
        from langchain_stripe_meter.ledger.database import upgrade as migrate

        migrate(ledger or DEFAULT_LEDGER)
        console.print("The ledger is up to date.")


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 12111,
    meter: Annotated[list[str] | None, typer.Option(help="Create a meter with this event name.")] = None,
    customer: Annotated[list[str] | None, typer.Option(help="Create a customer with this e-mail.")] = None,
) -> None:
    """A local Stripe for your own tests, until Ctrl-C."""
    with clear_errors():
        from langchain_stripe_meter.sandbox import StripeSandbox

        stopping = threading.Event()
        _stop_on_signals(stopping)
        with StripeSandbox(port=port) as running:
            for event_name in meter or ["ai_tokens"]:
                running.create_meter(event_name)
                console.print(f"# meter {event_name}")
            for email in customer or []:
                console.print(f"# customer {running.create_customer(email=email)} {email}")
            for variable, value in running.environment().items():
                console.print(f"export {variable}={value}", highlight=False, soft_wrap=True)
            sys.stdout.flush()
            stopping.wait()


@app.command()
def doctor(
    meter: Annotated[list[str] | None, typer.Option(help="A meter that you bill on, by its event name.")] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is everything set up? Exit code 1 if not."""
    from langchain_stripe_meter.cli.doctor import examine

    findings = examine(ledger or os.environ.get("STRIPE_METER_LEDGER") or DEFAULT_LEDGER, meter or [])
    rows(findings, as_json=as_json, empty="")
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)
