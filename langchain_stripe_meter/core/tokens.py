"""Signed tokens: who pays, in a form that a front end may carry, since only the holder of the secret can make one.

A token reads ``smt1.<customer>.<expiry>.<account>.<signature>``: the expiry in Unix seconds, the account empty or a
Stripe account's id, the signature HMAC-SHA256 of all before it. It is signed, not secret: its bearer can read the
customer's id, and until it expires whoever holds it is believed.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import NoReturn, Self

from langchain_stripe_meter.core.events import check_account, check_customer_id
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

MIN_SECRET = 32
"""Bytes of a secret: as many as the digest has, below which HMAC loses strength (RFC 2104)."""
MAX_TOKEN = 320
"""Characters in a token. The longest that ``sign`` makes has 272."""
_KIND = "smt1"
_EXPIRY = re.compile(r"[0-9]{1,12}\Z")
_LAST_SECOND = 10**12 - 1


class Secrets:
    """What signs and checks tokens: the first secret signs, each is accepted, so that one can be replaced by another.

    The secrets themselves are not kept, only the keyed state that HMAC makes of them; that is neither shown nor
    pickled. ``ConfigurationError`` for one of less than 32 bytes.
    """

    __slots__ = ("_keyed",)

    def __init__(self, secrets: str | bytes | Sequence[str | bytes]) -> None:
        several = [secrets] if isinstance(secrets, str | bytes) else list(secrets)
        if not several:
            raise ConfigurationError("Signing tokens takes at least one secret.")
        self._keyed = tuple(hmac.new(_usable(secret), digestmod=sha256) for secret in several)

    def sign(self, text: str) -> str:
        """The signature of ``text`` under the first secret."""
        return self._signatures(text)[0]

    def made(self, text: str, signature: str) -> bool:
        """Whether ``signature`` is that of ``text`` under one of the secrets; takes as long for any answer."""
        given = signature.encode()
        return any([hmac.compare_digest(own.encode(), given) for own in self._signatures(text)])  # noqa: C419 - no short cut

    def _signatures(self, text: str) -> list[str]:
        signatures = []
        for keyed in self._keyed:
            mac = keyed.copy()
            mac.update(text.encode())
            signatures.append(urlsafe_b64encode(mac.digest()).rstrip(b"=").decode())
        return signatures

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secrets) and self._signatures("") == other._signatures("")

    def __hash__(self) -> int:
        return hash(tuple(self._signatures("")))

    def __repr__(self) -> str:
        return f"<{len(self._keyed)} secrets>" if len(self._keyed) != 1 else "<a secret>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("The secret that signs tokens is never pickled. Make the source where it is used.")


def _usable(secret: str | bytes) -> bytes:
    if not isinstance(secret, str | bytes):
        raise ConfigurationError(f"A secret that signs tokens is text or bytes, not {type(secret).__name__}.")
    raw = secret.encode() if isinstance(secret, str) else secret
    if len(raw) < MIN_SECRET:
        raise ConfigurationError(
            f"A secret that signs tokens has {len(raw)} bytes; at least {MIN_SECRET} are needed. "
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return raw


def sign(customer: str, secrets: Secrets, *, expires_at: int | datetime, account: str | None = None) -> str:
    """A token that says until ``expires_at`` that ``customer`` pays; ``account`` binds it to one Stripe account."""
    text = f"{_KIND}.{check_customer_id(customer)}.{_expiry(expires_at)}.{check_account(account or '')}"
    return f"{text}.{secrets.sign(text)}"


def _expiry(expires_at: int | datetime) -> int:
    if isinstance(expires_at, datetime):
        if expires_at.tzinfo is None:
            raise InvalidValueError(
                f"expires_at={expires_at!r} has no time zone; use datetime(..., tzinfo=timezone.utc)."
            )
        expires_at = int(expires_at.timestamp())
    if type(expires_at) is not int or not 0 <= expires_at <= _LAST_SECOND:
        raise InvalidValueError(f"expires_at={expires_at!r} is neither Unix seconds (an int) nor a datetime.")
    return expires_at


def read(token: object, secrets: Secrets, now: int | None, account: str | None = None) -> str:
    """The customer whom ``token`` names.

    ``InvalidValueError`` says why it is not believed and repeats nothing of it: it may be anything at all.
    """
    if not isinstance(token, str) or not token.isascii():
        raise InvalidValueError("the signed token is malformed")
    if len(token) > MAX_TOKEN:
        raise InvalidValueError("the signed token is too long")
    text, _, signature = token.rpartition(".")
    parts = text.split(".")
    if len(parts) != 4 or parts[0] != _KIND:
        raise InvalidValueError("the signed token is malformed")
    if not secrets.made(text, signature):
        raise InvalidValueError("the signed token was not signed with our secret")
    return _believed(parts, now, account)


def _believed(parts: Sequence[str], now: int | None, account: str | None) -> str:
    _, customer, expiry, bound_to = parts
    if not _EXPIRY.match(expiry):  # signed with our secret, but not by ``sign``
        raise InvalidValueError("the signed token is malformed")
    if now is None or now >= int(expiry):
        raise InvalidValueError("the signed token has expired")
    if bound_to != (account or ""):
        raise InvalidValueError("the signed token is for another Stripe account")
    return customer
