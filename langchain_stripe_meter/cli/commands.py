"""The commands. What is heavy is imported inside them, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_stripe_meter.cli.acts import acts_app
from langchain_stripe_meter.cli.deliver import deliver
from langchain_stripe_meter.cli.doubts import doubtful_app
from langchain_stripe_meter.cli.groups import leads_app, ledger_app, meters_app
from langchain_stripe_meter.cli.keeping import export, prune
from langchain_stripe_meter.cli.show import (
    BillingDayOption,
    JsonOption,
    LedgerOption,
    clear_errors,
    console,
    errors,
    fail,
    from_ranges,
    print_json,
    record,
    rows,
    say,
)
from langchain_stripe_meter.cli.world import open_gateway, open_ledger, until_stopped
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    from langchain_stripe_meter.sandbox import StripeSandbox

app = typer.Typer(
    help="Bill LLM usage through Stripe meters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # they would show keys
)
app.add_typer(meters_app, name="meters")
app.add_typer(leads_app, name="leads")
app.add_typer(ledger_app, name="ledger")
app.add_typer(doubtful_app, name="doubtful")
app.add_typer(acts_app)


@app.command()
def demo(
    live: Annotated[bool, typer.Option("--live", help="Against Stripe itself, with a test key.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A real agent, billed before your eyes: no account, no network."""
    try:
        import langchain.agents  # noqa: F401
        import langgraph.graph  # noqa: F401
    except ImportError:
        fail("The demo builds a real agent. Run: pip install 'langchain-stripe-meter[agents]'", as_json=as_json)
    with clear_errors(as_json=as_json):
        from langchain_stripe_meter.cli.demo import run

        played = run(live=live, quiet=as_json)
    if as_json:
        print_json(played.plain())
    if not played.agrees:
        raise typer.Exit(1)


@app.command()
def status(billing_day: BillingDayOption = 1, ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Counts and ages: delivered, pending, held, skipped and why."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from dataclasses import asdict

        from langchain_stripe_meter.audit.chores import Ages
        from langchain_stripe_meter.ledger import views

        known = asdict(views.status(opened)) | {"alarms": Ages(opened, billing_day=billing_day).standing()}
        for of_a_handler in ("open_runs", "abandoned", "unrecorded", "unrecorded_amounts"):
            del known[of_a_handler]
        record({**known, "why_skipped": views.why_skipped(opened)}, as_json=as_json)


@app.command()
def tail(
    number: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 20,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest usage, and what became of it."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import views

        newest = views.tail(opened, number)
        hide = () if any(row.estimated for row in newest) else ("estimated",)
        rows(newest, as_json=as_json, empty="Nothing is recorded yet.", hide=hide)


@app.command()
def held(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """What waits for Stripe to know a customer, or for a person."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import views

        found = views.held(opened)
        rows(found, as_json=as_json, empty="Nothing is held.")
        if found and not as_json:
            console.print(views.WHAT_TO_RUN, soft_wrap=True)


@app.command()
def skips(
    since: Annotated[int, typer.Option(help="Usage since then, in Unix seconds.", min=0)] = 0,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """What went unbilled because nobody was named: per day, meter and reason."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.views import skips as unbilled

        rows(unbilled(opened, since), as_json=as_json, empty="Nothing was skipped.")


@app.command()
def forget(
    *,
    email: Annotated[str | None, typer.Option()] = None,
    phone: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    session: Annotated[str | None, typer.Option(help="Whoever was captured for this session.")] = None,
    customer: Annotated[str | None, typer.Option(help="'cus_…': what points to this customer.")] = None,
    region: Annotated[str | None, typer.Option(help="Where a phone without '+' is dialled, such as DE.")] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase a person; amounts are kept. Exit code 1 if it must be run again."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from dataclasses import asdict

        from langchain_stripe_meter.ledger.forget import forget as erase

        done = erase(opened, email=email, phone=phone, name=name, session=session, customer=customer, region=region)
        record(asdict(done), as_json=as_json)
    if not done.complete:
        fail(done.advice, 1)


@app.command()
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
    said = f"{moved} of {len(numbers)} readings will be sent. Run: stripe-meter deliver --once"
    say(said, {"moved": moved, "asked": len(numbers)}, as_json=as_json)
    if moved < len(numbers):
        fail("The others still lack a customer or an amount: see 'stripe-meter held'.", 1)


@app.command()
def retry(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Try held and rejected things again."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import sealing

        count = sealing.retry(opened)
        said = f"{count} will be tried again. Run: stripe-meter deliver --once"
        say(said if count else "Nothing can be tried again.", {"retried": count}, as_json=as_json)


app.command()(deliver)


@app.command()
def verify(
    since: Annotated[int, typer.Option(help="Usage since then, in Unix seconds.", min=0)] = 0,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold the ledger against Stripe's sums; exit code 1 if they differ."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened, open_gateway() as gateway:
        from dataclasses import asdict

        from langchain_stripe_meter.audit.verify import verify as compare

        opened.pin(is_test=gateway.is_test)
        with errors.status("asking Stripe") as shown:
            found = compare(
                opened,
                gateway,
                since,
                progress=lambda done, all_: shown.update(f"{done} of {all_}"),
            )
    if as_json:
        compared = [(one, {"difference": one.difference, "agrees": not one.difference}) for one in found.comparisons]
        print_json([asdict(one) | judged for one, judged in compared])
    else:
        rows(found.comparisons, as_json=False, empty="Nothing was recorded in that time.")
    if not found.agrees:
        names = ", ".join(
            f"{one.customer} on {one.event_name} by {one.difference:+,}" for one in found.differences[:10]
        )
        fail(f"Stripe differs for {names}. Its sums lag behind: look again in a few minutes.", 1)


app.command()(export)
app.command()(prune)


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 12111,
    meter: Annotated[list[str] | None, typer.Option(help="Create a meter with this event name.")] = None,
    customer: Annotated[
        list[str] | None, typer.Option(help="Create a customer with this e-mail, or this 'cus_…'.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """A local Stripe for your own tests, until Ctrl-C."""
    with clear_errors(as_json=as_json), until_stopped() as stopping:
        from langchain_stripe_meter.sandbox import StripeSandbox

        running = StripeSandbox(port=port)
        try:
            running.start()
        except OSError as error:
            said = (
                f"Port {port} cannot be used: {error.strerror}. Give another with --port, or --port 0 for a free one."
            )
            fail(said, as_json=as_json)
        try:
            _furnish(running, list(dict.fromkeys(meter or ["ai_tokens"])), customer or [], as_json=as_json)
            stopping.wait()
        finally:
            running.stop()


def _furnish(running: StripeSandbox, meters: list[str], whom: list[str], *, as_json: bool) -> None:
    for event_name in meters:
        running.create_meter(event_name)
    customers = {_make(running, named): named for named in whom}
    lines = [f"# meter {event_name}" for event_name in meters]
    lines += [f"# customer {customer} {named}".removesuffix(f" {customer}") for customer, named in customers.items()]
    lines += [f"export {variable}={value}" for variable, value in running.environment().items()]
    facts = {"environment": running.environment(), "meters": meters, "customers": customers}
    say("\n".join(lines), facts, as_json=as_json)
    sys.stdout.flush()


def _make(running: StripeSandbox, named: str) -> str:
    return running.create_customer(id=named) if named.startswith("cus_") else running.create_customer(email=named)


@app.command()
def settings(
    file: Annotated[Path, typer.Argument(help="A .toml or .json file of MeteringSettings.")],
    as_json: JsonOption = False,
) -> None:
    """Check a file of settings, and say what it means."""
    with clear_errors(as_json=as_json):
        from langchain_stripe_meter.settings import MeteringSettings

        read = MeteringSettings.from_file(file)
        if as_json:
            print_json({**read.model_dump(mode="json"), "ledger": read.shown_ledger()})
            return
        record(read.in_words(), as_json=False)


@app.command()
def doctor(
    meter: Annotated[list[str] | None, typer.Option(help="A meter that you bill on, by its event name.")] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is everything set up? Exit code 1 if not."""
    from langchain_stripe_meter.cli.doctor import examine

    findings = examine(ledger or DEFAULT_LEDGER, meter or [])
    rows(findings, as_json=as_json, empty="")
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)
