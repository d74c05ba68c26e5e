"""The commands. What is heavy is imported inside them, so that ``--help`` is quick."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_stripe_meter.cli.init import init
from langchain_stripe_meter.cli.keeping import export, leads_app, ledger_app, meters_app, prune
from langchain_stripe_meter.cli.settling import doubtful_app, settling_app
from langchain_stripe_meter.cli.shared import (
    MOST_ROWS,
    BillingDayOption,
    JsonOption,
    LedgerOption,
    clear_errors,
    console,
    errors,
    fail,
    in_commands,
    missing_file,
    new_ledger,
    open_gateway,
    open_ledger,
    print_json,
    record,
    rows,
    say,
    until_stopped,
)
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    import threading

    from langchain_stripe_meter.delivery.courier import Courier
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger
    from langchain_stripe_meter.sandbox import StripeSandbox

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # they would show keys
)
app.add_typer(meters_app, name="meters")
app.add_typer(leads_app, name="leads")
app.add_typer(ledger_app, name="ledger")
app.add_typer(doubtful_app, name="doubtful")
app.add_typer(settling_app)


def _say_version(asked: bool) -> None:
    if asked:
        console.print(version("langchain-stripe-meter"))
        raise typer.Exit


@app.callback()
def main(
    show: Annotated[
        bool, typer.Option("--version", help="Say the version, and leave.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Bill LLM usage through Stripe meters."""


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


app.command()(init)


@app.command()
def status(billing_day: BillingDayOption = 1, ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Counts and ages: delivered, pending, held, skipped and why."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from dataclasses import asdict

        from langchain_stripe_meter.audit.chores import Ages
        from langchain_stripe_meter.ledger import views

        alarms = tuple(map(in_commands, Ages(opened, billing_day=billing_day).standing()))
        known = asdict(views.status(opened)) | {"alarms": alarms}
        for of_a_handler in ("open_runs", "abandoned", "unrecorded", "unrecorded_amounts"):
            del known[of_a_handler]
        record({**known, "why_skipped": views.why_skipped(opened)}, as_json=as_json)


@app.command()
def tail(
    number: Annotated[int, typer.Option("-n", help="How many.", min=1, max=MOST_ROWS)] = 20,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest usage, and what became of it."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import views

        newest = views.tail(opened, number)
        seldom = ("estimated", "account", "dimensions")
        hide = [name for name in seldom if not any(getattr(row, name) for row in newest)]
        rows(newest, as_json=as_json, empty="Nothing is recorded yet.", hide=hide)


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
def deliver(
    *,
    once: Annotated[bool, typer.Option("--once", help="Stop when nothing is pending.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Stop after so many seconds (60 with --once).", min=0)] = None,
    roll_up: Annotated[
        int | None,
        typer.Option(help="One event for what a customer uses of a meter in so many seconds.", min=1, max=3600),
    ] = None,
    create_missing: Annotated[
        bool, typer.Option("--create-missing", help="Make a customer of somebody whom Stripe does not know.")
    ] = False,
    meter: Annotated[
        list[str] | None, typer.Option(help="A meter that you bill on: do not start if Stripe's is wrong.")
    ] = None,
    billing_day: BillingDayOption = 1,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send what is recorded, until Ctrl-C or SIGTERM.

    With --once, what was held because of its meter is looked at again at once; what else is held, when it is due.
    Exit code 1 if something was rejected or could not be looked at and, with --once or --timeout, if something is left
    to be sent.
    """
    seconds = 60.0 if once and timeout is None else timeout
    with (
        clear_errors(as_json=as_json),
        until_stopped() as stopping,
        _ledger(ledger, once=once, as_json=as_json) as opened,
        open_gateway() as gateway,
    ):
        from langchain_stripe_meter.audit.chores import Ages, chores
        from langchain_stripe_meter.delivery.courier import Courier
        from langchain_stripe_meter.ledger import views

        opened.pin(is_test=gateway.is_test)
        if meter:
            _check(gateway, meter)
        courier = Courier(
            opened, gateway, roll_up=roll_up, create_missing=create_missing,
            chores=chores(opened, gateway), watches=[Ages(opened, billing_day=billing_day).chore],
        )  # fmt: skip
        try:
            if once:
                _look_again(opened, as_json=as_json)
            _deliver(courier, stopping, once=once, deadline=None if seconds is None else time.monotonic() + seconds)
        finally:
            with errors.status("waiting for Stripe's last answers, ten seconds at most"):
                courier.close(10)
        now = views.status(opened)
    done = {"delivered": courier.delivered, "rejected": courier.rejected, "pending": now.pending,
            "held": now.held, "doubtful": now.doubtful}  # fmt: skip
    say(", ".join(f"{count:,} {what}" for what, count in done.items()) + ".", done, as_json=as_json)
    if courier.rejected:
        fail("Stripe refused events for good: see 'stripe-meter tail' for why, then 'stripe-meter retry'.", 1)
    if seconds is not None and now.pending:
        why = now.paused or now.waits or ""
        fail(
            f"Not everything could be sent{': ' if why else ''}{why.rstrip('.')}. It is kept; run this again later.", 1
        )


def _ledger(url: str | None, *, once: bool, as_json: bool) -> closing[Ledger]:
    """The ledger. A courier may be started before the first run, and then makes the file, as the first run would."""
    opened = new_ledger(url)
    missing = missing_file(opened)
    if missing is not None and once:
        fail(
            f"Nothing to deliver: there is no ledger at {missing} yet. If there should be one, give its address with "
            "--ledger or $STRIPE_METER_LEDGER.",
            1,
            as_json=as_json,
        )
    if missing is not None:
        errors.print(f"stripe-meter: there is no ledger yet; this courier makes it: {missing}", soft_wrap=True)
    return closing(opened)


def _look_again(ledger: Ledger, *, as_json: bool) -> None:
    """What is held and may go on is pending from here on, so that nobody leaves before it was tried."""
    from langchain_stripe_meter.errors import ForeignLedgerError, LedgerError, NewerLedgerError
    from langchain_stripe_meter.ledger import sealing

    try:
        sealing.look_again(ledger)
    except (ForeignLedgerError, NewerLedgerError):
        raise
    except LedgerError as error:
        fail(f"Nothing was sent: {error}", 1, as_json=as_json)


def _check(gateway: Gateway, names: list[str]) -> None:
    """Refuse meters that are wrong; what Stripe does not say now is no reason to stop, the courier asks again."""
    from langchain_stripe_meter.errors import StripeError
    from langchain_stripe_meter.gateway.meters import check_meters

    try:
        check_meters(gateway, dict.fromkeys(names, ()))
    except StripeError as error:
        errors.print(f"stripe-meter: the meters could not be checked: {error}", soft_wrap=True)


def _deliver(courier: Courier, stopping: threading.Event, *, once: bool, deadline: float | None) -> None:
    from langchain_stripe_meter.ledger import views

    with errors.status("delivering") as shown:
        while not stopping.is_set():
            courier.wake()
            with courier.ledger.read() as connection:
                pending = views.pending(connection)
            shown.update(f"{courier.delivered:,} delivered, {pending:,} pending")
            if (once and not pending) or (deadline is not None and time.monotonic() > deadline):
                return
            stopping.wait(0.1)


@app.command()
def verify(
    since: Annotated[int, typer.Option(help="Usage since then, in Unix seconds.", min=0)] = 0,
    until: Annotated[int | None, typer.Option(help="Usage dated before then, in Unix seconds.", min=0)] = None,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold the ledger against Stripe's sums; exit code 1 if they differ, or an account cannot be asked."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened, open_gateway() as gateway:
        from dataclasses import asdict

        from langchain_stripe_meter.audit.verify import verify as compare
        from langchain_stripe_meter.core.events import LAST_SECOND, seconds

        opened.pin(is_test=gateway.is_test)
        span = seconds(since, "since"), LAST_SECOND if until is None else seconds(until, "until")
        with errors.status("asking Stripe") as shown:
            found = compare(opened, gateway, *span, progress=lambda done, all_: shown.update(f"{done} of {all_}"))
    if as_json:
        judged = [(one, not (one.difference or one.problem)) for one in found.comparisons]
        print_json([asdict(one) | {"difference": one.difference, "agrees": agrees} for one, agrees in judged])
    else:
        rows(found.comparisons, as_json=False, empty="Nothing was recorded in that time.", hide=("problem",))
        if found.notes:
            console.print(found.notes, soft_wrap=True)
    if not found.agrees:
        fail(found.advice, 1)


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
    if not named.startswith("cus_") and "@" not in named:
        raise typer.BadParameter(f"--customer {named}: give an e-mail, or an id such as 'cus_123'.")
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
