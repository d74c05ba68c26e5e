"""``stripe-meter deliver``: what others recorded is sent, once or until it is stopped."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_stripe_meter.cli.show import BillingDayOption, JsonOption, LedgerOption, clear_errors, errors, fail, say
from langchain_stripe_meter.cli.world import missing_file, new_ledger, open_gateway, until_stopped

if TYPE_CHECKING:
    import threading

    from langchain_stripe_meter.delivery.courier import Courier
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger


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
            courier.close(10)
        now = views.status(opened)
    done = {"delivered": courier.delivered, "rejected": courier.rejected, "pending": now.pending,
            "held": now.held, "doubtful": now.doubtful}  # fmt: skip
    say(", ".join(f"{count:,} {what}" for what, count in done.items()) + ".", done, as_json=as_json)
    if courier.rejected:
        fail("Stripe refused events for good: see 'stripe-meter tail' for why, then 'stripe-meter retry'.", 1)
    if seconds is not None and now.pending:
        fail(f"Not everything could be sent. {now.paused or 'It is kept; run this again later.'}", 1)


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
