"""This ledger's own secret: what is derived from it means nothing to whoever only knows an e-mail or a phone number."""

from __future__ import annotations

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.ledger import payers
from langchain_stripe_meter.ledger.store import Ledger


def secret_of(ledger: Ledger) -> bytes:
    """The secret, made when first asked for, in a transaction of its own; the same for every process on this ledger.

    A run may ask, so it does not wait for couriers.
    """
    with ledger.database.lane("record").transaction() as connection:
        return payers.secret(connection, ledger.now())


def digest_of(secret: bytes, account: str, reference: Reference) -> str:
    """64 hexadecimal digits that stand for somebody on an account; the table ``payers`` knows them by the same."""
    return payers.digest(secret, account, f"{reference.by}:{reference.value}")
