"""Whose business a run is, the connected account that it is billed on, and whose lead pays there.

A platform that bills for others (Stripe Connect) has a connected account for each of them. Meters, customers, leads and
identifiers belong to one account and never mix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from langchain_stripe_meter.core.customers import CustomerSource, Facts, FromLead, Skip, as_source, flat
from langchain_stripe_meter.core.events import check_account
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.core.references import By
from langchain_stripe_meter.core.values import valueclass
from langchain_stripe_meter.errors import ConfigurationError


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
    """Whose business a run is, or who pays for it, could not be told: nobody is billed until a person says so."""


TenantSource = Callable[[Facts], Tenant | None]
"""From the trusted facts of a run to its tenant; None skips the run, for nobody is billed on a guess."""


def account_of(account: str | None, own: str, *, has_tenants: bool, what: str) -> str:
    """The account where one is given, else the handler's ``own``; with ``tenant=`` there is no such default.

    ``what`` is what belongs to an account: a ``customer`` or a ``session``.
    """
    if account is not None:
        return check_account(account)
    if has_tenants:
        raise ConfigurationError(
            f"The handler has tenant=, and the same {what} is somebody else's on each account: say whose {what} this "
            "is with account='acct_…' (account='' for the key's own)."
        )
    return own


# -- leads: whether a source wants them, which fields, of whose session


def needs_lookup(source: CustomerSource) -> bool:
    """Whether identifying may ask the ledger for a captured lead."""
    return bool(_from_leads(source))


def _from_leads(source: CustomerSource) -> list[FromLead]:
    return [one for one in flat(source) if isinstance(one, FromLead)]


def lead_fields(source: CustomerSource) -> tuple[By, ...]:
    """What of a lead says who pays, in the order in which ``source`` tries it."""
    return tuple(dict.fromkeys(one.by for one in _from_leads(source)))


def lead_region(source: CustomerSource) -> str | None:
    """Where ``source`` says that a lead's phone number without a leading ``+`` is dialled."""
    return next((one.region for one in _from_leads(source) if one.region), None)


def lead_session(source: CustomerSource, facts: Facts) -> str | None:
    """The session whose lead, captured later, may pay for a run that names nobody; None where none is trusted."""
    found = _from_leads(source)
    return facts.session(trust_client=all(one.trust_client for one in found)) if found else None


def session_digest(account: str, session: str) -> str:
    """What stands for a session in a reading: never the session itself, which may be a secret or name a person."""
    told = f"{len(account)}:{account}{session}"
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
