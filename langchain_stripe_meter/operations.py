"""What a person does with a handler's ledger: look, settle, compare."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import doubts, views
from langchain_stripe_meter.ledger.doubts import DoubtfulList
from langchain_stripe_meter.ledger.forget import Forgotten, forget
from langchain_stripe_meter.ledger.skips import SkipList, skips
from langchain_stripe_meter.ledger.store import Ledger

if TYPE_CHECKING:
    from langchain_stripe_meter.audit.verify import Verification
    from langchain_stripe_meter.delivery.courier import Courier


class Operations:
    """The handler's acts on what is recorded already. ``_courier`` is None where the handler only records."""

    _ledger: Ledger
    _courier: Courier | None

    def held(self) -> views.HeldList:
        """What waits for Stripe to know a customer, or for a person, grouped by what it waits for."""
        return views.held(self._ledger)

    def skips(self, since: datetime | int = 0) -> SkipList:
        """What went unbilled for want of somebody to bill: per day (UTC), meter and reason, how often and how much.

        ``since`` is a datetime with a time zone or Unix seconds. It names nobody.
        """
        return skips(self._ledger, _seconds(since))

    def forget(
        self,
        *,
        email: str | None = None,
        phone: str | None = None,
        name: str | None = None,
        session: str | None = None,
        customer: str | None = None,
    ) -> Forgotten:
        """Erase a person from the ledger and its files: leads, names on waiting usage, and what points to them.

        Amounts are kept: usage that waited for the person is held without a name. Look at the report's ``complete``:
        while others read a SQLite ledger, its log may keep the bytes, and it says to do this again.
        """
        return forget(self._ledger, email=email, phone=phone, name=name, session=session, customer=customer)

    def assign(self, held: views.Held | Sequence[int], customer: str | None = None, value: object = None) -> int:
        """A person settles held readings: who pays, how much where no amount is known. Returns how many moved."""
        moved = views.assign(self._ledger, held.ids if isinstance(held, views.Held) else held, customer, value)
        return self._moved(moved)

    def doubtful(self) -> DoubtfulList:
        """Events that Stripe may have or not, and why they could not be settled by comparing with its sums (yet)."""
        return doubts.doubtful(self._ledger)

    def settle_doubt(self, identifiers: Sequence[str], *, delivered: bool) -> int:
        """A person has looked: Stripe has these doubtful events, or they are sent again. Returns how many moved."""
        return self._moved(doubts.settle_doubt(self._ledger, identifiers, delivered=delivered))

    def retry(self) -> int:
        """Try held and rejected things again, now. Returns how many."""
        return self._moved(views.retry(self._ledger))

    def verify(self, since: datetime | int = 0) -> Verification:
        """Hold the ledger against Stripe's own sums, per customer and meter, for usage since ``since``.

        ``since`` is a datetime with a time zone or Unix seconds. Raises ``StripeError`` where Stripe does not answer,
        ``ConfigurationError`` for a handler that only records.
        """
        if self._courier is None:
            raise ConfigurationError("verify() asks Stripe, but this handler was made with deliver=False.")
        from langchain_stripe_meter.audit.verify import verify

        return verify(self._ledger, self._courier.gateway, _seconds(since))

    def _moved(self, count: int) -> int:
        if self._courier is not None:
            self._courier.wake()
        return count


def _seconds(since: datetime | int) -> int:
    if not isinstance(since, datetime):
        return since
    if since.tzinfo is None:
        raise ConfigurationError(f"since={since!r} has no time zone; use datetime(..., tzinfo=timezone.utc).")
    return int(since.timestamp())
