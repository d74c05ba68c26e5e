"""What a customer source wants of leads: whether, which fields, of whose session."""

from __future__ import annotations

import hashlib

from langchain_stripe_meter.core.customers import By, CustomerSource, Facts, FromLead, flat


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
