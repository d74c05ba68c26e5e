"""Who may ask: API keys with their permissions, and session tokens of the v2 stream."""

from __future__ import annotations

import base64
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox.account import Account
from langchain_stripe_meter.sandbox.wire import StripeRefusalError

SESSION_SECONDS = 15 * 60
LIVE = ("sk_live_", "rk_live_")
PERMISSIONS = frozenset(
    f"{what}:{how}"
    for what in (
        "meter_events",
        "meter_event_adjustments",
        "meters",
        "customers",
        "account",
        "events",
        "credits",
        "prices",
    )
    for how in ("read", "write")
)


@dataclass(frozen=True)
class Key:
    """An API key; ``permissions`` is None when it may do everything (a secret key)."""

    text: str
    account: str = ""
    permissions: frozenset[str] | None = None
    revoked: bool = False

    @property
    def livemode(self) -> bool:
        """Whether it works on live data."""
        return self.text.startswith(LIVE)

    @property
    def shown(self) -> str:
        """The key as Stripe's messages show it."""
        return f"{self.text[:8]}{'*' * 8}{self.text[-4:]}"

    def may(self, permission: str) -> bool:
        """Whether it has the permission; writing includes reading."""
        granted = self.permissions
        return granted is None or permission in granted or permission.replace(":read", ":write") in granted


class Keyring:
    """Which API keys, and which session tokens of the v2 stream, the sandbox knows."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._sessions: dict[str, tuple[Account, int]] = {}

    def allow(self, text: str, account: str, permissions: Collection[str] | None) -> None:
        """Let a key in, or change what it may do."""
        unknown = sorted(set(permissions or ()) - PERMISSIONS)
        if unknown:
            raise ConfigurationError(f"Unknown permission {unknown[0]!r}. Known are: {', '.join(sorted(PERMISSIONS))}.")
        self._keys[text] = Key(text, account, None if permissions is None else frozenset(permissions))

    def revoke(self, text: str) -> None:
        """Answer 401 to this key from now on."""
        self._keys[text] = Key(text, revoked=True)

    def check(self, authorization: str) -> Key:
        """The key of a request, or Stripe's 401."""
        text = _credential(authorization)
        if not text:
            raise _unauthorized("You did not provide an API key. Provide it in the Authorization header.")
        key = self._keys.get(text)
        if key is None:
            raise _unauthorized(f"Invalid API Key provided: {Key(text).shown}")
        if key.revoked:
            raise _unauthorized(f"Expired API Key provided: {key.shown}", "api_key_expired")
        return key

    def open_session(self, account: Account, now: int) -> str:
        """A new token for the stream of an account, good for 15 minutes."""
        token = account.make_id("token", 40)
        self._sessions[token] = account, now + SESSION_SECONDS
        return token

    def session(self, authorization: str, now: int) -> Account:
        """The account of a stream request, or Stripe's 401."""
        account, expires = self._sessions.get(_credential(authorization), (None, 0))
        if account is None:
            raise _unauthorized("Invalid authentication token provided for the meter event stream.")
        if now >= expires:
            raise StripeRefusalError(
                "The temporary session token has expired.",
                status=401,
                kind="temporary_session_expired",
                code="billing_meter_event_session_expired",
            )
        return account


def _unauthorized(message: str, code: str | None = None) -> StripeRefusalError:
    headers = {"WWW-Authenticate": 'Basic realm="Stripe"'}
    return StripeRefusalError(message, status=401, code=code, headers=headers)


def _credential(authorization: str) -> str:
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):  # no base64, or no UTF-8
            return base64.b64decode(text, validate=True).decode().partition(":")[0]
    return text.strip() if scheme.lower() == "bearer" else ""
