"""The commands that have commands of their own: ``meters``, ``leads``, ``ledger``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_stripe_meter.cli.show import JsonOption, LedgerOption, clear_errors, console, fail, print_json, rows, say
from langchain_stripe_meter.cli.world import open_gateway, open_ledger
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import MeterInfo

meters_app = typer.Typer(help="The meters of your Stripe account.", invoke_without_command=True)
leads_app = typer.Typer(help="What is known of the people behind sessions.", no_args_is_help=True)
ledger_app = typer.Typer(help="The ledger's database itself.", no_args_is_help=True)


@meters_app.callback()
def meters(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the meters of your Stripe account, and what is wrong with them."""
    if context.invoked_subcommand is not None:
        return
    with clear_errors(as_json=as_json), open_gateway() as gateway:
        found = gateway.meters()
    if as_json:
        print_json([_plain(meter) for meter in found])
        return
    hide = ("id", "customer_key", "value_key", "price")
    rows(found, as_json=False, empty="No meters yet. Run: stripe-meter meters create ai_tokens", hide=hide)
    for meter in found:
        if meter.problem:
            console.print(meter.problem, style="yellow")


def _plain(meter: MeterInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(meter), "problem": meter.problem}


@meters_app.command()
def create(
    event_name: Annotated[str, typer.Argument(help="The event name, such as 'ai_tokens'.")],
    *,
    display_name: Annotated[str | None, typer.Option(help="How invoices call it.")] = None,
    price: Annotated[str | None, typer.Option(help="What one unit costs, in cents, such as 0.002.")] = None,
    currency: Annotated[str | None, typer.Option(help="Of the price, such as usd.")] = None,
    interval: Annotated[str, typer.Option(help="How often it is billed: day, week, month or year.")] = "month",
    account: Annotated[str, typer.Option(help="The connected account, 'acct_…'.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a meter that sums up what it is sent, and with --price a product and a metered price. What is there already
    is not made twice."""
    with clear_errors(as_json=as_json), open_gateway() as gateway:
        from langchain_stripe_meter.core.events import check_account
        from langchain_stripe_meter.gateway.meters import make_meter

        made = make_meter(gateway, event_name, display_name, (price, currency, interval), check_account(account))
        said = f"The meter {made.event_name!r} is there: {made.id}."
        if made.price is not None:
            said += f" Its price: {made.price.id}, for your customers' subscriptions."
        say(said, _plain(made), as_json=as_json)


@leads_app.command()
def capture(
    session: str,
    *,
    email: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    phone: Annotated[str | None, typer.Option()] = None,
    region: Annotated[str | None, typer.Option(help="Where a phone without '+' is dialled, such as DE.")] = None,
    account: Annotated[str, typer.Option(help="The connected account of the session: 'acct_…'.")] = "",
    from_first: Annotated[
        bool, typer.Option("--from-first-message", help="Also bill what was skipped of that session.")
    ] = False,
    by: Annotated[str, typer.Option(help="What your handler's from_lead() reads: email, name or phone.")] = "email",
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remember who is behind a session. What somebody typed into a chat proves nothing."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.core.customers import from_lead
        from langchain_stripe_meter.ledger.leads import Leads

        source = from_lead(by)  # type: ignore[arg-type]
        claimed = Leads(opened, (source.by,)).capture(
            session, email=email, name=name, phone=phone, region=region, account=account,
            bill_from="first_message" if from_first else "now",
        )  # fmt: skip
        also = f" {claimed:,} skipped readings will be billed too." if from_first else ""
        said = f"Captured. Runs of that session are billed from now on.{also}"
        say(said, {"session": session, "captured": True, "claimed": claimed}, as_json=as_json)


@leads_app.command()
def forget(
    session: str,
    account: Annotated[str, typer.Option(help="The connected account of the session: 'acct_…'.")] = "",
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase what was captured for a session."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.leads import Leads

        if not Leads(opened).forget(session, account):
            fail("Nothing was captured for that session.", 1, as_json=as_json)
        say("Forgotten.", {"session": session, "forgotten": True}, as_json=as_json)


@leads_app.command()
def show_count(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """For how many sessions somebody is known; nobody is named."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import views

        count = views.leads_count(opened)
        say(f"Leads of {count:,} sessions are known.", {"sessions": count}, as_json=as_json)


@ledger_app.command()
def path(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Where the ledger is."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        where = opened.database.address
        say(where, {"ledger": where}, as_json=as_json)


@ledger_app.command()
def upgrade(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Bring the ledger's tables up to date, or make them (SQLite's do it by themselves)."""
    with clear_errors(as_json=as_json):
        from langchain_stripe_meter.ledger.database import upgrade as migrate
        from langchain_stripe_meter.ledger.schema import HEAD

        migrate(ledger or DEFAULT_LEDGER)
        say("The ledger is up to date.", {"schema": HEAD}, as_json=as_json)
