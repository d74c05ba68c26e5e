"""What a person does with a handler's ledger: look, settle, compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from langchain_stripe_meter.core.customers import CustomerSource
from langchain_stripe_meter.core.events import LAST_SECOND, check_account, seconds
from langchain_stripe_meter.core.meters import Meter, dimensions_of
from langchain_stripe_meter.core.states import Move
from langchain_stripe_meter.core.tenants import lead_region
from langchain_stripe_meter.counting import entry_of
from langchain_stripe_meter.errors import ConfigurationError, OnError, StripeError, UnrecordedError
from langchain_stripe_meter.ledger import acts as decisions
from langchain_stripe_meter.ledger import doubts, reversals, sealing, views
from langchain_stripe_meter.ledger.doubts import DoubtfulList
from langchain_stripe_meter.ledger.forget import Forgotten, forget
from langchain_stripe_meter.ledger.store import ACCOUNT, LIVEMODE, Ledger, refuse_other_mode
from langchain_stripe_meter.ledger.views import SkipList, skips
from langchain_stripe_meter.recording import Recorder

if TYPE_CHECKING:
    from langchain_stripe_meter.audit.verify import Verification
    from langchain_stripe_meter.audit.webhooks import Webhooks
    from langchain_stripe_meter.delivery.courier import Courier
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.keeping import Pruned

EARLIER_TRY = (
    "An earlier try may have: look at verify() before you correct anything; if Stripe has less, write_off() it"
)


class Operations:
    """The handler's acts on what is recorded already. ``_courier`` is None where the handler only records."""

    meters: tuple[Meter, ...]
    customer: CustomerSource
    _ledger: Ledger
    _courier: Courier | None
    _recorder: Recorder
    _webhook_secret: str | None
    _on_error: OnError | None
    _stripe_account: str
    _has_tenants: bool

    def held(self) -> views.HeldList:
        """What waits for Stripe to know a customer, or for a person, grouped by what it waits for."""
        return views.held(self._ledger)

    def skips(self, since: datetime | int = 0) -> SkipList:
        """What went unbilled for want of somebody to bill: per day (UTC), meter and reason, how often and how much.

        ``since`` is a datetime with a time zone or Unix seconds. It names nobody.
        """
        return skips(self._ledger, seconds(since, "since"))

    def forget(
        self,
        *,
        email: str | None = None,
        phone: str | None = None,
        name: str | None = None,
        session: str | None = None,
        customer: str | None = None,
        region: str | None = None,
    ) -> Forgotten:
        """Erase a person from the ledger and its files: leads, names on waiting usage, and what points to them.

        Amounts are kept: usage that waited for the person is held without a name. Look at the report's ``complete``:
        while others read a SQLite ledger, its log may keep the bytes, and it says to do this again. A ``session`` is
        looked for on every account. ``region`` (``"DE"``) is where a phone without a leading ``+`` is dialled, by
        default that of ``from_lead``.
        """
        region = region or lead_region(self.customer)
        return forget(
            self._ledger, email=email, phone=phone, name=name, session=session, customer=customer, region=region
        )

    def assign(
        self,
        held: views.Readings,
        customer: str | None = None,
        value: object = None,
        *,
        account: str | None = None,
    ) -> int:
        """A person settles held readings: who pays, how much where no amount is known, and the connected ``account``
        (``""`` for the key's own) where ``tenant=`` failed. Returns how many moved.

        ``held`` is what ``held()`` returns, all of it or some groups, or the ids of readings.
        """
        return self._moved(decisions.assign(self._ledger, held, customer, value, account))

    def doubtful(self) -> DoubtfulList:
        """Events that Stripe may have or not, and why they could not be settled by comparing with its sums (yet)."""
        return doubts.doubtful(self._ledger)

    def settle_doubt(self, identifiers: Sequence[str], *, delivered: bool) -> int:
        """A person has looked: Stripe has these doubtful events, or they are sent again. Returns how many moved."""
        return self._moved(doubts.settle_doubt(self._ledger, identifiers, delivered=delivered))

    def retry(self) -> int:
        """Try held and rejected things again, now; who was made Stripe's customer a moment ago is found. Returns how
        many."""
        return self._moved(sealing.retry(self._ledger))

    def check(self, stripe_account: str | None = None) -> None:
        """Open the ledger, and ask Stripe whether the handler's meters can bill what they are sent; silent if so.
        ``lifespan`` does it too.

        ``stripe_account`` is the connected account to look at, by default the handler's; with ``tenant=``, name one.
        Raises ``LedgerError`` where the ledger cannot be used; ``ConfigurationError``, which names each meter that is
        not there, inactive, or does not sum up, and what to do; and ``StripeError`` where Stripe does not say. With
        ``deliver=False``, Stripe cannot be asked: that is a ``ConfigurationError``, too.
        """
        self._check_ledger()
        gateway = self._gateway("check()")
        if stripe_account is None and self._has_tenants:
            raise ConfigurationError("check() needs stripe_account=: with tenant=, each account has its own meters.")
        from langchain_stripe_meter.gateway.meters import check_meters

        account = self._stripe_account if stripe_account is None else check_account(stripe_account)
        check_meters(gateway, {meter.event_name: dimensions_of(meter) for meter in self.meters}, account)

    def _check_ledger(self) -> None:
        with self._ledger.read() as connection:
            views.pending(connection)  # opening is not enough: its tables may be gone

    def verify(self, since: datetime | int = 0, until: datetime | int = LAST_SECOND) -> Verification:
        """Hold the ledger against Stripe's own sums, per customer and meter, for usage dated from ``since`` to before
        ``until``, such as a month that is over.

        Each is a datetime with a time zone or Unix seconds. Stripe's sums lag behind: that they lack what was delivered
        within the last two hours is no difference. Raises ``StripeError`` where Stripe does not answer,
        ``ConfigurationError`` for a handler that only records.
        """
        gateway = self._gateway("verify()")
        from langchain_stripe_meter.audit.verify import verify

        return verify(self._ledger, gateway, seconds(since, "since"), seconds(until, "until"))

    def acts(self, most: int = 1000) -> decisions.ActList:
        """The newest decisions of persons and webhooks, oldest first: cancelled, corrected, re-timed, written off,
        rejected later."""
        return decisions.every_act(self._ledger, most)

    def cancel(self, identifier: str) -> None:
        """Take back what was delivered within the last 24 hours; ``identifier`` is that of its reading or its event.

        Cancelling again is safe, also later: where an earlier wish was carried out, this says so by returning. Raises
        ``IllegalMoveError`` for what is too old or was not delivered, ``ConfigurationError`` for what the ledger does
        not have, ``ForeignLedgerError`` for another account's key, ``StripeError`` where Stripe refuses or nobody knows
        what it did.
        """
        cancel(self._ledger, self._gateway("cancel()"), identifier)

    def correct(
        self,
        customer: str,
        event_name: str,
        value: object,
        *,
        reason: str,
        id: str,
        at: int | None = None,
        stripe_account: str | None = None,
    ) -> str:
        """Correct a customer's total by ``value``, usually negative, in the meter's own unit; returns the identifier.

        It is a reading of its own, delivered like any other; the same ``id`` again changes nothing. ``at`` is the time
        that it counts for (Unix seconds, default now): Stripe changes no invoice that is final. ``reason`` is kept and
        shown, and must name nobody. ``stripe_account`` is the customer's connected account, by default the handler's.
        """
        account = self._stripe_account if stripe_account is None else stripe_account
        identifier = decisions.correct(
            self._ledger, customer, event_name, value, reason=reason, id=id, at=at, account=account
        )
        self._moved(1)
        return identifier

    def record_again(self, error: UnrecordedError) -> int:
        """Store what could not be stored when it was used, as it was: who pays, how much, when.

        What the ledger has all the same, because it was stored without our learning of it, is not stored twice.
        Returns how many readings the ledger did not have yet; raises ``LedgerError`` where they still cannot be stored.
        ``status()`` of the handler that told the error counts them as unrecorded no more.
        """
        if not isinstance(error, UnrecordedError):
            kind = type(error).__name__
            raise ConfigurationError(f"record_again() takes the UnrecordedError that on_error was told, not {kind}.")
        new = self._ledger.record_new([entry_of(one) for one in error.readings])
        self._recorder.mended(error)
        return self._moved(new)

    def retime(self, held: views.Readings, at: datetime | int | None = None, *, not_billed: bool = False) -> int:
        """Bill usage that is held because it is older than 34 days, as usage of ``at`` (default now).

        ``held`` is as for ``assign``. All of it or, with an error that names what cannot be, nothing. Returns how many
        readings moved. What comes from a backup may have been billed before that was restored: it takes
        ``not_billed=True``, your word that Stripe has none of it.
        """
        when = None if at is None else seconds(at, "at")
        return self._moved(decisions.retime(self._ledger, held, when, not_billed=not_billed))

    def write_off(self, what: views.Readings | str | Iterable[views.Held | int | str], *, reason: str) -> int:
        """Decide not to bill: held readings (as for ``assign``, or identifiers), rejected or doubtful events, and those
        that may have been cancelled (identifiers).

        All of it or, with an error that names what cannot be, nothing. Returns how many. ``reason`` is kept and shown,
        and must name nobody.
        """
        return decisions.write_off(self._ledger, what, reason=reason)

    @property
    def webhooks(self) -> Webhooks:
        """Stripe's webhooks: ``handle(raw_body, signature)``, and ``route(path)`` for Starlette or FastAPI."""
        from langchain_stripe_meter.audit.webhooks import Webhooks

        gateway = self._gateway("webhooks")
        wake = self._courier.wake if self._courier is not None else None
        return Webhooks(self._ledger, gateway, self._webhook_secret, on_error=self._on_error, wake=wake)

    def _gateway(self, asking: str) -> Gateway:
        if self._courier is None:
            raise ConfigurationError(f"{asking} asks Stripe, but this handler was made with deliver=False.")
        return self._courier.gateway

    def prune(self, older_than_days: int = 40) -> Pruned:
        """Delete what is final (delivered, skipped, written off) and older than so many days, 36 at least.

        Its sums are kept per customer, meter and day, so totals and ``verify`` stay right. A run or job that is
        recorded again after its row was pruned is recorded as new. Leads go that nothing has asked for in a year.
        """
        from langchain_stripe_meter.ledger.keeping import prune

        return prune(self._ledger, older_than_days)

    def _moved(self, count: int) -> int:
        if self._courier is not None:
            self._courier.wake()
        return count


def cancel(ledger: Ledger, gateway: Gateway, identifier: str) -> None:
    """As ``Operations.cancel``, for who has a ledger and a gateway."""
    from langchain_stripe_meter.delivery.guard import refuse_foreign
    from langchain_stripe_meter.gateway.meters import cancel as ask

    refuse_other_mode(ledger.note(LIVEMODE), is_test=gateway.is_test)
    refuse_foreign(ledger.note(ACCOUNT), gateway.account_id())
    event = reversals.ask_to_cancel(ledger, identifier)
    if event is None:
        return
    outcome = ask(gateway, event.event_name, event.identifier, event.account)
    if outcome.move is Move.ACCEPTED:
        reversals.settle_cancel(ledger, event, None)
    elif outcome.move is Move.UNKNOWN:
        raise StripeError(
            f"Whether the meter event {event.identifier} is cancelled is unknown: {outcome.message.rstrip('.')}. "
            "Cancel it again: that is safe."
        )
    elif not reversals.settle_cancel(ledger, event, outcome.message):
        raise StripeError(
            f"Stripe did not cancel the meter event {event.identifier}: {outcome.message}"
            + (f" {EARLIER_TRY}." if event.was_asked else "")
        )
