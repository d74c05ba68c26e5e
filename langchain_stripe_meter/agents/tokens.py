"""Signed tokens where they are made and read: the secret comes from the caller, else from the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import datetime

from langchain_stripe_meter.core import tokens
from langchain_stripe_meter.core.customers import FromSignedToken
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

SECRET = "STRIPE_METER_TOKEN_SECRET"  # noqa: S105 - the name of a variable
"""The environment variable that holds the secret; during a change of secrets the new one, a space, the old one."""

Secret = str | bytes | Sequence[str | bytes]


def sign_customer(
    customer: str, secret: Secret | None = None, *, expires_at: int | datetime, account: str | None = None
) -> str:
    """A compact, URL-safe token that says who pays, for a front end to pass on with its runs.

    Make it on your server for the user whom you authenticated. Whoever holds it is believed until ``expires_at`` (Unix
    seconds, or a datetime with a time zone), so keep that near. ``secret`` defaults to ``$STRIPE_METER_TOKEN_SECRET``;
    of several, the first signs. ``account`` (``acct_…``) makes it good for that Stripe account only.

    Raises ``ConfigurationError`` for a secret that is missing or has less than 32 bytes, and for values that make no
    token, such as a time in the past.
    """
    made = tokens.sign(customer, tokens.Secrets(_given(secret, SECRET)), expires_at=expires_at, account=account)
    moment = expires_at.timestamp() if isinstance(expires_at, datetime) else expires_at
    if moment <= time.time():
        raise InvalidValueError(
            f"expires_at={expires_at!r} is in the past, so nobody would believe the token. Say until when it is good, "
            "such as int(time.time()) + 3600 for an hour."
        )
    return made


def from_signed_token(
    key: str = "stripe_customer_token", secret: Secret | None = None, *, account: str | None = None
) -> FromSignedToken:
    """Read a token that ``sign_customer`` made from the run's metadata or configurable, under ``key``.

    It is believed on any server, whoever sent it, for only the holder of the secret can have made it. One that has
    expired when the run starts, or that is not whole, is skipped with the reason. ``secret`` defaults to
    ``$STRIPE_METER_TOKEN_SECRET``; several are all accepted. ``account`` must be the one that the token is bound to.

    Raises ``ConfigurationError`` for a secret that is missing or has less than 32 bytes.
    """
    return FromSignedToken(key, tokens.Secrets(_given(secret, SECRET)), account)


def secrets_in(variable: str) -> list[str]:
    """The secrets in an environment variable, divided by spaces; ``ConfigurationError`` if there is none."""
    found = os.environ.get(variable, "").split()
    if not found:
        shown = f"${variable}" if variable.isidentifier() and variable.isupper() else "The environment variable"
        raise ConfigurationError(f"{shown} holds no secret to sign tokens with. Set it, or pass secret=.")
    return found


def _given(secret: Secret | None, variable: str) -> Secret:
    return secrets_in(variable) if secret is None else secret
