"""What a person does with a handler's ledger: look, settle, compare."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger

if TYPE_CHECKING:
    from langchain_stripe_meter.audit.verify import Verification
    from langchain_stripe_meter.delivery.courier import Courier
    from langchain_stripe_meter.ledger.keeping import Pruned


class Operations:
    """The handler's acts on what is recorded already. ``_courier`` is None where the handler only records."""

    _ledger: Ledger
    _courier: Courier | None

    def held(self) -> views.HeldList:
        """What waits for Stripe to know a customer, or for a person, grouped by what it waits for."""
        return views.held(self._ledger)

    def assign(self, held: views.Held | Sequence[int], customer: str | None = None, value: object = None) -> int:
        """A person settles held readings: who pays, how much where no amount is known. Returns how many moved."""
        moved = views.assign(self._ledger, held.ids if isinstance(held, views.Held) else held, customer, value)
        return self._moved(moved)

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
        if isinstance(since, datetime):
            if since.tzinfo is None:
                raise ConfigurationError(f"since={since!r} has no time zone; use datetime(..., tzinfo=timezone.utc).")
            since = int(since.timestamp())
        from langchain_stripe_meter.audit.verify import verify

        return verify(self._ledger, self._courier.gateway, since)

    def prune(self, older_than_days: int = 40) -> Pruned:
        """Delete what is final (delivered, skipped, written off) and older than so many days, 36 at least.

        Its sums are kept per customer, meter and day, so totals and ``verify`` stay right. A run or job that is
        recorded again after its row was pruned is recorded as new.
        """
        from langchain_stripe_meter.ledger.keeping import prune

        return prune(self._ledger, older_than_days)

    def _moved(self, count: int) -> int:
        if self._courier is not None:
            self._courier.wake()
        return count
