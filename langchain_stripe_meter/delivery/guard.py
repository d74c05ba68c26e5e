"""What is looked at before anything is sent: is it this ledger's account, and will its meters add up rightly?"""

from __future__ import annotations

from collections.abc import Callable

from langchain_stripe_meter.errors import ForeignLedgerError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import problem_with
from langchain_stripe_meter.ledger import resolving, sealing
from langchain_stripe_meter.ledger.epoch import Epoch
from langchain_stripe_meter.ledger.pin import pin
from langchain_stripe_meter.ledger.store import Ledger

ACCOUNT = "account"
"""The ledger's note of the Stripe account that its usage belongs to."""


class Guard:
    """Checks for one courier. ``tell`` is told what was held."""

    def __init__(self, ledger: Ledger, gateway: Gateway, tell: Callable[[Exception], None]) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self._tell = tell
        self._is_ours = False
        self._epoch = Epoch(ledger, tell)
        self.sends, self.end = self._epoch.sends, self._epoch.end

    def check(self, now: int) -> None:
        """Hold what must not be sent.

        Raises ``StripeError`` where Stripe does not say, ``ForeignLedgerError`` where the key belongs to another
        account, or another mode, than the ledger.
        """
        self._epoch.keep(now)
        if not self._is_ours:
            self._check_account()
        with self._ledger.deliver_lane().transaction(shared=True) as connection:
            resolving.release_held(connection, now)
            meters = sealing.open_meters(connection)
        for account, event_name in meters:
            self._check_meter(account, event_name, now)

    def _check_account(self) -> None:
        """Pin the ledger to the key's mode and account. A key that may not read its account does not pin that."""
        pin(self._ledger.deliver_lane(), self._ledger.now(), is_test=self._gateway.is_test)
        account = self._gateway.account_id()
        pinned = self._ledger.note(ACCOUNT)
        if account is not None and pinned is None:
            self._ledger.set_note(ACCOUNT, account)
        elif account is not None and pinned != account:
            raise ForeignLedgerError(
                f"The ledger holds usage of the Stripe account {pinned}, but the key belongs to {account}; nothing is "
                "sent. Use that account's key, or give this account a ledger of its own."
            )
        self._is_ours = True

    def _check_meter(self, account: str, event_name: str, now: int) -> None:
        info = self._gateway.meter(event_name, account)
        if info is None and not self._gateway.can_read_meters(account):
            return
        problem = problem_with(event_name, info)
        if problem is None:
            return
        with self._ledger.deliver_lane().transaction() as connection:
            held = resolving.hold_meter(connection, account, event_name, problem, now)
        if held:
            self._tell(StripeError(f"{held} readings are held: {problem}."))
