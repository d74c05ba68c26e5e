"""This ledger's own secret: what is derived from it means nothing to whoever only knows an e-mail or a phone number."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from langchain_stripe_meter.core.customers import Reference
from langchain_stripe_meter.ledger.schema import notes
from langchain_stripe_meter.ledger.store import Ledger, dialect_insert

SECRET = "secret"  # noqa: S105 - the name of the note that holds it


def secret_of(ledger: Ledger) -> bytes:
    """The secret, made when first asked for; the same for every process on this ledger."""
    told = ledger.note(SECRET)
    if told is None:
        with ledger.deliver_lane().transaction() as connection:
            made = dialect_insert(connection, notes).values(name=SECRET, value=secrets.token_hex(32), at=ledger.now())
            connection.execute(made.on_conflict_do_nothing())
        told = ledger.note(SECRET)
    return bytes.fromhex(told or "")


def digest_of(secret: bytes, account: str, reference: Reference) -> str:
    """64 hexadecimal digits that stand for somebody on an account."""
    told = f"{len(account)}:{account}{reference.by}:{reference.value}"
    return hmac.new(secret, told.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
