"""What a person decides about usage that is recorded already: ``cancel``, ``correct``, ``retime``, ``write-off``."""

from __future__ import annotations

from typing import Annotated

import typer

from langchain_stripe_meter.cli.show import JsonOption, LedgerOption, clear_errors, from_ranges, rows, say
from langchain_stripe_meter.cli.world import open_gateway, open_ledger

acts_app = typer.Typer()

ReasonOption = Annotated[str, typer.Option(help="Why, in one line that names nobody; it is kept.")]


@acts_app.command()
def acts(
    number: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 100,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest decisions of persons and webhooks."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import every_act

        rows(every_act(opened, number), as_json=as_json, empty="Nothing was decided by hand or by a webhook yet.")


@acts_app.command()
def cancel(
    identifier: Annotated[str, typer.Argument(help="Of a delivered reading or event, as 'tail' shows it.")],
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take back what was delivered within the last 24 hours; cancelling again is safe."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened, open_gateway() as gateway:
        from langchain_stripe_meter.operations import cancel as take_back

        take_back(opened, gateway, identifier)
        say(f"{identifier} is cancelled.", {"identifier": identifier, "cancelled": True}, as_json=as_json)


@acts_app.command(context_settings={"ignore_unknown_options": True})
def correct(
    customer: Annotated[str, typer.Argument(help="'cus_…'")],
    event_name: Annotated[str, typer.Argument(help="The meter's event name.")],
    value: Annotated[str, typer.Argument(help="The difference, such as -500.")],
    *,
    name: Annotated[str, typer.Option("--id", help="A name for it: the same one is never billed twice.")],
    reason: ReasonOption,
    at: Annotated[int | None, typer.Option(help="The time that it counts for, in Unix seconds.")] = None,
    account: Annotated[str, typer.Option(help="The customer's connected account, 'acct_…'.")] = "",
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct a customer's total on a meter, by a reading of its own."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import correct as record

        identifier = record(opened, customer, event_name, value, reason=reason, id=name, at=at, account=account)
        said = f"Recorded as {identifier}. Run: stripe-meter deliver --once"
        say(said, {"identifier": identifier}, as_json=as_json)


@acts_app.command()
def retime(
    ids: Annotated[list[str], typer.Argument(help="Held readings, as 'held' shows them: 3 or 3-7.")],
    at: Annotated[int | None, typer.Option(help="The new time, in Unix seconds; default now.")] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bill usage that is too old for Stripe, as usage of another time."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import retime as move

        moved = move(opened, from_ranges(ids), at)
        say(f"{moved} readings will be sent. Run: stripe-meter deliver --once", {"moved": moved}, as_json=as_json)


@acts_app.command()
def write_off(
    what: Annotated[list[str], typer.Argument(help="Held readings (3 or 3-7), or identifiers of what is not billed.")],
    *,
    reason: ReasonOption,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decide not to bill what is held, rejected or doubtful."""
    names = [one for one in what if not _is_range(one)]
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import write_off as decide

        ids = from_ranges([one for one in what if _is_range(one)])
        count = decide(opened, [*ids, *names], reason=reason)
        say(f"{count} written off.", {"written_off": count}, as_json=as_json)


def _is_range(text: str) -> bool:
    return text.replace("-", "", 1).isdecimal() and len(text) < 20
