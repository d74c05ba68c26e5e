"""What the sandbox answers: replies, refusals, and the two shapes of Stripe's error bodies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from langchain_stripe_meter.errors import StripeError

if TYPE_CHECKING:
    from collections.abc import Mapping

Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One HTTP answer: its status, its JSON body, and the headers that only this answer has.

    ``stored`` says whether Stripe keeps it under the request's idempotency key.
    """

    status: int
    body: Json
    headers: Mapping[str, str] = field(default_factory=dict)
    stored: bool = True

    def encoded(self) -> bytes:
        """The body as it travels."""
        return json.dumps(self.body, indent=2).encode()


class StripeRefusalError(StripeError):
    """The sandbox refuses a request as Stripe would; over HTTP it becomes an error body.

    ``stored=False`` marks what Stripe decides before it starts to work (keys, parameters, limits):
    such answers are never replayed for an idempotency key.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        stored: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"type": kind, "code": code, "message": message, "param": param}
        self.headers = dict(headers or {})
        self.stored = stored

    def reply(self, *, v2: bool) -> Reply:
        """The refusal as an answer of API v1 or v2."""
        return Reply(self.status, error_body(self.error, v2=v2), self.headers, self.stored)


def error_body(error: Mapping[str, str | None], *, v2: bool = False) -> Json:
    """An error body without the fields that say nothing.

    v2 has codes where v1 has types: its ``type`` only names the errors that have a class of their own.
    """
    known = {name: value for name, value in error.items() if value is not None}
    if v2:
        if known.get("type") == "invalid_request_error":
            del known["type"]
        known.pop("param", None)
        known.setdefault("code", "invalid_fields")
    return {"error": known}


def bad_parameter(message: str, param: str, code: str | None = None) -> StripeRefusalError:
    """A parameter that Stripe refuses before it does anything."""
    return StripeRefusalError(message, code=code, param=param, stored=False)


def no_such(kind: str, name: str, *, status: int = 404, param: str = "id") -> StripeRefusalError:
    """An object that does not exist (any more)."""
    return StripeRefusalError(f"No such {kind}: '{name}'", status=status, code="resource_missing", param=param)


def rfc3339(epoch: int) -> str:
    """Unix seconds as API v2 writes a time."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def from_rfc3339(text: str) -> int:
    """Unix seconds of an RFC 3339 time; ``ValueError`` when it is none."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None or "T" not in text.upper():
        raise ValueError(text)
    return int(moment.timestamp())
