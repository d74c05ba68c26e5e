"""The commands about the ledger itself, its leads, and the meters of a Stripe account."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_stripe_meter.cli.shared import (
    JsonOption,
    LedgerOption,
    clear_errors,
    console,
    errors,
    fail,
    file_of,
    new_ledger,
    open_gateway,
    open_ledger,
    print_json,
    rows,
    say,
)
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    from rich.status import Status

    from langchain_stripe_meter.gateway.client import MeterInfo
    from langchain_stripe_meter.ledger.store import Ledger


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
        if display_name not in (None, made.display_name):
            said += f" It was there before, and is still called {made.display_name!r}."
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
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remember who is behind a session. What somebody typed into a chat proves nothing."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.leads import Leads

        claimed = Leads(opened).capture(
            session, email=email, name=name, phone=phone, region=region, account=account,
            bill_from="first_message" if from_first else "now",
        )  # fmt: skip
        also = f" {counted(claimed, 'skipped reading')} will be billed too." if from_first else ""
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
        from langchain_stripe_meter.ledger.leads import sessions_known

        count = sessions_known(opened)
        say(f"Leads of {counted(count, 'session')} are known.", {"sessions": count}, as_json=as_json)


@ledger_app.command()
def path(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Where the ledger is, or will be once the first run makes it."""
    with clear_errors(as_json=as_json), closing(new_ledger(ledger)) as opened:
        file = file_of(opened)
        where = opened.database.address if file is None else str(opened.database.url.set(database=str(file)))
        say(where, {"ledger": where}, as_json=as_json)


@ledger_app.command()
def upgrade(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Bring the ledger's tables up to date, or make them (SQLite's do it by themselves)."""
    with clear_errors(as_json=as_json):
        from langchain_stripe_meter.ledger.database import upgrade as migrate
        from langchain_stripe_meter.ledger.schema import HEAD

        migrate(ledger or DEFAULT_LEDGER)
        say("The ledger is up to date.", {"schema": HEAD}, as_json=as_json)


TELL_EVERY = 1_000
"""Rows between two words of progress."""


def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; standard output by default.")] = None,
    ledger: LedgerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of CSV.")] = False,
) -> None:
    """Every reading and what became of it, as CSV or JSON lines."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened, errors.status("exporting") as shown:
        if file is None:
            _export(opened, sys.stdout, shown, as_json=as_json)
            return
        try:
            count = _export_to(file, opened, shown, as_json=as_json)
        except OSError as error:
            fail(f"{file} cannot be written: {error.strerror}. Give another path.", as_json=as_json)
    console.print(f"{counted(count, 'reading')} written to {file}.", soft_wrap=True)


def _export_to(file: Path, ledger: Ledger, shown: Status, *, as_json: bool) -> int:
    """Whole or not at all: what stands under that name stays until the new one is complete."""
    from langchain_stripe_meter.ledger.opening import files_of

    own = files_of(ledger.database.url)
    if any(file.resolve() == one.resolve() or (file.exists() and one.exists() and file.samefile(one)) for one in own):
        raise ConfigurationError(f"{file} is the ledger's own; an export would destroy it. Give another path.")
    if file.exists() and not file.is_file():  # a pipe, a device
        with file.open("w", newline="", encoding="utf-8") as stream:
            return _export(ledger, stream, shown, as_json=as_json)
    file = file.resolve()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", newline="", encoding="utf-8") as stream:
            count = _export(ledger, stream, shown, as_json=as_json)
        if file.exists():
            shutil.copymode(file, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _export(ledger: Ledger, stream: Any, shown: Status, *, as_json: bool) -> int:
    from langchain_stripe_meter.ledger import views

    names = [field.name for field in dataclasses.fields(views.Row)]
    writer = csv.DictWriter(stream, names)
    rows = views.every(ledger)
    first = list(islice(rows, 1))  # a ledger that cannot be read fails here, with nothing on standard output
    if not as_json:
        writer.writeheader()
    count = 0
    for row in chain(first, rows):
        plain = {name: getattr(row, name) for name in names}
        if as_json:
            stream.write(json.dumps(plain, default=str) + "\n")
        else:
            writer.writerow({**plain, "dimensions": json.dumps(plain["dimensions"])})
        count += 1
        if count % TELL_EVERY == 0:
            shown.update(f"{count:,} readings")
    return count


def prune(
    older_than: Annotated[int, typer.Option(help="Days; at least 36, as Stripe takes usage of 35.", max=36_500)] = 40,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Make the file smaller too; nobody can record meanwhile.")
    ] = False,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what is final and old; its sums are kept."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import keeping

        with errors.status("pruning") as shown:
            done = keeping.prune(opened, older_than, progress=_telling(shown, "rows looked at"))
            if shrink:
                shown.update("shrinking the file")
                keeping.shrink(opened)
    said = f"{done.readings:,} readings of more than {older_than} days were pruned; their sums are kept."
    said += f" So were {done.leads:,} leads that nothing has asked for in a year." if done.leads else ""
    say(said, dataclasses.asdict(done), as_json=as_json)


def _telling(shown: Status, what: str) -> Callable[[int, int], None]:
    return lambda done, all_: shown.update(f"{done:,} of {all_:,} {what}")


@ledger_app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where to; must not exist.")],
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the ledger (SQLite) as it stands now, while others go on recording."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.epoch import backup as copy

        with errors.status("copying") as shown:
            size = copy(opened, file, progress=_telling(shown, "pages"))
    say(f"The ledger is copied to {file} ({size:,} bytes).", {"file": str(file), "bytes": size}, as_json=as_json)


@ledger_app.command()
def restored(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Say that the ledger was restored from a backup, before anything is sent (SQLite's is noticed by itself)."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.epoch import restored as mark

        mark(opened)
    said = "Noted. What is unsent and older than 23 hours is compared with Stripe's sums before it is sent."
    say(said, {"restored": True}, as_json=as_json)
