"""API keys and what they may do, and the short-lived tokens of the v2 stream."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox.ids import Ids
from langchain_stripe_meter.sandbox.replies import StripeRefusalError

if TYPE_CHECKING:
    from collections.abc import Collection

SESSION_SECONDS = 15 * 60
PERMISSIONS = frozenset(
    f"{what}:{how}"
    for what in ("meter_events", "meters", "customers", "account", "events")
    for how in ("read", "write")
)


@dataclass(frozen=True)
class Key:
    """An API key; ``permissions`` is None when it may do everything (a secret key)."""

    text: str
    account: str
    permissions: frozenset[str] | None = None
    revoked: bool = False

    @property
    def livemode(self) -> bool:
        """Whether it works on live data."""
        return self.text.startswith(("sk_live_", "rk_live_"))

    @property
    def shown(self) -> str:
        """The key as Stripe's messages show it."""
        return f"{self.text[:8]}{'*' * 8}{self.text[-4:]}"

    def may(self, permission: str) -> bool:
        """Whether it has the permission; writing includes reading."""
        granted = self.permissions
        return granted is None or permission in granted or permission.replace(":read", ":write") in granted


@dataclass(frozen=True)
class Session:
    """A meter event session: its token opens the stream until ``expires`` (Unix seconds)."""

    id: str
    token: str
    account: str
    livemode: bool
    created: int
    expires: int


class Keyring:
    """Which keys and session tokens the sandbox knows."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._sessions: dict[str, Session] = {}
        self._ids = Ids("sessions")

    def allow(self, text: str, account: str, permissions: Collection[str] | None) -> None:
        """Let a key in, or change what it may do."""
        unknown = sorted(set(permissions or ()) - PERMISSIONS)
        if unknown:
            raise ConfigurationError(f"Unknown permission {unknown[0]!r}. Known are: {', '.join(sorted(PERMISSIONS))}.")
        self._keys[text] = Key(text, account, None if permissions is None else frozenset(permissions))

    def revoke(self, text: str) -> None:
        """Answer 401 to this key from now on."""
        self._keys[text] = Key(text, "", revoked=True)

    def check(self, authorization: str) -> Key:
        """The key of a request, or Stripe's 401."""
        text = _credential(authorization)
        if not text:
            raise _unauthorized("You did not provide an API key. Provide it in the Authorization header.", None)
        key = self._keys.get(text)
        if key is None:
            raise _unauthorized(f"Invalid API Key provided: {Key(text, '').shown}", None)
        if key.revoked:
            raise _unauthorized(f"Expired API Key provided: {key.shown}", "api_key_expired")
        return key

    def open_session(self, account: str, now: int, *, livemode: bool) -> Session:
        """A new token for the stream, good for 15 minutes."""
        session = Session(
            id=self._ids.make("mes"),
            token=self._ids.make("token", 40),
            account=account,
            livemode=livemode,
            created=now,
            expires=now + SESSION_SECONDS,
        )
        self._sessions[session.token] = session
        return session

    def session(self, authorization: str, now: int) -> Session:
        """The session of a stream request, or Stripe's 401."""
        session = self._sessions.get(_credential(authorization))
        if session is None:
            raise _unauthorized("Invalid authentication token provided for the meter event stream.", None)
        if now >= session.expires:
            raise StripeRefusalError(
                "The temporary session token has expired.",
                status=401,
                kind="temporary_session_expired",
                code="billing_meter_event_session_expired",
                stored=False,
            )
        return session


def _unauthorized(message: str, code: str | None) -> StripeRefusalError:
    headers = {"WWW-Authenticate": 'Basic realm="Stripe"'}
    return StripeRefusalError(message, status=401, code=code, headers=headers, stored=False)


def _credential(authorization: str) -> str:
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(text, validate=True).decode().partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
