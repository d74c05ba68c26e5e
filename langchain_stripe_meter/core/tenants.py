"""Whose business a run is: the connected account that it is billed on, and what applies there.

A platform that bills for others (Stripe Connect) has a connected account for each of them. Meters, customers, leads and
identifiers belong to one account and never mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from langchain_stripe_meter.core.customers import CustomerSource, Facts, Skip, as_source
from langchain_stripe_meter.core.events import check_account
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.core.values import valueclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """One business on a platform.

    ``account`` is its connected account (``acct_…``; ``""`` is the key's own), ``meters`` and ``customer`` what counts
    and who pays there, where that differs from the handler's.
    """

    account: str = ""
    meters: tuple[Meter, ...] | None = None
    customer: CustomerSource | None = None

    def __post_init__(self) -> None:
        check_account(self.account)
        if self.customer is not None:
            object.__setattr__(self, "customer", as_source(self.customer))


NO_TENANT = "tenant= "
"""How the reason begins why usage is held on no account: a person must say whose it is."""


@valueclass
class Untold(Skip):
    """The application's own function could not say whose business a run is: nobody is billed until a person does."""


TenantSource = Callable[[Facts], Tenant | None]
"""From the trusted facts of a run to its tenant; None skips the run, for nobody is billed on a guess."""
