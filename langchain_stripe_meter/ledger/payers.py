"""To whom an e-mail, name or phone led, for as long as a limit must remember it, without keeping the person.

A reading forgets its lead's reference when Stripe's customer is found. So that a limit still knows what that lead has
used, the table ``payers`` leads from a digest of the reference to the customer. The digest is keyed with a secret of
this ledger: somebody who only has a list of addresses cannot try them against another copy of the table.
"""

from __future__ import annotations

import hmac
import secrets

from sqlalchemy import Connection, select

from langchain_stripe_meter.ledger.schema import notes, payers
from langchain_stripe_meter.ledger.store import Ledger, dialect_insert, write_act

SECRET = "payers_secret"  # noqa: S105 - the name of a note
"""The note that holds the secret. Without it, nobody's digest can be worked out again."""


def secret(connection: Connection, now: int) -> bytes:
    """The ledger's own secret, made when it is first needed; inside the caller's transaction."""
    query = select(notes.c.value).where(notes.c.name == SECRET)
    found = connection.execute(query).scalar()
    if found is None:
        made = {"name": SECRET, "value": secrets.token_hex(32), "at": now}
        connection.execute(dialect_insert(connection, notes).values(made).on_conflict_do_nothing())
        found = connection.execute(query).scalar_one()  # another process may have been faster
    return bytes.fromhex(found)


def secret_of(ledger: Ledger) -> bytes:
    """The secret, in a transaction of its own: a run may ask, so it does not wait for couriers."""
    with ledger.write("record") as connection:
        return secret(connection, ledger.now())


def digest(key: bytes, account: str, reference: str) -> str:
    """A keyed digest of somebody whom runs of ``account`` name by ``reference`` (``email:…``), letter by letter."""
    return hmac.digest(key, f"{account}\0{reference}".encode(), "sha256").hex()


def known_by(key: bytes, account: str, reference: str) -> str:
    """The digest in the table: the same however the letters of an e-mail are written, so that it can be forgotten."""
    return digest(key, account, reference.lower() if reference.startswith("email:") else reference)


def remember(connection: Connection, account: str, reference: str, customer: str, now: int) -> None:
    """``reference`` leads to ``customer``, as of now.

    Where it led to another one before, that is left as an act: some process may have counted by it.
    """
    known = known_by(secret(connection, now), account, reference)
    before = connection.execute(select(payers.c.customer).where(payers.c.digest == known)).scalar()
    if before == customer:
        return
    if before is not None:
        by = reference.partition(":")[0]
        write_act(connection, "another customer", f"a customer's {by}", "Stripe finds another customer by it now", now)
    values = {"account": account, "customer": customer, "at": now}
    statement = dialect_insert(connection, payers).values(digest=known, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))
