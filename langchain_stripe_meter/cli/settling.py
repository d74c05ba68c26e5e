"""What a person decides about usage that is recorded already, and what there is to decide."""

from __future__ import annotations

from typing import Annotated

import typer

from langchain_stripe_meter.cli.shared import (
    MOST_ROWS,
    JsonOption,
    LedgerOption,
    clear_errors,
    console,
    fail,
    from_ranges,
    open_gateway,
    open_ledger,
    rows,
    say,
)
from langchain_stripe_meter.core.values import counted

settling_app = typer.Typer()

ReasonOption = Annotated[str, typer.Option(help="Why, in one line that names nobody; it is kept.")]


@settling_app.command()
def held(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """What waits for Stripe to know a customer, or for a person."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import views

        found = views.held(opened)
        hide = () if any(one.account for one in found) else ("account",)
        rows(found, as_json=as_json, empty="Nothing is held.", hide=hide)
        if found and not as_json:
            console.print(views.WHAT_TO_RUN, soft_wrap=True)


@settling_app.command()
def skips(
    since: Annotated[int, typer.Option(help="Usage since then, in Unix seconds.", min=0)] = 0,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """What went unbilled because nobody was named: per day, meter and reason."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.core.events import seconds
        from langchain_stripe_meter.ledger.views import skips as unbilled

        rows(unbilled(opened, seconds(since, "since")), as_json=as_json, empty="Nothing was skipped.")


@settling_app.command()
def assign(
    ids: Annotated[list[str], typer.Argument(help="Held readings, as 'held' shows them: 3 or 3-7.")],
    *,
    customer: Annotated[str | None, typer.Option(help="Who pays: 'cus_…'.")] = None,
    value: Annotated[str | None, typer.Option(help="How much each, where no amount is known.")] = None,
    account: Annotated[str | None, typer.Option(help="On which connected account, where tenant= failed.")] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Settle held readings: who pays, and how much where unknown."""
    if customer is None and value is None:
        fail("Say who pays with --customer cus_…, how much with --value, or both.", as_json=as_json)
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import assign as settle

        numbers = from_ranges(ids)
        moved = settle(opened, numbers, customer, value, account)
    said = f"{moved} of {counted(len(numbers), 'reading')} will be sent. Run: stripe-meter deliver --once"
    say(said, {"moved": moved, "asked": len(numbers)}, as_json=as_json)
    if moved < len(numbers):
        fail("The others still lack a customer or an amount: see 'stripe-meter held'.", 1)


@settling_app.command()
def retry(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Try held and rejected things again."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import sealing

        count = sealing.retry(opened)
        said = f"{count} will be tried again. Run: stripe-meter deliver --once"
        say(said if count else "Nothing can be tried again.", {"retried": count}, as_json=as_json)


@settling_app.command()
def acts(
    number: Annotated[int, typer.Option("-n", help="How many.", min=1, max=MOST_ROWS)] = 100,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest decisions of persons and webhooks."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import every_act

        rows(every_act(opened, number), as_json=as_json, empty="Nothing was decided by hand or by a webhook yet.")


@settling_app.command()
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


@settling_app.command(context_settings={"ignore_unknown_options": True})
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


@settling_app.command()
def retime(
    ids: Annotated[list[str], typer.Argument(help="Held readings, as 'held' shows them: 3 or 3-7.")],
    at: Annotated[int | None, typer.Option(help="The new time, in Unix seconds; default now.")] = None,
    not_billed: Annotated[
        bool, typer.Option("--not-billed", help="You have looked: Stripe has none of it. (After a restore.)")
    ] = False,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bill usage that is too old for Stripe, as usage of another time."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.acts import retime as move

        moved = move(opened, from_ranges(ids), at, not_billed=not_billed)
        say(
            f"{counted(moved, 'reading')} will be sent. Run: stripe-meter deliver --once",
            {"moved": moved},
            as_json=as_json,
        )


@settling_app.command()
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
