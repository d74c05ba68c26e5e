"""``stripe-meter doubtful``: what Stripe may have or not, and a person's word on it."""

from __future__ import annotations

from typing import Annotated

import typer

from langchain_stripe_meter.cli.show import JsonOption, LedgerOption, clear_errors, rows, say
from langchain_stripe_meter.cli.world import open_ledger

doubtful_app = typer.Typer(help="What Stripe may have or not.", invoke_without_command=True)


@doubtful_app.callback()
def doubtful(context: typer.Context, ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """List the events that Stripe may have or not; most are settled by comparing with its sums."""
    if context.invoked_subcommand is not None:
        return
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import doubts

        rows(doubts.doubtful(opened), as_json=as_json, empty="Nothing is in doubt.")


@doubtful_app.command()
def settle(
    identifiers: Annotated[list[str], typer.Argument(help="Identifiers of meter events, as 'doubtful' shows them.")],
    delivered: Annotated[
        bool, typer.Option("--delivered/--absent", help="Stripe has them, or they are sent again.", show_default=False)
    ],
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what Stripe has, after you have looked. With --absent, what Stripe has after all is billed twice."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import doubts

        moved = doubts.settle_doubt(opened, identifiers, delivered=delivered)
    said = f"{moved} of {len(set(identifiers))} events are settled."
    say(said, {"moved": moved, "asked": len(set(identifiers))}, as_json=as_json)
